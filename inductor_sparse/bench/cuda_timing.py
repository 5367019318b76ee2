"""Timing on a GPU: what the device spends, not what Python does before it.

- Every variant is captured into CUDA graphs, one call per rotating input, and replayed:
  guards, wrappers and launches are no part of what is timed, on any side.
- A call whose weights would stay in the L2 cache is preceded by *reading* another
  buffer.  (Writing one would leave dirty lines, written back during the timed call.)
- A call that streams its data is repeated before the next variant has its turn, and the
  second half of a turn counts: under load a GPU lowers its clock to keep within its
  power, to another clock for each variant, and does so some time after what it runs has
  changed.

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

SETTLE_US = 60_000.0
"""How long a variant that streams its data runs before its time counts, and then again.

On an H200 at its power limit a matmul kept the clock of the one before for 20 to 60 ms.
"""
TURNS = 5
"""Turns that such a variant has even when the budget is already spent."""
MAX_REPEATS = 500
"""Of all inputs in one graph: those of short kernels stay small."""
WARMUP_CALLS = 3

Call = Callable[[int], object]
Before = Callable[[], object]


class CaptureError(SparseError, RuntimeError):
    """A variant cannot be captured into a CUDA graph."""


@dataclasses.dataclass
class Captured:
    """``calls`` of one variant on its rotating inputs, in one CUDA graph.

    ``spans`` are the pairs of events that bracket what is timed: one pair per call if
    each is evicted before, else one pair around all of them.  The clock settles in
    ``settling`` replays.
    """

    graph: torch.cuda.CUDAGraph
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]]
    calls: int
    settling: int = 0

    def sample_us(self, settled: bool = True) -> float:
        """Microseconds per call, the median over spans, once the clock has settled."""
        for _ in range(1 if settled else self.settling + 1):
            self.graph.replay()
        torch.cuda.synchronize()
        per_span = self.calls / len(self.spans)
        times = [start.elapsed_time(end) for start, end in self.spans]
        return median(times) * 1e3 / per_span


def capture(
    name: str, call: Call, rotation: int, before: Before | None, repeats: int = 1
) -> Captured:
    """Warm a variant up on each of ``rotation`` inputs, then capture it.

    Without ``before`` all the inputs have their turn ``repeats`` times.

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
                spans.append(_timed(lambda: _repeat(call, rotation, repeats)))
            else:
                for index in range(rotation):
                    before()
                    spans.append(_timed(lambda index=index: call(index)))
    except RuntimeError as error:
        text = str(error).strip().splitlines()[0]
        raise CaptureError(f"{name} cannot be captured: {text}") from error
    return Captured(graph, spans, rotation * repeats)


def _repeat(call: Call, rotation: int, repeats: int) -> None:
    for _ in range(repeats):
        results = [call(index) for index in range(rotation)]
        del results  # those of the next repetition take their place


def _capture_turn(name: str, call: Call, rotation: int) -> Captured:
    """A graph of half a turn, which settles the clock when it is first replayed."""
    short = capture(name, call, rotation, None)
    short.sample_us()
    once = max(1.0, short.sample_us() * short.calls)
    repeats = min(math.ceil(SETTLE_US / once), MAX_REPEATS)
    one = capture(name, call, rotation, None, repeats)
    one.settling = math.ceil(SETTLE_US / (once * repeats))
    return one


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
            other, and each turn is twice :data:`SETTLE_US` or longer.
        rotation: number of rotating inputs.
        min_rounds: rounds made even when the budget is already spent; without
            ``before`` no more than :data:`TURNS` are.
        max_rounds: rounds after which the budget no longer matters.

    Returns:
        Microseconds per call by name, in the order of the rounds.

    Raises:
        CaptureError: a variant does something a CUDA graph cannot hold.
    """
    if before is None:
        captured = {n: _capture_turn(n, call, rotation) for n, call in calls.items()}
        min_rounds = min(min_rounds, TURNS)
    else:
        captured = {n: capture(n, call, rotation, before) for n, call in calls.items()}
    alone = len(captured) == 1
    if before is None and not alone:
        # Capturing left the GPU idle: for a while it may exceed its power.
        for one in captured.values():
            one.sample_us(settled=False)
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    for round_index in range(max_rounds):
        if round_index >= min_rounds and time.perf_counter() > deadline:
            break
        settled = alone and round_index > 0  # nothing else had a turn in between
        for name, one in captured.items():
            times[name].append(one.sample_us(settled))
    return times


def glance_us(call: Call, repeats: int = 3) -> float:
    """Microseconds per call, roughly: hardly warmed up, but of the device alone.

    Raises:
        CaptureError: the call does something a CUDA graph cannot hold.
    """
    candidate = capture("a candidate", call, repeats, None)
    candidate.sample_us()
    return candidate.sample_us()
