"""Every way to write ReLU² is found, and its values survive the rewrite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from spellings import RELU, RELU2, RELU2_KEPT, Activation
from torch import Tensor
from tracing import calls, rewrite, rewrite_one, trace

from inductor_sparse.decisions import Status


def linear(act: Activation) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: F.linear(act(x), w)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)], ids=["2d", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*RELU2, *RELU2_KEPT])
def test_fires(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    act = (RELU2 | RELU2_KEPT)[name]
    x, w = torch.randn(shape).to(dtype), torch.randn(6, 8).to(dtype)
    gm, decision = rewrite_one(linear(act), x, w)

    assert decision.status is Status.APPLIED
    assert (decision.rule, decision.activation) == ("relu_squared_matmul", "relu2")
    (spmm,) = calls(gm, "activation_spmm")
    assert spmm.args[2] == ("relu2" if name in RELU2 else "identity")
    assert calls(gm, "mm") == []

    exact = F.linear(F.relu(x.double()) ** 2, w.double())
    assert_within_budget(gm(x, w), linear(act)(x, w), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [*RELU2, *RELU2_KEPT])
def test_keeps_nan_and_infinity(name: str, dtype: torch.dtype) -> None:
    # 300 ** 2 overflows float16: a spelling may turn that, too, into inf * 0.
    x = torch.eye(8)[:5] + torch.randn(5, 8).abs().neg()
    x[range(5), range(5)] = torch.tensor([math.nan, math.inf, -math.inf, -300, 300.0])
    x, w = x.to(dtype), torch.randn(6, 8).to(dtype)
    fn = linear((RELU2 | RELU2_KEPT)[name])
    before = trace(fn, x, w)
    gm, _ = rewrite_one(fn, x, w)
    torch.testing.assert_close(gm(x, w), before(x, w), equal_nan=True)


@pytest.mark.parametrize("name", RELU2)
def test_activation_leaves_the_graph(name: str) -> None:
    fn = linear(RELU2[name])
    gm, _ = rewrite_one(fn, torch.randn(5, 8).bfloat16(), torch.randn(6, 8).bfloat16())
    assert [op for op in ("relu", "pow", "mul", "where") if calls(gm, op)] == []


@pytest.mark.parametrize("name", [*RELU2, *RELU2_KEPT, "relu by clamp"])
def test_two_matmuls_may_read_one_activation(name: str) -> None:
    spellings = {**RELU2, **RELU2_KEPT, "relu by clamp": RELU["clamp"]}

    def two(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        a = spellings[name](x)
        return F.linear(a, w) + F.linear(a, v)

    inputs = [torch.randn(size) for size in ((5, 8), (6, 8), (6, 8))]
    gm = trace(two, *inputs)
    decisions = rewrite(gm, static=[1, 2]).decisions
    assert [decision.status for decision in decisions] == [Status.APPLIED] * 2
    assert len(calls(gm, "activation_spmm")) == 2
    torch.testing.assert_close(gm(*inputs), two(*inputs), rtol=1e-5, atol=1e-5)
