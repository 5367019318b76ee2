"""Weights of any layout and any owner, changed in any way between two calls."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from e2e.checks import Down, compare, compile_and_compare, outcomes
from report_models import FEATURES, FFN, HIDDEN, tokens
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.multiprocessing.reductions import StorageWeakRef

import inductor_sparse
from inductor_sparse.decisions import collect
from inductor_sparse.runtime import prepared_weights

COPY = FEATURES * HIDDEN * 4

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "every other element": lambda: torch.randn(2 * FEATURES, 2 * HIDDEN)[::2, ::2],
    "one row expanded": lambda: torch.randn(1, HIDDEN).expand(FEATURES, -1),
    "one column expanded": lambda: torch.randn(FEATURES, 1).expand(-1, HIDDEN),
    "rows that overlap": lambda: torch.randn(200).as_strided(
        (FEATURES, HIDDEN), (3, 1)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_layouts(layout: str) -> None:
    model = Down(LAYOUTS[layout]())
    _, decisions = compile_and_compare(model, torch.randn(5, HIDDEN))
    assert outcomes(decisions) == ["applied"]
    assert decisions[0].weight_copy_bytes == COPY


def test_weight_stored_column_by_column_needs_no_copy() -> None:
    model = Down(torch.randn(HIDDEN, FEATURES).t())
    _, decisions = compile_and_compare(model, torch.randn(5, HIDDEN))
    assert outcomes(decisions) == ["applied"]
    assert decisions[0].weight_copy_bytes == 0


class Pair(nn.Module):
    """Two down projections."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.a, self.b = Down(first), Down(second)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)


def test_weights_that_share_one_flat_buffer() -> None:
    flat = torch.randn(2 * FEATURES * HIDDEN)
    model = Pair(*(half.view(FEATURES, HIDDEN) for half in flat.chunk(2)))
    x, y = torch.randn(2, 5, HIDDEN)
    compiled, decisions = compile_and_compare(model, x, y)
    assert outcomes(decisions) == ["applied", "applied"]
    with torch.no_grad():
        for change in (flat, model.a.weight, model.b.weight, flat.data):
            change.mul_(-3)
            compare(compiled, model, x, y)


def test_tied_weight_is_copied_once() -> None:
    model = Pair(torch.randn(FEATURES, HIDDEN), torch.empty(0))
    model.b.weight = model.a.weight
    x, y = torch.randn(2, 5, HIDDEN)
    compiled, decisions = compile_and_compare(model, x, y)
    assert outcomes(decisions) == ["applied", "applied"]
    assert [d.weight_copy_bytes for d in decisions] == [COPY, 0]
    with torch.no_grad():
        model.b.weight.mul_(2)
        compare(compiled, model, x, y)
        model.b.weight = nn.Parameter(torch.randn(FEATURES, HIDDEN))
        compare(compiled, model, x, y)


def drop_every_other_column(model: FFN) -> None:
    model.down.weight.data[:, 1::2] = 0


def step(model: FFN, compiled: bool = False) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.enable_grad():
        model(tokens(5)).sum().backward()
    if compiled:
        torch.compile(lambda: optimizer.step(), backend="inductor")()
    else:
        optimizer.step()


def new_weight(model: FFN) -> Tensor:
    return torch.randn_like(model.down.weight)


# Each must be noticed by a graph that is not compiled again.
CHANGES: dict[str, Callable[[FFN], object]] = {
    "in place": lambda m: m.down.weight.mul_(2),
    "through .data": lambda m: m.down.weight.data.mul_(2),
    "through .data, in part": drop_every_other_column,
    "through numpy": lambda m: m.down.weight.detach().numpy().__imul__(3),
    ".data replaced": lambda m: setattr(m.down.weight, "data", new_weight(m)),
    "load_state_dict": lambda m: m.load_state_dict(FFN().state_dict()),
    "load assigned": lambda m: m.load_state_dict(FFN().state_dict(), assign=True),
    "parameter replaced": lambda m: setattr(
        m.down, "weight", nn.Parameter(new_weight(m))
    ),
    "module replaced": lambda m: setattr(m, "down", nn.Linear(HIDDEN, FEATURES)),
    "optimizer step": step,
    "cast there and back": lambda m: m.bfloat16().float(),
}


