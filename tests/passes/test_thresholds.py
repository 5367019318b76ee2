"""Zeros below a threshold, and zeros that a smooth activation is given and keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tracing import calls, rewrite, rewrite_one, rewrite_skipping, trace

from inductor_sparse.decisions import Reason, Status

Activation = Callable[[Tensor], Tensor]


def relu_above_the_mean(x: Tensor) -> Tensor:
    return F.relu(x - x.mean(-1, keepdim=True))


def by_index(x: Tensor) -> Tensor:
    h = x.clone()
    h[h <= 0.5] = 0
    return h


THRESHOLDS: dict[str, Activation] = {
    "threshold": lambda x: F.threshold(x, 0.5, 0),
    "where(x > t)": lambda x: torch.where(x > 0.5, x, 0.0),
    "where(x > t, zeros)": lambda x: torch.where(x > 0.5, x, torch.zeros_like(x)),
    "where(x <= t)": lambda x: torch.where(x <= 0.5, 0.0, x),
    "masked_fill": lambda x: x.masked_fill(x <= 0.5, 0.0),
    "by index": by_index,
    "x * (x > t)": lambda x: x * (x > 0.5),
    "of silu": lambda x: F.threshold(F.silu(x), 0.5, 0),
}
GIVEN_ZEROS: dict[str, tuple[Activation, str]] = {
    "gelu": (lambda x: F.gelu(F.relu(x)), "gelu(relu)"),
    "gelu, tanh": (
        lambda x: F.gelu(relu_above_the_mean(x), approximate="tanh"),
        "gelu(relu)",
    ),
    "silu": (lambda x: F.silu(F.relu(x)), "silu(relu)"),
    "silu of a square": (lambda x: F.silu(F.relu(x) ** 2), "silu(relu2)"),
    "tanh": (lambda x: torch.tanh(F.relu(x)), "tanh(relu)"),
    "elu": (lambda x: F.elu(F.relu(x)), "elu(relu)"),
    "leaky_relu": (lambda x: F.leaky_relu(F.relu(x), 0.1), "leaky_relu(relu)"),
    "mish": (lambda x: F.mish(F.relu(x)), "mish(relu)"),
}
ALL = THRESHOLDS | {name: act for name, (act, _) in GIVEN_ZEROS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_zeros_are_skipped_and_values_kept(name: str, dtype: torch.dtype) -> None:
    act = ALL[name]
    x, w = torch.randn(2, 3, 8).to(dtype), torch.randn(6, 8).to(dtype)
    decision = rewrite_skipping(act, x, w)
    assert decision.rule == "relu_matmul"
    assert decision.activation == GIVEN_ZEROS.get(name, (act, "relu"))[1]


@pytest.mark.parametrize("name", ALL)
def test_as_a_gate(name: str) -> None:
    act = ALL[name]
    x, w = torch.randn(5, 8), torch.randn(6, 8)
    gm, decision = rewrite_one(lambda x, w: F.linear(act(x) * (x + 1), w), x, w)
    assert (decision.status, decision.rule) == (Status.APPLIED, "gated_matmul")
    (spmm,) = calls(gm, "activation_spmm")
    assert spmm.args[2] == "identity"
    torch.testing.assert_close(gm(x, w), F.linear(act(x) * (x + 1), w))


@pytest.mark.parametrize(
    "act",
    [
        lambda x: torch.sigmoid(F.relu(x)),
        lambda x: F.softplus(F.relu(x)),
        lambda x: F.gelu(F.layer_norm(F.relu(x), (8,))),
        lambda x: F.silu(F.relu(x) + 1),
        lambda x: F.silu(F.relu6(x)),
    ],
    ids=["sigmoid", "softplus", "layer norm", "shifted", "clipped"],
)
def test_zeros_that_are_lost_before_or_in_it(act: Activation) -> None:
    x, w = torch.randn(5, 8), torch.randn(6, 8)
    gm = trace(lambda x, w: F.linear(act(x), w), x, w)
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.reason is Reason.ACTIVATION_NOT_SPARSE


NO_MASKS: dict[str, Activation] = {
    "adds": lambda x: x.index_put((x <= 0,), x.new_zeros(()), accumulate=True),
    "rows": lambda x: x.index_put((torch.arange(2),), x.new_zeros(())),
    "a mask of rows": lambda x: x.index_put((x[:, 0] <= 0,), x.new_zeros(())),
    "not zeros": lambda x: x.index_put((x <= 0,), x.new_ones(())),
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_other_writes_by_index_are_no_masks(name: str) -> None:
    act = NO_MASKS[name]
    gm = trace(lambda x, w: F.linear(act(x), w), torch.randn(5, 8), torch.randn(6, 8))
    assert len(calls(gm, "index_put")) == 1
    assert rewrite(gm, static=[1]).decisions == []


def test_a_symbolic_threshold_may_be_negative() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        above = torch.where(x > x.shape[0] - 9, x, 0.0)
        return F.linear(above, w)

    gm = trace(fn, torch.randn(5, 8), torch.randn(6, 8), mode="symbolic")
    (compared,) = calls(gm, "gt")
    assert not isinstance(compared.args[1], int)
    assert rewrite(gm, static=[1]).decisions == []


def test_a_threshold_behind_a_square_leaves_it_one() -> None:
    def act(x: Tensor) -> Tensor:
        square = F.relu(x) ** 2
        return torch.where(square > 0.5, square, 0.0)

    x, w = torch.randn(5, 8), torch.randn(6, 8)
    gm, decision = rewrite_one(lambda x, w: F.linear(act(x), w), x, w)
    assert (decision.rule, decision.activation) == ("relu_squared_matmul", "relu2")
    torch.testing.assert_close(gm(x, w), F.linear(act(x), w))
