from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from inductor_sparse.bench import cuda_timing, timing
from inductor_sparse.bench.cuda_timing import Captured


class Span:
    """Stands for an event; ``elapsed_time`` is in milliseconds, as torch's is."""

    def __init__(self, milliseconds: float = 0.0) -> None:
        self.milliseconds = milliseconds

    def elapsed_time(self, end: Span) -> float:
        return end.milliseconds - self.milliseconds


@dataclasses.dataclass
class Graph:
    """Counts its replays."""

    replays: int = 0

    def replay(self) -> None:
        self.replays += 1


def captured(calls: int, *milliseconds: float) -> Captured:
    """A graph of ``calls`` whose spans take ``milliseconds``."""
    spans: Any = [(Span(), Span(one)) for one in milliseconds]
    graph: Any = Graph()
    return Captured(graph, spans, calls)


GRAPHS = {"a": captured(1, 6.0), "b": captured(1, 13.0)}


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)


def test_calls_without_eviction_share_one_span() -> None:
    assert captured(4, 2.0).sample_us(replays=1) == 500.0


def test_evicted_calls_have_a_span_each() -> None:
    assert captured(3, 0.010, 0.012, 0.050).sample_us(replays=1) == pytest.approx(12.0)


def test_a_turn_lasts_until_the_clock_has_settled() -> None:
    one = captured(2, 3.0)
    assert cuda_timing._replays(one, before=None) == 34
    assert cuda_timing._replays(one, before=lambda: None) == 1


Seen = list[tuple[str, int, Any]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What was captured, into the graphs of :data:`GRAPHS`."""
    made: Seen = []

    def capture(name: str, call: Any, rotation: int, before: Any) -> Captured:
        made.append((name, rotation, before))
        return GRAPHS[name]

    monkeypatch.setattr(cuda_timing, "capture", capture)
    for one in GRAPHS.values():
        monkeypatch.setattr(one.graph, "replays", 0)
    return made


def replays(name: str) -> int:
    graph: Any = GRAPHS[name].graph
    return graph.replays


def test_variants_take_turns(seen: Seen) -> None:
    times = timing.interleave(
        {"a": print, "b": print}, seconds=0, device="cuda", rotation=3, min_rounds=2
    )
    assert seen == [("a", 3, None), ("b", 3, None)]
    assert times == {"a": [6000.0] * 2, "b": [13000.0] * 2}
    # Two replays measure the length of a turn: 17 of 6 ms, 8 of 13 ms.
    assert [replays(name) for name in "ab"] == [2 + 2 * 17, 2 + 2 * 8]


@pytest.mark.usefixtures("seen")
def test_what_follows_itself_has_settled() -> None:
    times = timing.interleave({"a": print}, seconds=0, device="cuda", min_rounds=3)
    assert times == {"a": [6000.0] * 3}
    assert replays("a") == 2 + 17 + 1 + 1


@pytest.mark.usefixtures("seen")
def test_turns_are_few_where_the_clock_settles() -> None:
    call = {"a": print, "b": print}
    settled = timing.interleave(call, seconds=0, device="cuda", min_rounds=9)
    assert len(settled["a"]) == cuda_timing.TURNS
    evicted = timing.interleave(
        call, seconds=0, device="cuda", min_rounds=9, before=lambda: None
    )
    assert len(evicted["a"]) == 9
