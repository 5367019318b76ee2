"""Timing on a GPU: what the device spends, not what Python does before it.

- Every variant is captured into CUDA graphs, one call per rotating input, and replayed:
  guards, wrappers and launches are no part of what is timed, on any side.
- A call whose weights would stay in the L2 cache is preceded by *reading* another
  buffer.  (Writing one would leave dirty lines, written back during the timed call.)
- A call that streams its data is repeated before the next variant has its turn, and the
  end of a turn counts: under load a GPU lowers its clock to keep within its power, to
  another clock for each variant, and does so some time after what it runs has changed.

Inside an evicting graph the clock is read by event nodes of the graph itself, so the
start of the graph is not counted.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import torch

from inductor_sparse.bench.intervals import median
from inductor_sparse.errors import SparseError

TURN_US = 100_000.0
"""How long a variant that streams its data runs before the next has its turn.

On an H200 at its power limit a matmul kept the clock of the one before for 20 to 60 ms.
"""
TURNS = 5
"""Turns of each variant; settled, they differ by less than 1 %."""
WARMUP_CALLS = 3

Call = Callable[[int], object]
Before = Callable[[], object]


class CaptureError(SparseError, RuntimeError):
    """A variant cannot be captured into a CUDA graph."""


@dataclasses.dataclass
class Captured:
    """The calls of one variant on all rotating inputs, in one CUDA graph.

    ``spans`` are the pairs of events that bracket what is timed: one pair per call if
    each is evicted before, else one pair around all ``calls``.
    """

    graph: torch.cuda.CUDAGraph
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]]
    calls: int

    def sample_us(self, replays: int) -> float:
        """Microseconds per call, the median over spans, of the last of ``replays``."""
        for _ in range(replays):
            self.graph.replay()
        torch.cuda.synchronize()
        per_span = self.calls / len(self.spans)
        times = [start.elapsed_time(end) for start, end in self.spans]
        return median(times) * 1e3 / per_span


def capture(name: str, call: Call, rotation: int, before: Before | None) -> Captured:
    """Warm a variant up on each of ``rotation`` inputs, then capture it.

    Raises:
        CaptureError: the variant does something a CUDA graph cannot hold.
    """
    for index in range(max(rotation, WARMUP_CALLS)):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    try:
        with torch.cuda.graph(graph):
            if before is None:
                spans.append(_timed(lambda: [call(i) for i in range(rotation)]))
            else:
                for index in range(rotation):
                    before()
                    spans.append(_timed(lambda index=index: call(index)))
    except RuntimeError as error:
        text = str(error).strip().splitlines()[0]
        raise CaptureError(f"{name} cannot be captured: {text}") from error
    return Captured(graph, spans, rotation)


def _timed(body: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Capture ``body`` between two event nodes."""
    # Events of the graph itself: ordinary ones would only order the capture.
    start, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
    start.record()
    body()
    end.record()
    return start, end


def interleave(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    before: Before | None = None,
    rotation: int = 1,
    min_rounds: int = 9,
    max_rounds: int = 2000,
) -> dict[str, list[float]]:
    """Time all ``calls`` in turn until the budget is spent.

    Args:
        calls: variants by name; each gets the index of the input to take.
        seconds: wall-clock budget, without the capture.
        before: run, untimed, before every timed call; without it calls follow each
            other and each turn lasts about :data:`TURN_US`.
        rotation: number of rotating inputs.
        min_rounds: rounds made even when the budget is already spent; without
            ``before`` no more than :data:`TURNS` are.
        max_rounds: rounds after which the budget no longer matters.

    Returns:
        Microseconds per call by name, in the order of the rounds.

    Raises:
        CaptureError: a variant does something a CUDA graph cannot hold.
    """
    captured = {n: capture(n, call, rotation, before) for n, call in calls.items()}
    replays = {name: _replays(one, before) for name, one in captured.items()}
    needed = min_rounds if before is not None else min(min_rounds, TURNS)
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    for round_index in range(max_rounds):
        if round_index >= needed and time.perf_counter() > deadline:
            break
        goes_on = round_index > 0 and len(captured) == 1  # its clock is settled
        for name, one in captured.items():
            times[name].append(one.sample_us(1 if goes_on else replays[name]))
    return times


def glance_us(call: Call, repeats: int = 3) -> float:
    """Microseconds per call, roughly: hardly warmed up, but of the device alone.

    Raises:
        CaptureError: the call does something a CUDA graph cannot hold.
    """
    return capture("a candidate", call, repeats, None).sample_us(replays=2)


def _replays(one: Captured, before: Before | None) -> int:
    """Replays that make a turn: the clock settles before the last, which counts."""
    one.sample_us(1)
    once = one.sample_us(1) * one.calls
    return 1 if before is not None else max(1, math.ceil(TURN_US / max(once, 1.0)))
