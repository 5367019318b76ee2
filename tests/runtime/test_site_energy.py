"""Sites that drop too much are named once, and every site can be asked."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inductor_sparse import config, ops
from inductor_sparse.runtime import device_sums, site_energy
from inductor_sparse.runtime.device_sums import Sums

DOWN, UP = "layers.0.down:64x16", "layers.0.up:16x64"
OP = torch.ops.inductor_sparse.site_energy
ANCHOR = torch.zeros(1)


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_energy, "_sites", {})
    monkeypatch.setattr(site_energy, "_unsettled", [])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been logged as a warning so far."""
    caplog.set_level(logging.WARNING, site_energy.log.name)
    return lambda: [record.getMessage() for record in caplog.records]


def kernel(site: str, kept: float, total: float, row: int = 3) -> Tensor:
    """What a kernel of a site does: it adds to one row."""
    energy = OP(ANCHOR, site)
    energy[row] += torch.tensor([kept, total], dtype=torch.float64)
    return energy


def test_energies_are_kept_for_each_site() -> None:
    energy = kernel(DOWN, 3, 4)
    assert energy.shape == (ops.ENERGY_SLOTS, len(ops.ENERGY))
    assert energy.dtype == torch.float64
    kernel(UP, 1, 1)
    kernel(DOWN, 3, 5, row=200)
    down, up = site_energy.read()
    assert down == site_energy.Energy(DOWN, "cpu", calls=2, kept=6.0, total=9.0)
    assert up == site_energy.Energy(UP, "cpu", calls=1, kept=1.0, total=1.0)
    assert down.dropped == pytest.approx(1 / 3)
    assert up.dropped == 0


@pytest.mark.parametrize("total", [0.0, math.inf, math.nan])
def test_without_a_finite_energy_nothing_is_dropped(total: float) -> None:
    assert site_energy.Energy(DOWN, "cpu", 1, 0.0, total).dropped is None


def test_a_site_that_drops_too_much_is_named_once(
    said: Callable[[], list[str]],
) -> None:
    with config.patch(max_dropped_energy=0.05):
        for _ in range(5):
            kernel(DOWN, 90, 100)
            kernel(UP, 96, 100)
    (message,) = said()
    assert message.startswith(f"{DOWN}: 2:4 drops 10.00 % of the energy")
    assert "sparse.max_dropped_energy allows (5.00 %)" in message
    assert "the relative error of its product is about 32 %" in message
    assert "inductor_sparse.calibrate()" in message


def test_only_the_first_call_counts(said: Callable[[], list[str]]) -> None:
    kernel(DOWN, 1000, 1000)
    for _ in range(4):
        kernel(DOWN, 0, 1000)
    assert said() == []


def test_a_graph_looks_after_its_sites(said: Callable[[], list[str]]) -> None:
    calls: list[None] = []

    def compiled() -> int:
        # As a CUDA graph: from the second call on only the kernels run.
        if not calls:
            kernel(DOWN, 80, 100)
        calls.append(None)
        return len(calls)

    graph = site_energy.observed(compiled, limit=0.1)
    assert [graph() for _ in range(4)] == [1, 2, 3, 4]
    (message,) = said()
    assert "drops 20.00 %" in message
    assert "allows (10.00 %)" in message
    assert site_energy.read()[0].calls == 4


def test_the_second_call_tells_of_the_first(said: Callable[[], list[str]]) -> None:
    graph = site_energy.observed(lambda: kernel(DOWN, 80, 100), limit=0.1)
    graph()
    assert said() == []
    graph()
    assert len(said()) == 1


@pytest.mark.parametrize("total", [math.nan, math.inf])
def test_a_site_of_which_nothing_can_be_said_is_named_once(
    total: float, said: Callable[[], list[str]]
) -> None:
    graph = site_energy.observed(lambda: kernel(DOWN, total, total), limit=0.1)
    for _ in range(4):
        graph()
    (message,) = said()
    assert message.startswith(f"{DOWN}: what 2:4 drops of its activation cannot be")
    assert "NaN, Inf, or values whose squares overflow" in message


