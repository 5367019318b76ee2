from __future__ import annotations

import random

import pytest

from inductor_sparse.bench.intervals import Ratio, median, paired_ratio


def synthetic_pairs(
    true_ratio: float, rounds: int, seed: int
) -> tuple[list[float], list[float]]:
    """Rounds of a machine that drifts by 30 % and now and then hiccups."""
    rng = random.Random(seed)
    numerator, denominator = [], []
    for index in range(rounds):
        drift = 1.0 + 0.3 * index / rounds
        for samples, base in ((numerator, true_ratio), (denominator, 1.0)):
            hiccup = 3.0 if rng.random() < 0.05 else 1.0
            samples.append(100 * base * drift * hiccup * rng.lognormvariate(0, 0.05))
    return numerator, denominator


@pytest.mark.parametrize("true_ratio", [0.9, 1.0, 7.0])
def test_interval_covers_the_true_ratio(true_ratio: float) -> None:
    covered = 0
    for seed in range(60):
        ratio = paired_ratio(*synthetic_pairs(true_ratio, 60, seed))
        covered += ratio.low <= true_ratio <= ratio.high
    # 95 % of 60 is 57; a bootstrap over drifting pairs may err to the wide side only.
    assert covered >= 54


def test_interval_is_narrow_enough_to_tell_ten_percent() -> None:
    ratio = paired_ratio(*synthetic_pairs(1.1, 200, seed=1))
    assert ratio.verdict == "faster"
    assert ratio.high - ratio.low < 0.2


def test_interval_shrinks_with_rounds() -> None:
    few = paired_ratio(*synthetic_pairs(2.0, 10, seed=3))
    many = paired_ratio(*synthetic_pairs(2.0, 400, seed=3))
    assert many.high - many.low < few.high - few.low


def test_constant_samples_have_no_width() -> None:
    assert paired_ratio([4.0] * 9, [2.0] * 9) == Ratio(2.0, 2.0, 2.0)


def test_same_samples_give_the_same_interval() -> None:
    samples = synthetic_pairs(1.5, 30, seed=5)
    assert paired_ratio(*samples) == paired_ratio(*samples)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.01, 1.2, "faster"), (0.8, 0.99, "slower"), (0.99, 1.01, "tie")],
)
def test_verdict_follows_the_interval(low: float, high: float, verdict: str) -> None:
    assert Ratio(1.0, low, high).verdict == verdict


def test_rejects_unpaired_samples() -> None:
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        paired_ratio([1.0, 2.0], [1.0, 2.0, 3.0])


def test_rejects_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        median([])


def test_rejects_a_stopped_clock() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        paired_ratio([1.0, 1.0], [0.0, 0.0])
