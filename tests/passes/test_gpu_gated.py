"""Gated sites on a GPU: which of two ops skips their zeros, and for how many tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from tracing import calls, rewrite_one

from inductor_sparse.decisions import Decision, Reason
from inductor_sparse.plan import Plan, SitePlan
from inductor_sparse.profitability import cuda

pytestmark = pytest.mark.usefixtures("launched_by_cuda_graphs")

K, N = 14336, 4096


def glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * F.linear(x, up), down)


def biased(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.linear(x, up, x.new_ones(up.shape[0]))
    return F.linear(F.relu(F.linear(x, gate)) * h, down)


def prepared(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.relu(x @ gate) * (x @ up)) @ down


def run(
    M: int, fn: Any = glu, density: float | None = None, **context: Any
) -> tuple[fx.GraphModule, Decision]:
    sizes = [(M, N), (K, N), (K, N), (N, K)]
    if fn is prepared:
        sizes[1:] = [size[::-1] for size in sizes[1:]]
        context["options"] = {"weight_copies": False}
    args = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in sizes]
    if density is not None:
        site = SitePlan(density, density, 0.0, 0.0, 1, 5)
        context["plan"] = Plan({f"mm_{i}:{K}x{N}": site for i in (1, 2)})
    context.setdefault("architecture", lambda device: "sm_90")
    return rewrite_one(fn, *args, device="cuda", **context)


@pytest.mark.parametrize("fn", [biased, prepared])
@pytest.mark.parametrize(("M", "density"), [(1, None), (1, 0.02), (8, 0.05)])
def test_without_glu_spmm_cost_and_limits_are_those_of_the_product(
    fn: Any, M: int, density: float | None
) -> None:
    gm, decision = run(M, fn, density)
    assert decision.op == "activation_spmm"
    assert len(calls(gm, "glu_spmm")) == 0
    assert decision.expected_gain == cuda.decode_gain(M, K, N, "bfloat16", density)
    limit = cuda.decode_max_tokens(K, N, "bfloat16", density)
    assert f"skipping zeros wins up to {limit} token" in decision.detail


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("M", [1, 2, 4, 8])
def test_the_form_that_takes_less_time_is_taken(M: int, density: float) -> None:
    gm, decision = run(M, density=density)
    limits = {
        gated: cuda.decode_max_tokens(K, N, "bfloat16", density, gated=gated)
        for gated in (False, True)
    }
    # Of one product the dense time is 1, of both it is 2.
    product = 1 + 1 / cuda.decode_gain(M, K, N, "bfloat16", density)
    both = 2 / cuda.decode_gain(M, K, N, "bfloat16", density, gated=True)
    times = {"activation_spmm": product, "glu_spmm": both}
    able = {op: times[op] for op in times if limits[op == "glu_spmm"] >= M}
    assert decision.op == min(able, key=lambda op: able[op], default="")
    assert len(calls(gm, decision.op)) == 1 if able else decision.reason is not None
    if able:
        gain = cuda.decode_gain(
            M, K, N, "bfloat16", density, gated=decision.op == "glu_spmm"
        )
        assert decision.expected_gain == gain
        assert f"wins up to {max(limits.values())} token" in decision.detail


def test_both_forms_have_their_tokens() -> None:
    few, many = run(1, density=0.25)[1], run(4, density=0.25)[1]
    assert (few.op, many.op) == ("glu_spmm", "activation_spmm")


def test_few_steps_and_no_two_of_one_form() -> None:
    for density in (None, 0.01, 0.05, 0.1, 0.3):
        for size in ((8192, 2048), (14336, 4096), (28672, 8192), (53248, 16384)):
            steps = cuda.decode_steps(*size, "bfloat16", density, forms=(True, False))
            ends = [step.up_to for step in steps]
            assert ends == sorted(set(ends))
            assert len({step.gated for step in steps}) == len(steps) <= 2


def test_what_was_too_dense_ends_both_forms() -> None:
    site = f"mm_2:{K}x{N}"
    assert run(4, density=0.25, demoted={site: 5})[1].op == "activation_spmm"
    _, decision = run(4, density=0.25, demoted={site: 4})
    assert decision.reason is Reason.TOO_DENSE
    assert run(1, density=0.25, demoted={site: 2})[1].op == "glu_spmm"
