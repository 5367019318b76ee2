"""Every way to write ReLU² is found, and its values survive the rewrite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from torch import Tensor
from tracing import calls, rewrite, rewrite_one, trace

from inductor_sparse.decisions import Status

Activation = Callable[[Tensor], Tensor]


def named_twice(x: Tensor) -> Tensor:
    r = F.relu(x)
    return r * r


def negatives_by_index(x: Tensor) -> Tensor:
    h = x.clone()
    h[h < 0] = 0
    return h**2


IN_KERNEL: dict[str, Activation] = {
    "torch.square": lambda x: torch.square(F.relu(x)),
    "method square": lambda x: x.relu().square(),
    "int power": lambda x: F.relu(x) ** 2,
    "float power": lambda x: F.relu(x) ** 2.0,
    "torch.pow": lambda x: torch.pow(torch.relu(x), 2),
    "in place": lambda x: (x + 0).relu_().pow_(2),
    "r * r": named_twice,
    "relu(x) * relu(x)": lambda x: F.relu(x) * F.relu(x),
    "clamp": lambda x: x.clamp(min=0) ** 2,
    "clamp to inf": lambda x: x.clamp(0, math.inf).square(),
    "clamp_min": lambda x: torch.clamp_min(x, 0).square(),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)) ** 2,
    "maximum, zero first": lambda x: torch.maximum(torch.zeros_like(x), x) ** 2,
    "threshold": lambda x: F.threshold(x, 0, 0) ** 2,
    "hardtanh": lambda x: F.hardtanh(x, 0, math.inf) ** 2,
    "where(x <= 0)": lambda x: torch.where(x <= 0, 0, x**2),
    "where(x < 0)": lambda x: torch.where(x < 0, 0, x * x),
    "by index": negatives_by_index,
    "in float32": lambda x: (F.relu(x.float()) ** 2).to(x.dtype),
    "square in float32": lambda x: F.relu(x).float().square().to(x.dtype),
}
"""Equal to relu(x) ** 2 on every input, so the kernel can do it."""

KEPT: dict[str, Activation] = {
    "relu(x) * x": lambda x: F.relu(x) * x,
    "x * x * (x > 0)": lambda x: x * x * (x > 0),
    "x * (x > 0) * x": lambda x: x * (x > 0) * x,
    "where(x > 0)": lambda x: torch.where(x > 0, x * x, 0),
    "where(x > 0, zeros)": lambda x: torch.where(x > 0, x * x, torch.zeros_like(x)),
    "relu of where": lambda x: torch.where(x > 0, x, 0) ** 2,
}
"""Differ from relu(x) ** 2 where x is NaN or infinite, so their nodes stay."""


def linear(act: Activation) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: F.linear(act(x), w)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)], ids=["2d", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*IN_KERNEL, *KEPT])
def test_fires(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    act = (IN_KERNEL | KEPT)[name]
    x, w = torch.randn(shape).to(dtype), torch.randn(6, 8).to(dtype)
    gm, decision = rewrite_one(linear(act), x, w)

    assert decision.status is Status.APPLIED
    assert (decision.rule, decision.activation) == ("relu_squared_matmul", "relu2")
    (spmm,) = calls(gm, "activation_spmm")
    assert spmm.args[2] == ("relu2" if name in IN_KERNEL else "identity")
    assert calls(gm, "mm") == []

    exact = F.linear(F.relu(x.double()) ** 2, w.double())
    assert_within_budget(gm(x, w), linear(act)(x, w), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [*IN_KERNEL, *KEPT])
def test_keeps_nan_and_infinity(name: str, dtype: torch.dtype) -> None:
    # 300 ** 2 overflows float16: a spelling may turn that, too, into inf * 0.
    x = torch.eye(8)[:5] + torch.randn(5, 8).abs().neg()
    x[range(5), range(5)] = torch.tensor([math.nan, math.inf, -math.inf, -300, 300.0])
    x, w = x.to(dtype), torch.randn(6, 8).to(dtype)
    fn = linear((IN_KERNEL | KEPT)[name])
    before = trace(fn, x, w)
    gm, _ = rewrite_one(fn, x, w)
    torch.testing.assert_close(gm(x, w), before(x, w), equal_nan=True)


@pytest.mark.parametrize("name", IN_KERNEL)
def test_activation_leaves_the_graph(name: str) -> None:
    fn = linear(IN_KERNEL[name])
    gm, _ = rewrite_one(fn, torch.randn(5, 8).bfloat16(), torch.randn(6, 8).bfloat16())
    assert [op for op in ("relu", "pow", "mul", "where") if calls(gm, op)] == []


@pytest.mark.parametrize("name", [*IN_KERNEL, *KEPT, "relu by clamp"])
def test_two_matmuls_may_read_one_activation(name: str) -> None:
    spellings = {**IN_KERNEL, **KEPT, "relu by clamp": lambda x: x.clamp(min=0)}

    def two(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        a = spellings[name](x)
        return F.linear(a, w) + F.linear(a, v)

    inputs = [torch.randn(size) for size in ((5, 8), (6, 8), (6, 8))]
    gm = trace(two, *inputs)
    decisions = rewrite(gm, static=[1, 2]).decisions
    assert [decision.status for decision in decisions] == [Status.APPLIED] * 2
    assert len(calls(gm, "activation_spmm")) == 2
    torch.testing.assert_close(gm(*inputs), two(*inputs), rtol=1e-5, atol=1e-5)
