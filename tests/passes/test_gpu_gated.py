"""Gated sites on a GPU: which of two ops skips their zeros, and for how many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from tracing import calls, rewrite_one

from inductor_sparse import config
from inductor_sparse.decisions import Decision
from inductor_sparse.plan import Plan, SitePlan
from inductor_sparse.profitability import cuda

K, N = 14336, 4096


@pytest.fixture(autouse=True)
def _launched_by_cuda_graphs() -> Iterator[None]:
    with config.patch(cuda_graphs=True):
        yield


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
    assert f"skipping zeros wins up to {limit} tokens" in decision.detail
