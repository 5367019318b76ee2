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


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)


def test_calls_without_eviction_share_one_span() -> None:
    assert captured(4, 2.0).sample_us() == 500.0


def test_evicted_calls_have_a_span_each() -> None:
    assert captured(3, 0.010, 0.012, 0.050).sample_us() == pytest.approx(12.0)


@dataclasses.dataclass
class Device:
    """What is captured takes a number of milliseconds per call."""

    milliseconds: dict[str, float]
    captures: list[tuple[str, int, Any, int]] = dataclasses.field(default_factory=list)
    graphs: dict[str, Captured] = dataclasses.field(default_factory=dict)

    def capture(
        self, name: str, call: Any, rotation: int, before: Any, repeats: int = 1
    ) -> Captured:
        self.captures.append((name, rotation, before, repeats))
        calls = rotation * repeats
        self.graphs[name] = captured(calls, self.milliseconds[name] * calls)
        return self.graphs[name]

    def replays(self, name: str) -> int:
        graph: Any = self.graphs[name].graph
        return graph.replays


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device({"a": 6.0, "b": 13.0, "long": 70.0, "short": 0.001})
    monkeypatch.setattr(cuda_timing, "capture", made.capture)
    return made


def interleave(*names: str, **more: Any) -> dict[str, list[float]]:
    calls = dict.fromkeys(names, print)
    return timing.interleave(calls, seconds=0, device="cuda", **more)


def test_variants_take_turns(device: Device) -> None:
    times = interleave("a", "b", "long", rotation=3, min_rounds=2)
    # The first capture tells how long the second has to be: 60 ms or a little more.
    assert device.captures == [
        *(("a", 3, None, 1), ("a", 3, None, 4)),
        *(("b", 3, None, 1), ("b", 3, None, 2)),
        *(("long", 3, None, 1), ("long", 3, None, 1)),
    ]
    assert times == {"a": [6000.0] * 2, "b": [13000.0] * 2, "long": [70000.0] * 2}
    # The first of two replays settles the clock, and the first turn does not count.
    assert [device.replays(name) for name in ("a", "b", "long")] == [2 + 4] * 3


def test_graphs_stay_small(device: Device) -> None:
    interleave("short", "a", min_rounds=2)
    assert device.captures[1] == ("short", 1, None, cuda_timing.MAX_REPEATS)
    assert device.replays("short") == 3 * (60_000 // 500 + 1)


def test_what_follows_itself_has_settled(device: Device) -> None:
    times = interleave("a", min_rounds=3)
    assert times == {"a": [6000.0] * 3}
    assert device.replays("a") == 2 + 1 + 1


def test_turns_are_few_where_the_clock_settles(device: Device) -> None:
    assert len(interleave("a", "b", min_rounds=9)["a"]) == cuda_timing.TURNS
    evicted = interleave("a", "b", min_rounds=9, before=print)
    assert evicted["a"] == [6000.0] * 9
    assert device.replays("a") == 9
