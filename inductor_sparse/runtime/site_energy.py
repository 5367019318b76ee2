"""How much of its activation a 2:4 site keeps, summed on the device as it runs.

The kernels that select two of four add the squares of what they keep, and of
everything, to a small tensor of their site.  :func:`site_energy` hands it out: one per
site and device, for the life of the process, because a captured CUDA graph goes on
writing to it.  Nothing here waits for the device: after its first call a site is copied
to the host in the background, and the copy is looked at when a later call finds it
there.  A site that drops too much is then reported once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_sparse import config, ops
from inductor_sparse.runtime import device_sums
from inductor_sparse.runtime.device_sums import Copies, Sums

log = logging.getLogger(__name__)

TRIES = 8
"""Looks at a site that has not added anything yet before it is left alone."""


@dataclasses.dataclass(frozen=True)
class Energy:
    """What one site has kept so far.

    ``calls`` are those of its graph; ``kept`` and ``total`` are sums of squares of the
    activation, of a large one both over the same part: only their ratio means much.
    """

    site: str
    device: str
    calls: int
    kept: float
    total: float

    @property
    def dropped(self) -> float | None:
        """The fraction of the energy that was dropped; None if none was seen, or inf.

        Its root is about the relative error of the product.
        """
        if not self.total or not math.isfinite(self.total):
            return None
        return max(0.0, 1.0 - self.kept / self.total)


@dataclasses.dataclass(eq=False)
class _Graph:
    """One compiled graph: how often it was called, and what its sites may drop."""

    limit: float
    calls: int = 0


class _Current(threading.local):
    """The graph that this thread is running."""

    graph: _Graph | None = None


@dataclasses.dataclass(eq=False)
class _Site:
    """One site on one device, and the copy of its first sums on its way to the host."""

    name: str
    sums: Sums
    limit: float
    calls: int = 0
    graphs: list[_Graph] = dataclasses.field(default_factory=list)
    tries: int = 0
    copy: Copies | None = None

    @property
    def device(self) -> torch.device:
        """Where its sums lie."""
        return self.sums.values.device

    def energy(self, values: Tensor | None) -> Energy:
        """What ``values``, a copy of the sums on the host, says; None: no sums yet."""
        kept, total = (0.0, 0.0) if values is None else values.sum(0).tolist()
        calls = self.calls + sum(graph.calls for graph in self.graphs)
        return Energy(self.name, str(self.device), calls, kept, total)


_current = _Current()
_sites: dict[tuple[str, torch.device], _Site] = {}
_unsettled: list[_Site] = []
_lock = threading.Lock()


def site_energy(anchor: Tensor, site: str) -> Tensor:
    """The energies of a site on the device of ``anchor``; see :func:`ops.site_energy`.

    A site that is first met while a CUDA graph is being captured gets energies of its
    own, which nobody reads: memory that outlives the graph cannot be had then.
    """
    key = (site, anchor.device)
    state = _sites.get(key)
    graph = _current.graph
    if state is None:
        if device_sums.is_capturing(anchor.device):
            return ops.site_energy(anchor, site)
        limit = config.max_dropped_energy if graph is None else graph.limit
        with _lock:
            if key not in _sites:
                shape = (ops.ENERGY_SLOTS, len(ops.ENERGY))
                sums = device_sums.zeros(shape, torch.float64, anchor.device)
                _sites[key] = _Site(site, sums, limit)
                _unsettled.append(_sites[key])
            state = _sites[key]
    elif graph is None and state in _unsettled:
        _look(state)
    if graph is None:
        state.calls += 1
    elif graph not in state.graphs:
        state.graphs.append(graph)
    return state.sums.values


def observed(compiled: Callable[..., Any], limit: float) -> Callable[..., Any]:
    """``compiled``, counting its calls and looking after the sites in it.

    Needed because a replayed CUDA graph does not call :func:`site_energy`.

    Args:
        compiled: a compiled graph.
        limit: the fraction of its energy that a site may drop without a warning.
    """
    graph = _Graph(limit)

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        for state in tuple(_unsettled):
            _look(state)
        graph.calls += 1
        outer, _current.graph = _current.graph, graph
        try:
            return compiled(*args)
        finally:
            _current.graph = outer

    return call


def _look(state: _Site) -> None:
    """Start the copy of a site's sums, or judge it if it has arrived."""
    if device_sums.is_capturing(state.device) or not _lock.acquire(blocking=False):
        return
    try:
        if state not in _unsettled:
            return
        if state.copy is None:
            state.copy = device_sums.start_copies([state.sums])
        elif state.copy.have_arrived():
            energy = state.energy(state.copy.values[0])
            state.copy = None
            state.tries += 1
            if energy.total or state.tries == TRIES:
                _unsettled.remove(state)
                _judge(energy, state.limit)
    finally:
        _lock.release()


def _judge(energy: Energy, limit: float) -> None:
    dropped = energy.dropped
    if dropped is None or dropped <= limit:
        return
    log.warning(
        "%s: 2:4 drops %.2f %% of the energy of its activation, more than "
        "sparse.max_dropped_energy allows (%.2f %%): its product is off by about "
        "%.0f %%. With a plan of inductor_sparse.calibrate() such sites stay dense; "
        "raise the option if the model tolerates it",
        energy.site,
        100 * dropped,
        100 * limit,
        100 * math.sqrt(dropped),
    )


def read() -> list[Energy]:
    """What every site has kept so far, in the order in which they were first met.

    Read on a stream of its own: work that the device has not come to yet is not waited
    for, and not counted.
    """
    with _lock:
        states = list(_sites.values())
    # Sums whose fill is still queued hold anything, and waiting for it would be waiting
    # for all that is queued before it.
    filled = [state for state in states if state.sums.are_filled()]
    found = {state: state.energy(None) for state in states}
    for device in dict.fromkeys(state.device for state in filled):
        here = [state for state in filled if state.device == device]
        with device_sums.own_stream(device):
            copies = device_sums.start_copies([state.sums for state in here])
        for state, copy in zip(here, copies.wait(), strict=True):
            found[state] = state.energy(copy)
    return [found[state] for state in states]


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
for _key in ("CPU", "CUDA"):
    _library.impl("site_energy", site_energy, _key)
