"""What is not ReLU², ReLU or gated ReLU is refused by name, and left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tracing import listing, rewrite, trace

from inductor_sparse.decisions import Reason, Status

LOOK_ALIKES: dict[str, tuple[Callable[[Tensor], Tensor], Reason, str]] = {
    "relu³": (lambda x: F.relu(x) ** 3, Reason.EXPONENT_NOT_TWO, "squared"),
    "relu^2.5": (lambda x: F.relu(x) ** 2.5, Reason.EXPONENT_NOT_TWO, "squared"),
    "relu² * x": (lambda x: F.relu(x) ** 2 * x, Reason.EXPONENT_NOT_TWO, "squared"),
    "relu⁴": (
        lambda x: (F.relu(x) ** 2) ** 2,
        Reason.EXPONENT_NOT_TWO,
        "squared",
    ),
    "relu6": (F.relu6, Reason.CLIPPED_ACTIVATION, "plain"),
    "relu6²": (lambda x: F.relu6(x) ** 2, Reason.CLIPPED_ACTIVATION, "squared"),
    "clamp(0, 3)²": (
        lambda x: x.clamp(0, 3) ** 2,
        Reason.CLIPPED_ACTIVATION,
        "squared",
    ),
    "hardtanh²": (
        lambda x: F.hardtanh(x, 0, 3) ** 2,
        Reason.CLIPPED_ACTIVATION,
        "squared",
    ),
    "min(relu, 6)": (
        lambda x: torch.minimum(F.relu(x), torch.full_like(x, 6)),
        Reason.CLIPPED_ACTIVATION,
        "plain",
    ),
    "relu6 gate": (lambda x: F.relu6(x) * (x + 1), Reason.CLIPPED_ACTIVATION, "gated"),
    "leaky_relu²": (
        lambda x: F.leaky_relu(x, 0.5) ** 2,
        Reason.ACTIVATION_NOT_SPARSE,
        "squared",
    ),
    "silu²": (lambda x: F.silu(x) ** 2, Reason.ACTIVATION_NOT_SPARSE, "squared"),
    "gelu²": (lambda x: F.gelu(x) ** 2, Reason.ACTIVATION_NOT_SPARSE, "squared"),
    "sigmoid²": (
        lambda x: torch.sigmoid(x) ** 2,
        Reason.ACTIVATION_NOT_SPARSE,
        "squared",
    ),
    "swiglu": (
        lambda x: F.silu(x) * (x + 1),
        Reason.ACTIVATION_NOT_SPARSE,
        "gated",
    ),
    "geglu": (lambda x: F.gelu(x) * (x + 1), Reason.ACTIVATION_NOT_SPARSE, "gated"),
    "bias": (
        lambda x: F.relu(x) ** 2 + x.new_ones(8),
        Reason.NOT_ZERO_PRESERVING,
        "squared",
    ),
    "clamp + bias": (
        lambda x: x.clamp(min=0) ** 2 + x.new_ones(8),
        Reason.NOT_ZERO_PRESERVING,
        "squared",
    ),
    "relu + bias": (
        lambda x: F.relu(x) + x.new_ones(8),
        Reason.NOT_ZERO_PRESERVING,
        "plain",
    ),
    "layer norm": (
        lambda x: F.layer_norm(F.relu(x) ** 2, (8,)),
        Reason.NOT_ZERO_PRESERVING,
        "squared",
    ),
    "affine layer norm": (
        lambda x: F.layer_norm(F.relu(x), (8,), x.new_ones(8), x.new_ones(8)),
        Reason.NOT_ZERO_PRESERVING,
        "plain",
    ),
    "StarReLU": (
        lambda x: 0.8944 * F.relu(x) ** 2 - 0.4472,
        Reason.NOT_ZERO_PRESERVING,
        "squared",
    ),
}
RULES = {
    "squared": "relu_squared_matmul",
    "plain": "relu_matmul",
    "gated": "gated_matmul",
}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_refused_by_name(name: str, dtype: torch.dtype) -> None:
    act, reason, family = LOOK_ALIKES[name]
    gm = trace(lambda x, w: F.linear(act(x).to(dtype), w), *_inputs(dtype))
    before = listing(gm)
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.status is Status.DENSE
    assert (decision.reason, decision.rule) == (reason, RULES[family])
    assert decision.detail
    assert decision.expected_gain is None
    assert listing(gm) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_are_listed(name: str, dtype: torch.dtype) -> None:
    gm = trace(lambda x, w: F.linear(SMOOTH[name](x), w), *_inputs(dtype))
    before = listing(gm)
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.reason is Reason.ACTIVATION_NOT_SPARSE
    assert decision.rule == "relu_matmul"
    assert decision.activation == name.split(",")[0]
    assert listing(gm) == before


@pytest.mark.parametrize("name", [*LOOK_ALIKES, *SMOOTH])
def test_refused_without_decompositions(name: str) -> None:
    act, reason, _ = LOOK_ALIKES.get(
        name, (SMOOTH.get(name), Reason.ACTIVATION_NOT_SPARSE, "plain")
    )
    x, w = _inputs(torch.float32)
    gm = trace(lambda x, w: act(x) @ w, x, w.T.contiguous(), decompose=False)
    before = listing(gm)
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.reason is reason
    assert listing(gm) == before


def test_star_relu_is_named() -> None:
    act, _, _ = LOOK_ALIKES["StarReLU"]
    gm = trace(lambda x, w: F.linear(act(x), w), *_inputs(torch.float32))
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.detail.startswith("StarReLU")


def test_exponent_held_in_a_tensor() -> None:
    x, w = _inputs(torch.float32)
    gm = trace(lambda x, w, s: F.linear(F.relu(x) ** s, w), x, w, torch.tensor(2.0))
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.reason is Reason.SYMBOLIC_EXPONENT


def test_exponent_taken_from_a_size() -> None:
    x, w = _inputs(torch.float32)
    gm = trace(lambda x, w: F.linear(F.relu(x) ** x.shape[0], w), x, w, mode="symbolic")
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.reason is Reason.SYMBOLIC_EXPONENT


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x,
        lambda x: F.softmax(x, dim=-1),
        lambda x: F.rms_norm(x, (8,)),
        lambda x: x + F.relu(x.flip(0)),
        lambda x: F.relu(x - 1) - F.relu(x),
        torch.cos,
        lambda x: x.clamp(min=-1),
        lambda x: F.threshold(x, 0.5, 1),
        lambda x: torch.where(x > -0.5, x, 0),
        lambda x: F.threshold(x, 0, 1),
        lambda x: torch.where(x > 0, 0, x),
        lambda x: torch.where(x > 0, 0, x * x),
        lambda x: torch.where(x > 0, x.flip(0), 0),
        lambda x: torch.maximum(x, torch.ones_like(x)),
        lambda x: torch.maximum(x[:1], torch.zeros_like(x)),
        lambda x: F.relu(x).clamp(min=0.5),
    ],
)
def test_unrelated_matmuls_are_only_counted(act: Callable[[Tensor], Tensor]) -> None:
    gm = trace(lambda x, w: F.linear(act(x), w), *_inputs(torch.float32))
    before = listing(gm)
    record = rewrite(gm, static=[1])
    assert (record.decisions, record.other_matmuls) == ([], 1)
    assert listing(gm) == before


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8).to(dtype), torch.randn(6, 8).to(dtype)
