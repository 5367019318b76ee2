"""Gated products -> matmul: fused for a few tokens, the product alone otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from torch import Tensor, fx
from tracing import calls, rewrite, trace

from inductor_sparse import profitability
from inductor_sparse.decisions import Decision, Status
from inductor_sparse.plan import Plan, SitePlan

D, HIDDEN, N = 8, 16, 6
STATIC = [1, 2, 3]


def reglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * F.linear(x, up), down)


def relu2_glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up) * F.relu(F.linear(x, gate)) ** 2, down)


def d_relu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * F.relu(F.linear(x, up)), down)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = [(*shape, D), (HIDDEN, D), (HIDDEN, D), (N, HIDDEN)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def run(
    fn: Callable[..., Tensor], args: list[Tensor], **context: Any
) -> tuple[fx.GraphModule, Decision]:
    gm = trace(fn, *args)
    context.setdefault("static", STATIC)
    (decision,) = rewrite(gm, **context).decisions
    assert decision.rule == "gated_matmul"
    return gm, decision


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fn", "act"), [(reglu, "relu"), (relu2_glu, "relu2")])
def test_a_few_tokens_skip_the_up_projection(
    fn: Callable[..., Tensor], act: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    args = inputs(*shape, dtype=dtype)
    gm, decision = run(fn, args)
    assert (decision.status, decision.op) == (Status.APPLIED, "glu_spmm")
    assert decision.activation == f"{act}*up"
    assert len(calls(gm, "mm")) == 1
    (glu,) = calls(gm, "glu_spmm")
    assert glu.args[4] == act
    exact = fn(*(arg.double() for arg in args))
    assert_within_budget(gm(*args), fn(*args), exact)


@pytest.mark.parametrize("fn", [reglu, relu2_glu])
def test_many_tokens_keep_the_up_projection(fn: Callable[..., Tensor]) -> None:
    args = inputs(profitability.GLU_MAX_TOKENS + 1)
    gm, decision = run(fn, args)
    assert (decision.status, decision.op) == (Status.APPLIED, "activation_spmm")
    assert calls(gm, "activation_spmm")[0].args[2] == "identity"
    exact = fn(*(arg.double() for arg in args))
    assert_within_budget(gm(*args), fn(*args), exact)


@pytest.mark.parametrize(
    ("dtype", "density", "op"),
    [
        (torch.float32, 0.24, "glu_spmm"),
        (torch.float32, 0.26, "activation_spmm"),
        (torch.bfloat16, 0.2, "glu_spmm"),
        (torch.bfloat16, 0.22, "activation_spmm"),
    ],
)
def test_a_plan_may_keep_the_up_projection(
    dtype: torch.dtype, density: float, op: str
) -> None:
    plan = Plan({f"mm_2:{HIDDEN}x{N}": SitePlan(density, density, 0.0, 0.0, 1, 5)})
    _, decision = run(reglu, inputs(8, dtype=dtype), plan=plan)
    assert (decision.op, decision.density) == (op, density)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 2), (torch.bfloat16, 1), (torch.float16, 1)]
)
def test_tokens_that_could_lose_are_observed(dtype: torch.dtype, most: int) -> None:
    for M in (most, most + 1):
        gm, _ = run(reglu, inputs(M, dtype=dtype))
        (glu,) = calls(gm, "glu_spmm")
        counters = calls(gm, "site_counters")
        assert len(counters) == M - most
        assert list(glu.args[5:]) == counters


def test_two_sparse_factors_are_one_product() -> None:
    args = inputs(2)
    gm, decision = run(d_relu, args)
    assert decision.activation == "relu*relu"
    assert decision.status is Status.APPLIED
    exact = d_relu(*(arg.double() for arg in args))
    assert_within_budget(gm(*args), d_relu(*args), exact)


def up_used_twice(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Any:
    h = F.linear(x, up)
    return F.linear(F.relu(F.linear(x, gate)) * h, down), h


def scaled(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * (F.linear(x, up) * 0.5), down)


def scaled_gate(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * 0.5 * F.linear(x, up), down)


def masked_gate(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.relu(F.linear(x, gate))
    return F.linear(h * (h > 1) * F.linear(x, up), down)


def half_up(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.linear(x, torch.cat([up, up]))[..., HIDDEN:]
    return F.linear(F.relu(F.linear(x, gate)) * h, down)


def biased_up(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.linear(x, up, x.new_ones(HIDDEN))
    return F.linear(F.relu(F.linear(x, gate)) * h, down)


def transposed_product(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.relu(F.linear(x, gate)) * F.linear(x, up)
    return F.linear(h.transpose(0, 1).contiguous(), down)


def normed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.relu(F.linear(x, gate)) ** 2 * F.linear(x, up)
    return F.linear(F.rms_norm(h, (HIDDEN,)), down)


@pytest.mark.parametrize(
    "fn",
    [
        up_used_twice,
        scaled,
        scaled_gate,
        masked_gate,
        half_up,
        biased_up,
        transposed_product,
        normed,
    ],
)
def test_whatever_is_in_the_way_keeps_the_up_projection(fn: Callable[..., Any]) -> None:
    args = inputs(2, 3)
    before = trace(fn, *args)
    gm, decision = run(fn, args)
    assert (decision.status, decision.op) == (Status.APPLIED, "activation_spmm")
    torch.testing.assert_close(gm(*args), before(*args))


def test_up_weight_that_is_an_argument_is_not_taken() -> None:
    # Row-contiguous as stored, so it needs no copy and may be anything.
    _, decision = run(reglu, inputs(2), static=[1, 3])
    assert decision.op == "glu_spmm"
    x, gate, up, down = inputs(2)
    _, decision = run(reglu, [x, gate, up.T.contiguous().T, down], static=[1, 3])
    assert decision.op == "activation_spmm"
