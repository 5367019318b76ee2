"""Sites that turn out too dense at run time go back to dense, for good.

A kernel counts the calls of its site, and those whose activation was too dense for
skipping to win.  ``site_counters`` hands it the counters, and every so often looks at
them.  A site that is mostly too dense is *demoted*: the code object of its graph is
given back to Dynamo, whose next call compiles it again with that site left dense, at
exactly the speed it would have had.
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
from inductor_sparse.decisions import Reason

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
    found: dict[str, float] | None = None


_current = _Current()
# Code objects are kept by identity: two with the same text are equal.
_counters: dict[tuple[int, str], _Counters] = {}
_demoted: dict[int, dict[str, Reason]] = {}
_kept: dict[int, _Code] = {}
_lock = threading.Lock()


def site_counters(anchor: Tensor, site: str) -> Tensor:
    """The counters of a site of the running graph; see :func:`ops.site_counters`."""
    key = (id(_current.code), site)
    counters = _counters.get(key)
    if counters is None:
        values = torch.zeros(len(ops.COUNTERS), dtype=torch.int64)
        counters = _counters.setdefault(key, _Counters(values))
    counters.calls += 1
    if counters.calls % WINDOW == 0:
        _look(site, counters.values)
    return counters.values


def _look(site: str, values: Tensor) -> None:
    """Note a site most of whose calls were too dense, and start a new window."""
    calls, dense_calls, kept, elements = values.tolist()
    if calls and 2 * dense_calls > calls:
        found = _current.found = _current.found or {}
        found[site] = kept / max(1, elements)
    values.zero_()


def observed(compiled: Callable[..., Any], code: _Code | None) -> Callable[..., Any]:
    """``compiled``, with its counters kept under ``code`` and demotions carried out.

    Without a code object there is nothing to compile again, and nothing is wrapped.
    """
    if code is None:
        return compiled
    _kept[id(code)] = code

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        outer = _current.code
        _current.code = code
        try:
            return compiled(*args)
        finally:
            _current.code = outer
            if _current.found:
                _demote(code, _current.found)
                _current.found = None

    return call


def _demote(code: _Code, found: Mapping[str, float]) -> None:
    with _lock:
        sites = _demoted.setdefault(id(code), {})
        new = {site: density for site, density in found.items() if site not in sites}
        sites.update(dict.fromkeys(new, Reason.TOO_DENSE))
    for site, density in new.items():
        log.info(
            "%s: %.0f %% of its activations are not zero; it goes back to dense",
            site,
            100 * density,
        )
    if new:
        _compat.recompile_on_next_call(code)


def demoted(code: _Code | None) -> dict[str, Reason]:
    """Sites of this code object that must stay dense, and why."""
    with _lock:
        return dict(_demoted.get(id(code), {})) if code is not None else {}


def reset() -> None:
    """Forget all counters and demotions."""
    with _lock:
        _counters.clear()
        _demoted.clear()
        _kept.clear()


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
_library.impl("site_counters", site_counters, "CPU")
