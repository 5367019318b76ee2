"""Which skipping sites of a GPU need too many neurons, found without waiting for it.

The kernels of a site count the neurons that its tokens need.  A replayed CUDA graph
asks for no counters again, so it is calls of the compiled graph that are counted: after
a few of them, and then ever more rarely, its counters are copied to the host, and
judged by what was added since the last time.  A site is too dense if two looks in a row
say so: what it is given back for is not forgotten, and one prompt may be unlike others.
"""

from __future__ import annotations

import dataclasses
import threading

import torch
from torch import Tensor

from inductor_sparse import ops
from inductor_sparse.runtime import device_sums
from inductor_sparse.runtime.device_sums import Copies, Sums

FIRST_LOOK = 8
"""Calls of a graph before its counters are looked at for the first time."""

MOST_CALLS = 1024
"""Calls between two looks, which begin with :data:`FIRST_LOOK` and double."""

# A CUDA graph that someone has captured adds to them even if its model is gone.
_kept_forever: list[Tensor] = []


@dataclasses.dataclass(frozen=True)
class Finding:
    """Why a site is too dense: the fraction of neurons that ``tokens`` need together.

    Without a number of tokens the fraction of activations that are not zero, whatever
    the number of tokens.
    """

    density: float
    tokens: int = 0

    def __str__(self) -> str:
        if not self.tokens:
            return f"{100 * self.density:.0f} % of its activations are not zero"
        together = f"{self.tokens} tokens together" if self.tokens > 1 else "a token"
        needs = "need" if self.tokens > 1 else "needs"
        return f"{together} {needs} {100 * self.density:.0f} % of its neurons"


@dataclasses.dataclass(eq=False)
class _Site:
    """One site on one device, and what its counters were when last looked at."""

    name: str
    sums: Sums
    max_density: float
    tokens: int
    kept: int = 0
    elements: int = 0
    suspected: bool = False

    def judge(self, counters: Tensor) -> Finding | None:
        """What was added to the counters, if it was too dense for the second time."""
        _, _, kept, elements = counters.tolist()
        added = elements - self.elements
        if not added:
            return None
        density = (kept - self.kept) / added
        self.kept, self.elements = kept, elements
        before, self.suspected = self.suspected, density > self.max_density
        return Finding(density, self.tokens) if before and self.suspected else None


class Gate:
    """The counted sites of one compiled graph."""

    def __init__(self) -> None:
        self._sites: dict[tuple[str, torch.device], _Site] = {}
        self._calls, self._next_look = 0, FIRST_LOOK
        self._copies: list[tuple[list[_Site], Copies]] = []
        self._lock = threading.Lock()

    def counters(
        self, anchor: Tensor, site: str, max_density: float, tokens: int
    ) -> Tensor:
        """The counters of a site; arguments as for :func:`ops.site_counters`.

        A site that is first met while a CUDA graph is being captured gets some that
        nobody reads: memory that outlives the graph cannot be had then.
        """
        key = (site, anchor.device)
        if key not in self._sites:
            if device_sums.is_capturing(anchor.device):
                return ops.site_counters(anchor, site)
            with self._lock:
                if key not in self._sites:
                    shape = (len(ops.COUNTERS),)
                    sums = device_sums.zeros(shape, torch.int64, anchor.device)
                    _kept_forever.append(sums.values)
                    self._sites[key] = _Site(site, sums, max_density, tokens)
        return self._sites[key].sums.values

    def look(self) -> dict[str, Finding]:
        """Sites that were found too dense; to be called after each call of the graph.

        What it asked for in an earlier call is judged; nothing is waited for.
        """
        if not self._sites:
            return {}
        self._calls += 1
        due = self._copies or self._calls >= self._next_look
        if not due or not self._lock.acquire(blocking=False):
            return {}
        try:
            if any(device_sums.is_capturing(device) for _, device in self._sites):
                return {}
            return self._judge() if self._copies else self._copy()
        finally:
            self._lock.release()

    def _copy(self) -> dict[str, Finding]:
        self._next_look = self._calls + min(self._calls, MOST_CALLS)
        states = list(self._sites.values())
        for device in dict.fromkeys(state.sums.values.device for state in states):
            here = [state for state in states if state.sums.values.device == device]
            copies = device_sums.start_copies([state.sums for state in here])
            self._copies.append((here, copies))
        return {}

    def _judge(self) -> dict[str, Finding]:
        if not all(copies.have_arrived() for _, copies in self._copies):
            return {}
        found = {
            state.name: finding
            for states, copies in self._copies
            for state, counters in zip(states, copies.values, strict=True)
            if (finding := state.judge(counters)) is not None
        }
        if any(state.suspected for states, _ in self._copies for state in states):
            self._next_look = min(self._next_look, self._calls + FIRST_LOOK)
        self._copies.clear()
        return found
