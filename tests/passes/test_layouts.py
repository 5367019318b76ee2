"""Operands that do not lie row by row in memory, and results that have to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from e2e.checks import outcomes
from torch import Tensor
from tracing import calls, rewrite, trace

BATCH, MATRIX = (2, 5, 32), (32, 7)
W, W_UP = (16, 32), (32, 32)

Function = Callable[..., Tensor]


def gated(x: Tensor, w: Tensor, w_up: Tensor) -> Tensor:
    up = F.linear(x[:, :3].reshape(-1, 32), w_up).view(2, 3, 32)
    return F.linear(F.relu(x[:, 1:4]) * up, w)


def dealt_out(x: Tensor, w: Tensor) -> Tensor:
    """A view of a product by its strides, which are those of rows of 7."""
    return (w @ F.relu(x)).as_strided((7,), (8,)).clone()


CASES: dict[str, tuple[Function, tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "slice": (lambda x, w: F.linear(F.relu(x[:, :3]), w), BATCH, (W,)),
    "slice, squared": (
        lambda x, w: F.linear(x[:, :3].clamp(min=0) ** 2, w),
        BATCH,
        (W,),
    ),
    "expansion": (
        lambda x, w: F.linear(F.relu(x[:, :1].expand(2, 3, 32)), w),
        BATCH,
        (W,),
    ),
    "other order": (lambda x, w: F.linear(F.relu(x.transpose(0, 1)), w), BATCH, (W,)),
    "gate": (gated, BATCH, (W, W_UP)),
    "columns": (lambda x, w: w @ F.relu(x), MATRIX, (W,)),
    "one column": (lambda x, w: w @ F.relu(x), (32, 1), (W,)),
    "columns, and an epilogue": (lambda x, w: w @ F.relu(x) + 1, MATRIX, (W,)),
    "batches": (lambda x, w: w @ F.relu(x), (2, 32, 7), ((2, 16, 32),)),
    "batches of one column": (lambda x, w: w @ F.relu(x), (2, 32, 1), ((2, 16, 32),)),
    "view by strides": (dealt_out, MATRIX, (W,)),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_strides_stay_what_they_were(name: str) -> None:
    function, size, weights = CASES[name]
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=draw) for s in (size, *weights)]
    gm = trace(function, *inputs)
    record = rewrite(gm, static=range(1, len(inputs)))
    assert outcomes(record.decisions) == ["applied"]
    actual, expected = gm(*inputs), function(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual.stride() == expected.stride()


def test_one_column_needs_no_copy() -> None:
    gm = trace(lambda x, w: w @ F.relu(x), torch.randn(32, 1), torch.randn(W))
    rewrite(gm, static=[1])
    assert calls(gm, "clone") == []


def test_an_activation_that_is_read_elsewhere_keeps_its_order() -> None:
    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.maximum(torch.zeros(7, 32), x.t())
        return F.linear(a, w), a

    x, w = torch.randn(MATRIX), torch.randn(W)
    gm = trace(both, x, w)
    assert outcomes(rewrite(gm, static=[1]).decisions) == ["applied"]
    for actual, expected in zip(gm(x, w), both(x, w), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("op", ["relu", "square"])
def test_rows_that_are_packed_on_a_gpu_may_have_gaps(op: str) -> None:
    def ffn(x: Tensor, w: Tensor) -> Tensor:
        z = x.narrow(1, 0, 512).relu()
        return F.linear(z if op == "relu" else z**2, w)

    x = torch.empty(8, 1024, 16384, dtype=torch.bfloat16, device="meta")
    w = torch.empty(4096, 16384, dtype=torch.bfloat16, device="meta")
    gm = trace(ffn, x, w, device="cuda")
    rewrite(gm, static=[1], architecture=lambda device: "sm_90")
    (packed,) = calls(gm, "sparsify24")
    assert packed.args[0].target is torch.ops.aten.reshape.default
