"""Ratios of medians with their intervals: what may be said after two timings.

Two variants are timed alternately, so that each round gives a *pair* and slow drift of
the machine (clock, neighbours) hits both sides of a pair alike.  The interval therefore
resamples whole rounds, never the two sides on their own.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of two medians and its 95 % interval, ``low <= value <= high``."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``faster``, ``slower``, or ``tie`` where the interval holds 1."""
        if self.low > 1.0:
            return "faster"
        return "slower" if self.high < 1.0 else "tie"


def median(samples: Sequence[float]) -> float:
    """The middle of ``samples`` (mean of the two middles for an even count).

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("the median of no samples is undefined")
    return statistics.median(samples)


def paired_ratio(
    numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0
) -> Ratio:
    """``median(numerator) / median(denominator)`` with a bootstrap interval.

    Args:
        numerator: times of one variant, one per round, in any unit.
        denominator: times of the other variant in the same rounds and unit.
        seed: of the resampling, so that a row can be recomputed exactly.

    Returns:
        The ratio with the 2.5 % and 97.5 % quantiles of the same ratio over rounds
        drawn with replacement (percentile bootstrap, Efron 1979).

    Raises:
        ValueError: the sequences differ in length, are empty, or hold a time <= 0.
    """
    import torch

    if len(numerator) != len(denominator):
        raise ValueError(
            f"paired samples must have one length, got {len(numerator)} and "
            f"{len(denominator)}"
        )
    value = median(numerator) / _positive(median(denominator))
    rounds = len(numerator)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(rounds, (RESAMPLES, rounds), generator=generator)
    pairs = torch.tensor([list(numerator), list(denominator)], dtype=torch.float64)
    # [2, resamples, rounds] reduced in two steps to keep the peak at one gather.
    medians = [_row_medians(side[draw]) for side in pairs]
    ratios = (medians[0] / medians[1]).sort().values
    tail = (1.0 - CONFIDENCE) / 2.0
    low = ratios[int(tail * RESAMPLES)].item()
    high = ratios[int((1.0 - tail) * RESAMPLES)].item()
    return Ratio(value, min(low, value), max(high, value))


def _positive(time: float) -> float:
    """``time``, refused when a clock gave nothing to divide by."""
    if time <= 0.0:
        raise ValueError(f"a median time must be positive, got {time}")
    return time


def _row_medians(samples: torch.Tensor) -> torch.Tensor:
    """Median of each row, averaging the two middles as :func:`median` does."""
    ordered = samples.sort(dim=1).values
    rounds = samples.shape[1]
    return (ordered[:, (rounds - 1) // 2] + ordered[:, rounds // 2]) / 2.0
