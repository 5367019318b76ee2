"""Weights stored in the order that is read: which ones, and what it spares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing import compile_eagerly

import inductor_sparse
from inductor_sparse.errors import SparseOptionError

FEATURES, HIDDEN = 32, 96


class FFN(nn.Module):
    """A plain or gated ReLU FFN."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.up = nn.Linear(FEATURES, HIDDEN, bias=False) if gated else None
        self.down = nn.Linear(HIDDEN, FEATURES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.gate(x))
        return self.down(hidden if self.up is None else hidden * self.up(x))


@pytest.mark.parametrize("weight_copies", [True, False])
@pytest.mark.parametrize(
    ("gated", "op"), [(False, "activation_spmm"), (True, "glu_spmm")]
)
def test_a_prepared_model_needs_no_copies(
    gated: bool, op: str, weight_copies: bool
) -> None:
    model = FFN(gated)
    assert inductor_sparse.prepare(model) == ["down.weight"]
    compiled = compile_eagerly(model, weight_copies=weight_copies)
    with torch.no_grad():
        compiled(torch.randn(1, FEATURES))
    (decision,) = compiled.decisions
    assert (decision.op, decision.weight_copy_bytes) == (op, 0)


def test_strides_change_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(4, 8)
    before, keys = model(x), list(model.state_dict())
    assert inductor_sparse.prepare(model) == ["2.weight"]
    assert model[2].weight.stride() == (1, 8)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), before)
    assert inductor_sparse.prepare(model) == []
    model.load_state_dict(model.state_dict())
    assert model[2].weight.stride() == (1, 8)


def test_layers_that_keep_their_width_are_prepared() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert inductor_sparse.prepare(model) == ["0.weight", "2.weight"]


def test_layers_can_be_named() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
    assert inductor_sparse.prepare(model, names=["2", "2"]) == ["2.weight"]
    assert model[0].weight.is_contiguous()
    assert model[2].weight.stride() == (1, 32)
    assert inductor_sparse.prepare(nn.Linear(8, 32), names=[""]) == ["weight"]
    assert inductor_sparse.prepare(model, names=[]) == []


@pytest.mark.parametrize("name", ["gates", "", "nothing"])
def test_a_name_that_no_layer_has(name: str) -> None:
    model = FFN(gated=False)
    hint = "; did you mean 'gate'?" if name == "gates" else ""
    with pytest.raises(SparseOptionError) as error:
        inductor_sparse.prepare(model, names=["down", name])
    assert str(error.value) == f"the model has no nn.Linear named {name!r}{hint}"
    assert model.down.weight.is_contiguous()


def test_tied_and_sliced_weights_are_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    flat = torch.randn(64)
    model["a"].weight = nn.Parameter(flat.view(8, 8))
    model["b"].weight = nn.Parameter(flat.view(8, 8))
    assert inductor_sparse.prepare(model) == []
    whole = nn.Linear(8, 8)
    whole.weight = nn.Parameter(torch.randn(128)[:64].view(8, 8))
    assert inductor_sparse.prepare(whole) == []
