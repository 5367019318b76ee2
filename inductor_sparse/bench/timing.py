"""Alternating timing of variants in one process.

Lessons built in, each learnt from a published benchmark that went wrong:

- variants alternate (A B A B ...), so that drift of the machine cancels in the ratio;
- inputs rotate, so that no variant reads the same activations (and so, for a sparse
  one, the same weight rows) twice in a row;
- weights small enough to stay in cache between calls are evicted before each timed
  call, because in a model the other layers would have evicted them;
- warm-up and the clock's start and stop are outside of what is counted, and the garbage
  collector is off.

On a GPU the clock is that of the device: see :mod:`inductor_sparse.bench.cuda_timing`.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from inductor_sparse.bench import cuda_timing
from inductor_sparse.bench.intervals import median

DEFAULT_CACHE_BYTES = 32 * 2**20
STREAMING_FACTOR = {"cpu": 4, "cuda": 2}
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
    """Fills the last-level cache with something else when called.

    Args:
        working_set_bytes: what the timed call reads; far above the cache size the call
            evicts its own data and nothing is done.
        device: of the timed call; its own last-level cache is the one that counts.
        always: evict whatever the size, for calls that read only a part of their data.
    """

    def __init__(
        self, working_set_bytes: int, device: str = "cpu", always: bool = False
    ) -> None:
        cache_bytes = cache_bytes_of(device)
        streams = working_set_bytes >= STREAMING_FACTOR[device] * cache_bytes
        needed = always or not streams
        self._buffer = torch.zeros(
            2 * cache_bytes if needed else 0, dtype=torch.uint8, device=device
        )
        self._sum = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def mode(self) -> str:
        """``evicted`` or ``streamed``: how the row says its weights left the cache."""
        return "evicted" if self._buffer.numel() else "streamed"

    @property
    def before(self) -> Callable[[], None] | None:
        """What to run before a timed call; ``None`` in ``streamed`` mode."""
        return self if self._buffer.numel() else None

    def __call__(self) -> None:
        """Evict, or do nothing in ``streamed`` mode."""
        if self._buffer.device.type == "cpu":
            self._buffer.add_(1)
        elif self._buffer.numel():
            torch.sum(self._buffer.view(torch.int64), dim=0, out=self._sum)


def cache_bytes_of(device: str) -> int:
    """Size of the last-level cache of the CPU or of the current GPU."""
    if device != "cuda":
        return last_level_cache_bytes()
    return torch.cuda.get_device_properties().L2_cache_size


def time_us(call: Call, round_index: int) -> float:
    """Wall time of one call on the CPU in microseconds."""
    start = time.perf_counter_ns()
    call(round_index)
    return (time.perf_counter_ns() - start) / 1e3


def interleave(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    device: str = "cpu",
    before: Callable[[], None] | None = None,
    rotation: int = 1,
    min_rounds: int = 9,
    max_rounds: int = 2000,
) -> dict[str, list[float]]:
    """Time all ``calls`` alternately until the budget is spent.

    Args:
        calls: variants by name; each gets the round's index, to choose its input.
        seconds: wall-clock budget, ``before`` included.
        device: ``cpu`` or ``cuda``.
        before: run, untimed, before every timed call.
        rotation: number of rotating inputs; on a GPU each is captured once.
        min_rounds: rounds made even when the budget is already spent.
        max_rounds: rounds after which the budget no longer matters.

    Returns:
        Microseconds per call by name, in the order of the rounds.
    """
    if device == "cuda":
        return cuda_timing.interleave(
            calls,
            seconds=seconds,
            before=before,
            rotation=rotation,
            min_rounds=min_rounds,
            max_rounds=max_rounds,
        )
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    with _no_garbage_collection():
        for round_index in range(max_rounds):
            if round_index >= min_rounds and time.perf_counter() > deadline:
                break
            for name, call in calls.items():
                if before is not None:
                    before()
                times[name].append(time_us(call, round_index))
    return times


def screen_us(
    call: Call,
    *,
    seconds: float,
    device: str = "cpu",
    before: Callable[[], None] | None = None,
    rotation: int = 1,
) -> float:
    """A quick median in microseconds, enough to choose among candidates."""
    times = interleave(
        {"candidate": call},
        seconds=seconds,
        device=device,
        before=before,
        rotation=rotation,
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
