from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

from inductor_sparse.bench.timing import (
    DEFAULT_CACHE_BYTES,
    Evictor,
    interleave,
    last_level_cache_bytes,
    screen_us,
    time_us,
)


def test_variants_alternate_on_rotating_rounds() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: lambda i, name=name: seen.append((name, i)) for name in "ab"}
    interleave(calls, seconds=0.0, min_rounds=3)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_budget_ends_the_rounds() -> None:
    start = time.perf_counter()
    times = interleave({"a": lambda _: time.sleep(0.01)}, seconds=0.2, min_rounds=2)
    assert 0.15 < time.perf_counter() - start < 2.0
    assert 2 <= len(times["a"]) <= 25


def test_rounds_are_capped() -> None:
    times = interleave({"a": lambda _: None}, seconds=60.0, max_rounds=20)
    assert len(times["a"]) == 20


def test_before_runs_untimed_before_every_call() -> None:
    order: list[str] = []

    def before() -> None:
        order.append("before")
        time.sleep(0.02)

    times = interleave(
        {"a": lambda _: order.append("a")}, seconds=0.0, before=before, min_rounds=2
    )
    assert order == ["before", "a", "before", "a"]
    assert max(times["a"]) < 10_000


def test_times_are_microseconds() -> None:
    assert 4_900 < time_us(lambda _: time.sleep(0.005), 0) < 500_000
    assert 4_900 < screen_us(lambda _: time.sleep(0.005), seconds=0.0) < 500_000


def test_collector_is_off_inside_and_back_on_after() -> None:
    states: list[bool] = []
    interleave({"a": lambda _: states.append(gc.isenabled())}, seconds=0, min_rounds=1)
    assert states == [False]
    assert gc.isenabled()


def test_collector_is_back_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda i: 1 // i}, seconds=0.0)
    assert gc.isenabled()


def test_cache_size_is_read_from_the_system(tmp_path: Path) -> None:
    for index, size in enumerate(["32K", "1024K", "65536K", "odd"]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(size + "\n")
    assert last_level_cache_bytes(tmp_path) == 64 * 2**20


def test_cache_size_has_a_default(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path) == DEFAULT_CACHE_BYTES


def test_small_weights_are_evicted_and_large_ones_are_not() -> None:
    assert Evictor(working_set_bytes=1024).mode == "evicted"
    assert Evictor(working_set_bytes=2**40).mode == "streamed"
    assert Evictor(working_set_bytes=2**40, always=True).mode == "evicted"
    assert Evictor(working_set_bytes=2**40).before is None
