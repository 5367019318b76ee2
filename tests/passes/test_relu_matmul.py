"""ReLU -> matmul."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from spellings import RELU, RELU_KEPT
from torch import Tensor
from tracing import calls, rewrite_one

from inductor_sparse.decisions import Status


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)], ids=["2d", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*RELU, *RELU_KEPT])
def test_fires(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear((RELU | RELU_KEPT)[name](x), w)

    x, w = torch.randn(shape).to(dtype), torch.randn(6, 8).to(dtype)
    gm, decision = rewrite_one(fn, x, w)
    assert decision.status is Status.APPLIED
    assert (decision.rule, decision.activation) == ("relu_matmul", "relu")
    (spmm,) = calls(gm, "activation_spmm")
    assert spmm.args[2] == ("relu" if name in RELU else "identity")
    assert_within_budget(gm(x, w), fn(x, w), fn(x.double(), w.double()))


@pytest.mark.parametrize(
    "act",
    [
        lambda x: F.relu(x).bfloat16().float(),
        lambda x: (F.relu(x).bfloat16() ** 2).float(),
        lambda x: (F.relu(x.bfloat16()) ** 2).float(),
    ],
)
def test_rounding_in_between_stays(act: Callable[[Tensor], Tensor]) -> None:
    x, w = torch.randn(5, 8), torch.randn(6, 8)
    gm, decision = rewrite_one(lambda x, w: F.linear(act(x), w), x, w)
    assert (decision.status, decision.dtype) == (Status.APPLIED, "float32")
    assert calls(gm, "activation_spmm")[0].args[2] == "identity"
    torch.testing.assert_close(gm(x, w), F.linear(act(x), w))


def test_broadcasting_where_stays_outside_of_the_kernel() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        row = x[:1]
        return F.linear(torch.where(row <= 0, torch.zeros_like(x), row), w)

    x, w = torch.randn(5, 8), torch.randn(6, 8)
    gm, decision = rewrite_one(fn, x, w)
    assert decision.status is Status.APPLIED
    assert calls(gm, "activation_spmm")[0].args[2] == "identity"
    torch.testing.assert_close(gm(x, w), fn(x, w))


def test_upcast_after_relu_stays_outside_of_the_kernel() -> None:
    x, w = torch.randn(5, 8).bfloat16(), torch.randn(6, 8)
    gm, decision = rewrite_one(lambda x, w: F.linear(F.relu(x).float(), w), x, w)
    assert (decision.status, decision.dtype) == (Status.APPLIED, "float32")
    (spmm,) = calls(gm, "activation_spmm")
    assert spmm.args[2] == "identity"
