"""Sites of one token in the graphs that ``mode="max-autotune"`` leaves to the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from tracing import calls, listing, rewrite, trace

from inductor_sparse import config
from inductor_sparse.decisions import GraphDecisions, Reason, Status
from inductor_sparse.passes.fx_utils import input_of
from inductor_sparse.passes.sites import SITE_KEY

K, N = 16384, 4096
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _max_autotune() -> Iterator[None]:
    with (
        inductor_config.patch(coordinate_descent_tuning=True),
        config.patch(cuda_graphs=True),
    ):
        yield


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def traced(fn: Callable[..., Tensor], *args: Tensor) -> fx.GraphModule:
    return trace(fn, *args, device="cuda")


def on_hopper(gm: fx.GraphModule, static: Sequence[int]) -> GraphDecisions:
    return rewrite(gm, static=static, architecture=lambda device: "sm_90")


def matmuls(gm: fx.GraphModule) -> int:
    return len(calls(gm, "mm")) + len(calls(gm, "bmm"))


def targets(gm: fx.GraphModule) -> list[str]:
    """What the graph calls, in alphabetical order."""
    called = (node for node in gm.graph.nodes if node.op == "call_function")
    return sorted(str(node.target) for node in called)


def down(z: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(z) ** 2, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_site_of_one_token_is_found(dtype: torch.dtype) -> None:
    gm = traced(down, empty(1, K, dtype=dtype), empty(N, K, dtype=dtype))
    assert matmuls(gm) == 0
    (decision,) = on_hopper(gm, [1]).decisions
    assert (decision.rule, decision.op) == ("relu_squared_matmul", "activation_spmm")
    assert decision.shapes == {"M": 1, "K": K, "N": N}
    assert len(calls(gm, "activation_spmm")) == 1
    assert not calls(gm, "mul")
    assert not calls(gm, "sum")


def test_a_gated_site_skips_the_up_projection_too() -> None:
    def ffn(x: Tensor, *w: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, w[0])) * F.linear(x, w[1]), w[2])

    gm = traced(ffn, empty(1, N), empty(K, N), empty(K, N), empty(N, K))
    record = on_hopper(gm, [1, 2, 3])
    assert [decision.op for decision in record.decisions] == ["glu_spmm"]
    assert record.other_matmuls == 1
    # The gate is computed as Inductor would have it.
    assert matmuls(gm) == 0
    assert len(calls(gm, "sum")) == 1


def test_batches() -> None:
    gm = traced(lambda z, w: F.relu(z) @ w, empty(2, 1, K), empty(2, K, N))
    assert matmuls(gm) == 0
    record = on_hopper(gm, [1])
    assert [decision.shapes["B"] for decision in record.decisions] == [2]
    assert len(calls(gm, "sum")) == (record.decisions[0].status is Status.DENSE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_stays_dense_is_spelled_as_before(dtype: torch.dtype) -> None:
    def layers(x: Tensor, *w: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, w[0])) ** 2, w[1]) + x

    sizes = ((1, 64), (128, 64), (64, 128))
    gm = traced(layers, *(empty(*size, dtype=dtype) for size in sizes))
    before = targets(gm)
    record = on_hopper(gm, [1, 2])
    (decision,) = record.decisions
    assert decision.reason is Reason.NOT_PROFITABLE
    assert record.other_matmuls == 1
    assert targets(gm) == before
    (measured,) = (node for node in gm.graph.nodes if SITE_KEY in node.meta)
    assert measured.meta[SITE_KEY] == decision.site
    # What explain() takes for the left operand, and a matmul has there.
    assert input_of(measured).meta["val"].shape == (1, 128)


def test_numbers_are_those_of_the_matmul() -> None:
    z, w = torch.randn(1, 64), torch.randn(64, 32)

    def spelled(z: Tensor, w: Tensor) -> Tensor:
        return (F.relu(z).unsqueeze(2) * w.unsqueeze(0)).sum(1)

    gm = trace(spelled, z, w)
    rewrite(gm, static=[1])
    assert len(calls(gm, "activation_spmm")) == 1
    torch.testing.assert_close(gm(z, w), F.relu(z) @ w)


def rounded_products(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).unsqueeze(2) * w.unsqueeze(0)).sum(1)


def other_axis(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).unsqueeze(1) * w.t().unsqueeze(0)).sum(2)


def over_rows(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).unsqueeze(2) * w.unsqueeze(0)).sum(0)


def over_columns(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).unsqueeze(2) * w.unsqueeze(0)).sum(2)


def two_batch_axes(z: Tensor, w: Tensor) -> Tensor:
    a, b = F.relu(z).view(1, 1, *z.shape), w.view(1, 1, *w.shape)
    return (a.unsqueeze(4) * b.unsqueeze(2)).sum(3)


def of_a_mask(z: Tensor, w: Tensor) -> Tensor:
    return ((F.relu(z) > 1).unsqueeze(2) * w.unsqueeze(0)).sum(1)


def sums(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).unsqueeze(2) + w.unsqueeze(0)).sum(1)


def scaled_columns(z: Tensor, w: Tensor) -> Tensor:
    square = torch.cat((w, w), 1)
    return (F.relu(z).unsqueeze(1) * square.unsqueeze(0)).sum(1)


def of_two_dtypes(z: Tensor, w: Tensor) -> Tensor:
    wide = F.relu(z).float().unsqueeze(2) * w.float().sin().unsqueeze(0)
    return wide.sum(1).to(z.dtype)


def to_another_dtype(z: Tensor, w: Tensor) -> Tensor:
    wide = F.relu(z).float().unsqueeze(2) * w.float().unsqueeze(0)
    return wide.sum(1).half()


def all_rows(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).unsqueeze(2) * w.unsqueeze(0)).sum((0, 1))


def kept_axis(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).unsqueeze(2) * w.unsqueeze(0)).sum(1, keepdim=True)


def in_float64(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).unsqueeze(2) * w.unsqueeze(0)).sum(1, dtype=torch.float64)


def read_before_rounding(z: Tensor, w: Tensor) -> Tensor:
    wide = (F.relu(z).float().unsqueeze(2) * w.float().unsqueeze(0)).sum(1)
    return wide.to(z.dtype) + wide.sin()


def wider_result(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).float().unsqueeze(2) * w.float().unsqueeze(0)).sum(1)


def scaled(z: Tensor, w: Tensor) -> Tensor:
    return (F.relu(z).unsqueeze(2) * 2.0).sum(1) + w.sum()


def products_summed_in_float32(z: Tensor, w: Tensor) -> Tensor:
    products = F.relu(z).unsqueeze(2) * w.unsqueeze(0)
    return products.sum(1, dtype=torch.float32).to(z.dtype)


BF16 = torch.bfloat16
LOOK_ALIKES: list[tuple[Any, torch.dtype]] = [
    (rounded_products, BF16),
    (products_summed_in_float32, BF16),
    (other_axis, torch.float32),
    (of_a_mask, torch.float32),
    (sums, torch.float32),
    (scaled_columns, torch.float32),
    (over_rows, torch.float32),
    (over_columns, torch.float32),
    (two_batch_axes, torch.float32),
    (all_rows, torch.float32),
    (kept_axis, torch.float32),
    (in_float64, torch.float32),
    (scaled, torch.float32),
]


@pytest.mark.parametrize(("fn", "dtype"), LOOK_ALIKES)
def test_other_sums_are_left_alone(fn: Any, dtype: torch.dtype) -> None:
    gm = trace(fn, torch.randn(1, 64).to(dtype), torch.randn(64, 32).to(dtype))
    before = listing(gm)
    record = rewrite(gm, static=[1])
    assert not record.decisions
    assert record.other_matmuls == 0
    assert listing(gm) == before


def rounded_operands(z: Tensor, w: Tensor) -> Tensor:
    z, w = F.relu(z.double()).float(), w.double().float()
    return (z.unsqueeze(2) * w.unsqueeze(0)).sum(1).double()


@pytest.mark.parametrize(
    "fn",
    [
        read_before_rounding,
        wider_result,
        of_two_dtypes,
        to_another_dtype,
        rounded_operands,
    ],
)
def test_a_product_in_float32_of_operands_of_other_dtypes(fn: Any) -> None:
    z, w = torch.randn(1, 64).bfloat16(), torch.randn(64, 32).bfloat16()
    gm = trace(fn, z, w)
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.dtype == "float32"
    torch.testing.assert_close(gm(z, w), fn(z, w))


def test_a_matmul_of_widened_operands_is_found() -> None:
    def down(z: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.relu(z).float(), w.float())

    gm = traced(down, empty(1, K), empty(N, K))
    assert matmuls(gm) == 0
    (decision,) = on_hopper(gm, [1]).decisions
    assert (decision.dtype, decision.op) == ("float32", "activation_spmm")


def test_a_matmul_of_many_rows_stays_one() -> None:
    gm = traced(lambda x, w: x @ w, empty(3, 64), empty(64, 32))
    before = listing(gm)
    assert on_hopper(gm, [1]).other_matmuls == 1
    assert listing(gm) == before
    assert matmuls(gm) == 1


@pytest.mark.parametrize(
    ("z", "w"),
    [
        ((3, 1), (64, 32)),
        ((3, 64), (1, 32)),
        ((3, 64), (32,)),
        ((1, 3, 64), (2, 64, 32)),
        ((2, 3, 64), (1, 64, 32)),
        ((3, 3, 64), (3, 32)),
    ],
    ids=str,
)
def test_factors_that_a_product_broadcasts(
    z: tuple[int, ...], w: tuple[int, ...]
) -> None:
    axis = len(z) - 1

    def fn(z: Tensor, w: Tensor) -> Tensor:
        return (F.relu(z).unsqueeze(axis + 1) * w.unsqueeze(axis - 1)).sum(axis)

    gm = trace(fn, torch.randn(z), torch.randn(w))
    before = listing(gm)
    record = rewrite(gm, static=[1])
    assert (record.decisions, record.other_matmuls) == ([], 0)
    assert listing(gm) == before


def spelled(z: Tensor, w: Tensor) -> Tensor:
    axis = z.ndim - 1
    factors = z.float().unsqueeze(axis + 1), w.float().unsqueeze(axis - 1)
    return (factors[0] * factors[1]).sum(axis).to(z.dtype)


@pytest.mark.parametrize("batches", [(), (2,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_that_spells_many_rows_like_that_gets_no_matmul(
    dtype: torch.dtype, batches: tuple[int, ...]
) -> None:
    z, w = torch.randn(*batches, 3, 64).to(dtype), torch.randn(*batches, 64, 32)
    w = w.to(dtype)
    gm = trace(spelled, z, w)
    before, expected = targets(gm), gm(z, w)
    with inductor_config.patch(coordinate_descent_tuning=False):
        record = rewrite(gm, static=[1])
    assert record.other_matmuls == 1
    assert targets(gm) == before
    assert torch.equal(gm(z, w), expected)