def test_graphs_with_the_same_site_are_judged_apart(
    said: Callable[[], list[str]],
) -> None:
    faithful = site_energy.observed(lambda: kernel(DOWN, 1000, 1000), limit=0.1)
    for _ in range(3):
        faithful()
    assert said() == []
    lossy = site_energy.observed(lambda: kernel(DOWN, 50, 100), limit=0.1)
    for _ in range(3):
        lossy()
    (message,) = said()
    assert "drops 50.00 %" in message
    (both,) = site_energy.read()
    assert both == site_energy.Energy(DOWN, "cpu", calls=6, kept=3150.0, total=3300.0)


class Scaled(nn.Module):
    """A model with a parameter; the backend of :func:`compile_once` runs its kernel."""

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.tensor(kept))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept


@pytest.fixture
def compiled_graphs() -> Iterator[list[Callable[..., Any]]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def as_cuda_graphs(
    graphs: list[Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """A backend whose graphs are captured at the first call of every further model."""

    def backend(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        seen: dict[int, Tensor] = {}

        def compiled(*args: Any) -> Any:
            kept = next(x for x in args if isinstance(x, nn.Parameter))
            if id(kept) not in seen:
                capturing = bool(seen)
                monkeypatch.setattr(device_sums, "is_capturing", lambda _: capturing)
                seen[id(kept)] = OP(ANCHOR, DOWN)
                monkeypatch.setattr(device_sums, "is_capturing", lambda _: False)
            seen[id(kept)][0] += torch.tensor([kept.item(), 100.0])
            return gm.forward(*args)

        graphs.append(site_energy.observed(compiled, 0.1, inputs))
        return graphs[-1]

    return backend


def test_models_that_share_a_graph_are_judged_apart(
    said: Callable[[], list[str]],
    compiled_graphs: list[Callable[..., Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = as_cuda_graphs(compiled_graphs, monkeypatch)
    with torch.no_grad():
        for kept in (100.0, 60.0):
            model = torch.compile(Scaled(kept), backend=backend)
            for _ in range(3):
                model(ANCHOR)
    assert len(compiled_graphs) == 1
    (message,) = said()
    assert "drops 40.00 %" in message
    (both,) = site_energy.read()
    assert (both.calls, both.kept, both.total) == (6, 480.0, 600.0)


def test_only_so_many_models_of_a_graph_are_told_apart() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(site_energy.MOST_MODELS + 5)]
    graph = site_energy.observed(lambda _: kernel(DOWN, 1, 1), 0.1, weights[:1])
    for _ in range(2):
        for weight in weights:
            graph(weight)
    assert len(site_energy._sites) == site_energy.MOST_MODELS
    (together,) = site_energy.read()
    assert (together.calls, together.total) == (2 * len(weights), 2 * len(weights))


def test_a_graph_that_fails_is_left(said: Callable[[], list[str]]) -> None:
    def compiled() -> None:
        kernel(DOWN, 80, 100)
        raise ZeroDivisionError

    graph = site_energy.observed(compiled, limit=1.0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            graph()
    kernel(UP, 1, 1)
    down, up = site_energy.read()
    assert (down.calls, up.calls) == (3, 1)
    assert said() == []


def test_a_site_that_adds_nothing_is_left_alone() -> None:
    for _ in range(2 * site_energy.TRIES):
        OP(ANCHOR, DOWN)
    assert site_energy._unsettled != []
    OP(ANCHOR, DOWN)
    assert site_energy._unsettled == []


def test_a_late_energy_is_judged(said: Callable[[], list[str]]) -> None:
    for _ in range(4):
        OP(ANCHOR, DOWN)
    for _ in range(3):
        kernel(DOWN, 50, 100)
    (message,) = said()
    assert "drops 50.00 %" in message


class Fill:
    """The event behind a zero fill that the device comes to when it is told to."""

    done = False

    def query(self) -> bool:
        return self.done


def test_sums_are_not_read_before_their_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(UP, 1, 1)
    fill, garbage = Fill(), torch.full((ops.ENERGY_SLOTS, 2), 5.0, dtype=torch.float64)
    monkeypatch.setattr(device_sums, "zeros", lambda *_: Sums(garbage, fill))
    OP(ANCHOR, DOWN)
    up, down = site_energy.read()
    assert (up.total, down.calls, down.kept, down.total) == (1, 1, 0, 0)
    fill.done = True
    garbage.zero_()
    kernel(DOWN, 3, 4)
    up, down = site_energy.read()
    assert (up.total, down.kept, down.total) == (1, 3, 4)