def test_changes_between_calls() -> None:
    model, x = FFN(), tokens(5)
    compiled, decisions = compile_and_compare(model, x)
    assert outcomes(decisions) == ["applied"]
    with collect() as log, torch.no_grad():
        for name, change in CHANGES.items():
            before = model(x)
            change(model)
            assert not torch.equal(model(x), before), f"{name} changes nothing"
            try:
                compare(compiled, model, x)
            except AssertionError as error:
                raise AssertionError(f"not noticed: {name}") from error
    assert log.graphs == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_changes_by_compiled_code() -> None:
    model, x = FFN(), tokens(5)
    compiled, _ = compile_and_compare(model, x)
    torch.compile(lambda: model.down.weight.data.mul_(2), backend="inductor")()
    with torch.no_grad():
        compare(compiled, model, x)
        step(model, compiled=True)
        compare(compiled, model, x)


def test_copies_die_with_their_weights() -> None:
    prepared_weights.forget()
    model, x = Down(), torch.randn(5, HIDDEN)
    compiled, _ = compile_and_compare(model, x)
    for _ in range(3):
        model.weight = nn.Parameter(torch.randn(FEATURES, HIDDEN))
        with torch.no_grad():
            compare(compiled, model, x)
    assert prepared_weights.nbytes() == COPY


@pytest.mark.parametrize("discard", [False, True])
def test_a_frozen_weight_is_held_once_if_parameters_are_discarded(
    discard: bool,
) -> None:
    prepared_weights.forget()
    model, x = Down().eval(), torch.randn(5, HIDDEN)
    original = StorageWeakRef(model.weight.untyped_storage())
    settings = {"freezing": True, "freezing_discard_parameters": discard}
    with inductor_config.patch(settings), collect() as log, torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="sparse")
        torch.testing.assert_close(compiled(x), expected)
    gc.collect()
    assert outcomes(log.decisions) == ["applied"]
    assert log.decisions[0].weight_copy_bytes == (0 if discard else COPY)
    assert original.expired() == discard


def test_requires_grad_weights_in_inference_mode() -> None:
    model, x = FFN(), tokens(5)
    with collect() as log, torch.inference_mode():
        compiled = torch.compile(model, backend="sparse")
        compare(compiled, model, x)
        model.down.weight.mul_(2)
        compare(compiled, model, x)
    assert outcomes(log.decisions) == ["applied"]


@pytest.mark.parametrize("prepared", [False, True])
def test_model_made_in_inference_mode(prepared: bool) -> None:
    with collect() as log, torch.inference_mode():
        model, x = FFN(), tokens(5)
        if prepared:
            inductor_sparse.prepare(model)
        compiled = torch.compile(model, backend="sparse")
        compare(compiled, model, x)
        model.down.weight.mul_(2)
        compare(compiled, model, x)
    # Its weights count no versions: nothing may be copied, but nothing need be either.
    assert outcomes(log.decisions) == ["applied" if prepared else "weight-untracked"]


def test_weight_passed_as_an_argument() -> None:
    class Functional(nn.Module):
        def forward(self, z: Tensor, weight: Tensor) -> Tensor:
            return torch.relu(z) @ weight.t()

    z, weight = torch.randn(5, HIDDEN), torch.randn(FEATURES, HIDDEN)
    _, decisions = compile_and_compare(Functional(), z, weight)
    assert outcomes(decisions) == ["weight-not-static"]
    torch._dynamo.reset()
    _, decisions = compile_and_compare(Functional(), z, weight.t().contiguous().t())
    assert outcomes(decisions) == ["applied"]
