"""Sites that turn out too dense at run time go back to dense, for good.

A kernel counts the calls of its site, and those whose activation was too dense for
skipping to win.  ``site_counters`` hands it the counters, and every so often looks at
them; those of a GPU are looked at by :mod:`~inductor_sparse.runtime.density_gate`.  A
site that is mostly too dense is *demoted*: the code object of its graph is given back
to Dynamo, whose next call compiles it again with that site left dense, at exactly the
speed it would have had.  On a GPU it is dense from the number of tokens on at which it
was too dense: fewer of them need fewer neurons.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from inductor_sparse import _compat, ops
from inductor_sparse.runtime.density_gate import Finding, Gate

log = logging.getLogger(__name__)

WINDOW = 8
"""Calls of a site between two looks at its counters."""

_Code = types.CodeType


@dataclasses.dataclass
class _Counters:
    """The counters of one site, ``ops.COUNTERS``, and how often it was called."""

    values: Tensor
    calls: int = 0


class _Current(threading.local):
    """The code object whose graph this thread is running, and what it found there."""

    code: _Code | None = None
    gate: Gate | None = None
    found: dict[str, Finding] | None = None


_current = _Current()
# Code objects are kept by identity: two with the same text are equal.
_counters: dict[tuple[int, str], _Counters] = {}
_demoted: dict[int, dict[str, int]] = {}
_kept: dict[int, _Code] = {}
_lock = threading.Lock()


def site_counters(
    anchor: Tensor, site: str, max_density: float = 1.0, tokens: int = 1
) -> Tensor:
    """The counters of a site of the running graph; see :func:`ops.site_counters`."""
    key = (id(_current.code), site)
    counters = _counters.get(key)
    if counters is None:
        values = torch.zeros(len(ops.COUNTERS), dtype=torch.int64, device="cpu")
        counters = _counters.setdefault(key, _Counters(values))
    counters.calls += 1
    if counters.calls % WINDOW == 0:
        _look(site, counters.values)
    return counters.values


def gpu_site_counters(
    anchor: Tensor, site: str, max_density: float = 1.0, tokens: int = 1
) -> Tensor:
    """The same on a GPU; outside of a graph that could be demoted nobody reads them."""
    if _current.gate is None:
        return ops.site_counters(anchor, site)
    return _current.gate.counters(anchor, site, max_density, tokens)


def _look(site: str, values: Tensor) -> None:
    """Note a site most of whose calls were too dense, and start a new window."""
    calls, dense_calls, kept, elements = values.tolist()
    if calls and 2 * dense_calls > calls:
        found = _current.found = _current.found or {}
        found[site] = Finding(kept / max(1, elements))
    values.zero_()


def observed(compiled: Callable[..., Any], code: _Code | None) -> Callable[..., Any]:
    """``compiled``, with its counters kept under ``code`` and demotions carried out.

    Without a code object there is nothing to compile again, and nothing is wrapped.
    """
    if code is None:
        return compiled
    _kept[id(code)] = code
    gate = Gate()

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        outer = _current.code, _current.gate
        _current.code, _current.gate = code, gate
        try:
            result = compiled(*args)
            # Not after an error: looking at a GPU would then raise another one.
            _current.found = {**(_current.found or {}), **gate.look()}
            return result
        finally:
            _current.code, _current.gate = outer
            found, _current.found = _current.found, None
            if found:
                _demote(code, found)

    return call


def _demote(code: _Code, found: Mapping[str, Finding]) -> None:
    with _lock:
        sites = _demoted.setdefault(id(code), {})
        new = {
            site: finding
            for site, finding in found.items()
            if site not in sites or finding.tokens < sites[site]
        }
        sites.update((site, finding.tokens) for site, finding in new.items())
    for site, finding in new.items():
        log.info("%s: %s; the next call recompiles it as dense", site, finding)
    if new:
        _compat.recompile_on_next_call(code)


def demoted(code: _Code | None) -> dict[str, int] | None:
    """Sites of this code object that must stay dense, and from how many tokens on.

    None without a code object: nothing could be demoted.
    """
    if code is None:
        return None
    with _lock:
        return dict(_demoted.get(id(code), {}))


def reset() -> None:
    """Forget all counters and demotions."""
    with _lock:
        _counters.clear()
        _demoted.clear()
        _kept.clear()


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
_library.impl("site_counters", site_counters, "CPU")
_library.impl("site_counters", gpu_site_counters, "CUDA")
