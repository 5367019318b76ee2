"""Alternating timing of variants in one process.

Lessons built in, each learnt from a published benchmark that went wrong:

- variants alternate (A B A B ...), so that drift of the machine cancels in the ratio;
- inputs rotate, so that no variant reads the same activations (and so, for a sparse
  one, the same weight rows) twice in a row;
- weights small enough to stay in cache between calls are evicted before each timed
  call, because in a model the other layers would have evicted them;
- warm-up and the clock's start and stop are outside of what is counted, and the garbage
  collector is off.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from inductor_sparse.bench.intervals import median

DEFAULT_CACHE_BYTES = 32 * 2**20
STREAMING_FACTOR = 4
"""Weights this many times larger than the last-level cache evict themselves."""

Call = Callable[[int], object]
"""Runs a variant once on the input of the given round."""


def last_level_cache_bytes(
    root: Path = Path("/sys/devices/system/cpu/cpu0/cache"),
) -> int:
    """Size of the largest cache of CPU 0, or 32 MiB where the system does not tell."""
    sizes = []
    for path in root.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=DEFAULT_CACHE_BYTES)


class Evictor:
    """Overwrites a buffer twice the last-level cache when called.

    Args:
        working_set_bytes: what the timed call reads; far above the cache size the call
            evicts its own data and nothing is done.
        device: of the timed call; caches of devices other than a CPU are not touched.
    """

    def __init__(self, working_set_bytes: int, device: str = "cpu") -> None:
        cache_bytes = last_level_cache_bytes()
        needed = working_set_bytes < STREAMING_FACTOR * cache_bytes and device == "cpu"
        self._buffer = torch.zeros(2 * cache_bytes if needed else 0, dtype=torch.uint8)

    @property
    def mode(self) -> str:
        """``evicted`` or ``streamed``: how the row says its weights left the cache."""
        return "evicted" if self._buffer.numel() else "streamed"

    def __call__(self) -> None:
        """Evict, or do nothing in ``streamed`` mode."""
        self._buffer.add_(1)


def time_us(call: Call, round_index: int, device: str = "cpu") -> float:
    """Wall time of one call in microseconds, the device idle at both ends."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter_ns()
    call(round_index)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / 1e3


def interleave(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    device: str = "cpu",
    before: Callable[[], None] = lambda: None,
    min_rounds: int = 9,
    max_rounds: int = 2000,
) -> dict[str, list[float]]:
    """Time all ``calls`` alternately until the budget is spent.

    Args:
        calls: variants by name; each gets the round's index, to choose its input.
        seconds: wall-clock budget, ``before`` included.
        device: ``cpu`` or ``cuda``.
        before: run, untimed, before every timed call.
        min_rounds: rounds made even when the budget is already spent.
        max_rounds: rounds after which the budget no longer matters.

    Returns:
        Microseconds per call by name, in the order of the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    with _no_garbage_collection():
        for round_index in range(max_rounds):
            if round_index >= min_rounds and time.perf_counter() > deadline:
                break
            for name, call in calls.items():
                before()
                times[name].append(time_us(call, round_index, device))
    return times


def screen_us(
    call: Call,
    *,
    seconds: float,
    device: str = "cpu",
    before: Callable[[], None] = lambda: None,
) -> float:
    """A quick median in microseconds, enough to choose among candidates."""
    times = interleave(
        {"candidate": call},
        seconds=seconds,
        device=device,
        before=before,
        min_rounds=5,
        max_rounds=50,
    )
    return median(times["candidate"])


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect once, then keep the collector off inside the block."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
