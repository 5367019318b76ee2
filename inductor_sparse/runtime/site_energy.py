"""How much of its activation a 2:4 site keeps, summed on the device as it runs.

The kernels that select two of four add the squares of what they keep, and of
everything, to a small tensor of their site.  :func:`site_energy` hands it out: one per
site and device of each compiled graph and each model that runs it, for the life of the
process, because a captured CUDA graph goes on writing to it.  Nothing here waits for
the device: behind its first call a site is copied to the host in the background, and
the copy is looked at when a later call finds it there.  A site that drops too much is
then reported once, as is one of which nothing can be said.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inductor_sparse import config, ops
from inductor_sparse.runtime import device_sums
from inductor_sparse.runtime.device_sums import Copies, Sums

log = logging.getLogger(__name__)

TRIES = 8
"""Looks at a site that has not added anything yet before it is left alone."""

MOST_MODELS = 16
"""Models of one compiled graph that are told apart; any others count as the last."""


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

    def plus(self, other: Energy) -> Energy:
        """This and what a site of the same name has kept in another model."""
        return dataclasses.replace(
            self,
            calls=self.calls + other.calls,
            kept=self.kept + other.kept,
            total=self.total + other.total,
        )


@dataclasses.dataclass(eq=False)
class _Model:
    """A model that a compiled graph runs: how often, and what its sites may drop."""

    limit: float
    calls: int = 0


class _Current(threading.local):
    """The model whose compiled graph this thread is running."""

    model: _Model | None = None


@dataclasses.dataclass(eq=False)
class _Site:
    """One site on one device, and the copy of its first sums on its way to the host."""

    name: str
    sums: Sums
    limit: float
    model: _Model | None
    calls: int = 0
    tries: int = 0
    copy: Copies | None = None

    @property
    def device(self) -> torch.device:
        """Where its sums lie."""
        return self.sums.values.device

    def energy(self, values: Tensor | None) -> Energy:
        """What ``values``, a copy of the sums on the host, says; None: no sums yet."""
        kept, total = (0.0, 0.0) if values is None else values.sum(0).tolist()
        calls = self.calls if self.model is None else self.model.calls
        return Energy(self.name, str(self.device), calls, kept, total)


_current = _Current()
_sites: dict[tuple[_Model | None, str, torch.device], _Site] = {}
_unsettled: list[_Site] = []
_lock = threading.Lock()


def site_energy(anchor: Tensor, site: str) -> Tensor:
    """The energies of a site on the device of ``anchor``; see :func:`ops.site_energy`.

    A site that is first met while a CUDA graph is being captured gets energies of its
    own, which nobody reads: memory that outlives the graph cannot be had then.
    """
    model = _current.model
    state = _sites.get((model, site, anchor.device))
    if state is None:
        if device_sums.is_capturing(anchor.device):
            return ops.site_energy(anchor, site)
        state = _begin(model, site, anchor.device)
    elif model is None and state in _unsettled:
        _look(state)
    if model is None:
        state.calls += 1
    return state.sums.values


def _begin(model: _Model | None, site: str, device: torch.device) -> _Site:
    """The state of a site that may be new; not while a CUDA graph is captured."""
    limit = config.max_dropped_energy if model is None else model.limit
    key = (model, site, device)
    with _lock:
        if key not in _sites:
            shape = (ops.ENERGY_SLOTS, len(ops.ENERGY))
            sums = device_sums.zeros(shape, torch.float64, device)
            _sites[key] = _Site(site, sums, limit, model)
            _unsettled.append(_sites[key])
        return _sites[key]


class _Models:
    """The models that share one compiled graph, known by their first parameter.

    Dynamo compiles once for all models of a class, and hands the graph the parameters
    of the one that is called.
    """

    def __init__(self, limit: float, example_inputs: Iterable[Any]) -> None:
        self._limit = limit
        self._position = next(
            (i for i, x in enumerate(example_inputs) if isinstance(x, nn.Parameter)),
            None,
        )
        self._models: list[_Model] = []
        self._known: dict[int, tuple[Callable[[], Any], _Model]] = {}

    def called(self, args: Sequence[Any]) -> _Model:
        """The model that calls the graph with ``args``."""
        parameter = None if self._position is None else args[self._position]
        reference, model = self._known.get(id(parameter), (object, None))
        if model is None or reference() is not parameter:
            model = self._meet(parameter)
        return model

    def _meet(self, parameter: Tensor | None) -> _Model:
        """A model for a parameter that was not seen yet, with energies of its own.

        They are made before it runs: a CUDA graph may be captured for it at once.
        """
        with _lock:
            if len(self._models) < MOST_MODELS:
                self._models.append(_Model(self._limit))
            model = self._models[-1]
            reference = (lambda: None) if parameter is None else weakref.ref(parameter)
            living = {i: met for i, met in self._known.items() if met[0]() is not None}
            self._known = {**living, id(parameter): (reference, model)}
        for other, site, device in tuple(_sites):
            if other is self._models[0] and not device_sums.is_capturing(device):
                _begin(model, site, device)
        return model


def observed(
    compiled: Callable[..., Any], limit: float, example_inputs: Iterable[Any] = ()
) -> Callable[..., Any]:
    """``compiled``, counting its calls and looking after the sites in it.

    Needed because a replayed CUDA graph does not call :func:`site_energy`.

    Args:
        compiled: a compiled graph.
        limit: the fraction of its energy that a site may drop without a warning.
        example_inputs: what it was compiled for; parameters tell its models apart.
    """
    models = _Models(limit, example_inputs)

    def look() -> None:
        for state in tuple(_unsettled):
            _look(state)

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        look()
        model = models.called(args)
        model.calls += 1
        outer, _current.model = _current.model, model
        try:
            result = compiled(*args)
        finally:
            _current.model = outer
        look()
        return result

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
    if not math.isfinite(energy.total):
        log.warning(
            "%s: what 2:4 drops of its activation cannot be measured: that holds NaN, "
            "Inf, or values whose squares overflow",
            energy.site,
        )
    if dropped is None or dropped <= limit:
        return
    log.warning(
        "%s: 2:4 drops %.2f %% of the energy of its activation, more than "
        "sparse.max_dropped_energy allows (%.2f %%): the relative error of its product "
        "is about %.0f %%. With a plan made by inductor_sparse.calibrate() such sites "
        "are not packed; raise the option if the model tolerates the error",
        energy.site,
        100 * dropped,
        100 * limit,
        100 * math.sqrt(dropped),
    )


def read() -> list[Energy]:
    """What every site has kept so far, in the order in which they were first met.

    Sites of the same name and device are added up, whichever model they belong to.
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
    added: dict[tuple[str, str], Energy] = {}
    for energy in (found[state] for state in states):
        key = (energy.site, energy.device)
        added[key] = added[key].plus(energy) if key in added else energy
    return list(added.values())


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
for _key in ("CPU", "CUDA"):
    _library.impl("site_energy", site_energy, _key)
