"""Sites of a GPU that are observed: taken earlier, counted, and given back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from tracing import calls, rewrite_one

from inductor_sparse.decisions import Decision, Reason, Status
from inductor_sparse.plan import Plan, SitePlan
from inductor_sparse.profitability import KERNELS, cuda

K, N = 16384, 4096
SITE = f"mm:{K}x{N}"
UNOBSERVED = cuda.decode_max_tokens(K, N, "bfloat16", None)
OBSERVED = cuda.decode_max_tokens(K, N, "bfloat16", None, observed=True)


@pytest.fixture(autouse=True)
def _cuda_graphs_of_inductor() -> Iterator[None]:
    with inductor_config.patch({"triton.cudagraphs": True}):
        yield


def ffn(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x) ** 2, w)


def glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * F.linear(x, up), down)


def empty(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device="meta")


def run(
    M: int, *weights: Tensor, fn: Any = ffn, **context: Any
) -> tuple[fx.GraphModule, Decision]:
    x, *weights = weights or (empty(M, K), empty(N, K))
    context.setdefault("demoted", {})
    context.setdefault("architecture", lambda device: "sm_90")
    return rewrite_one(fn, x, *weights, device="cuda", **context)


def test_more_tokens_are_tried_where_they_are_observed() -> None:
    assert UNOBSERVED < 4 <= OBSERVED
    gm, decision = run(4)
    assert decision.op == "activation_spmm"
    assert f"skipping zeros wins up to {OBSERVED} tokens" in decision.detail
    (counters,) = calls(gm, "site_counters")
    break_even = cuda.break_even_union(4, K, N, "bfloat16")
    anchor, *rest = counters.args
    assert rest == [SITE, pytest.approx(break_even, abs=1e-3), 4]
    assert anchor in gm.graph.find_nodes(op="placeholder")
    assert calls(gm, "activation_spmm")[0].args[3] is counters


@pytest.mark.parametrize(
    "context",
    [
        {"demoted": None},
        {"is_training": True},
        {"options": {"cuda_graphs": True}},
    ],
)
@pytest.mark.parametrize("M", [1, 4])
def test_without_a_gate_no_model_loses(M: int, context: dict[str, Any]) -> None:
    gm, decision = run(M, **context)
    assert (decision.status is Status.APPLIED) == (M <= UNOBSERVED)
    assert calls(gm, "site_counters") == []
    if decision.reason is not None:
        assert decision.reason is Reason.NOT_PROFITABLE
        assert f"wins up to {UNOBSERVED} tokens" in decision.detail


def test_where_nothing_can_count_no_model_loses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(KERNELS["sm_90"], "site_counters")
    assert calls(run(1)[0], "site_counters") == []
    assert run(4)[1].reason is Reason.NOT_PROFITABLE


@pytest.mark.parametrize("arch", ["sm_80", "sm_120", "gfx942"])
def test_kernels_that_never_ran_count_too_where_they_are_allowed(arch: str) -> None:
    where: dict[str, Any] = {"architecture": lambda device: arch}
    assert run(4, **where)[1].reason is Reason.KERNEL_UNVERIFIED
    gm, decision = run(4, options={"allow_unverified": True}, **where)
    assert decision.op == "activation_spmm"
    assert len(calls(gm, "site_counters")) == 1


def test_a_graph_whose_inputs_are_elsewhere_is_not_observed() -> None:
    static = {"static": [0, 1]}  # nothing on the GPU but parameters
    gm, decision = run(1, **static)
    assert decision.op == "activation_spmm"
    assert f"wins up to {UNOBSERVED} tokens" in decision.detail
    assert calls(gm, "site_counters") == []
    assert run(4, **static)[1].reason is Reason.NOT_PROFITABLE


def test_a_measured_site_is_observed_too() -> None:
    plan = Plan({SITE: SitePlan(0.02, 0.02, 0.0, 0.0, 1, 5)})
    assert len(calls(run(4, plan=plan)[0], "site_counters")) == 1
    assert calls(run(4, plan=plan, demoted=None)[0], "site_counters") == []


def test_a_gated_product_is_counted() -> None:
    size = 14336, 4096
    weights = empty(1, 4096), empty(*size), empty(*size), empty(4096, 14336)
    gm, decision = run(1, *weights, fn=glu)
    assert decision.op == "glu_spmm"
    (counters,) = calls(gm, "site_counters")
    gated = cuda.break_even_union(1, 14336, 4096, "bfloat16", gated=True)
    assert counters.args[2:] == (pytest.approx(gated, abs=1e-3), 1)
    assert calls(gm, "glu_spmm")[0].args[5] is counters


def test_scales_of_8_bit_rows_stay_in_their_place() -> None:
    # So small that reading half as many bytes does not make up for finding the rows.
    gm, _ = run(1, empty(1, 6144), empty(2048, 6144), options={"quantize": "int8"})
    (product,) = calls(gm, "activation_spmm")
    (counters,) = calls(gm, "site_counters")
    assert product.args[3] is counters
    assert product.args[4].meta["val"].shape == (6144,)
    shape = 1, 6144, 2048, "bfloat16"
    break_even = cuda.break_even_union(*shape, read_dtype="int8")
    assert counters.args[2] == pytest.approx(break_even, abs=1e-3)
    assert break_even == pytest.approx(2 * cuda.break_even_union(*shape))


@pytest.mark.parametrize(
    ("demoted", "M", "op"),
    [
        (8, 4, "activation_spmm"),
        (4, 2, "activation_spmm"),
        (4, 3, ""),
        (4, 4, ""),
        (4, 8, ""),
        (3, 2, "activation_spmm"),
        (1, 1, ""),
        (1, 2048, "sparse24_mm"),
    ],
)
def test_only_skipping_goes_and_only_of_so_many_tokens(
    demoted: int, M: int, op: str
) -> None:
    _, decision = run(M, demoted={SITE: demoted, "another": 1})
    assert decision.op == op
    if not op:
        assert decision.reason is Reason.TOO_DENSE
        assert decision.detail.startswith("observed at run time")
        assert "torch._dynamo.reset() discards" in decision.detail


def test_what_was_never_tried_is_not_called_too_dense() -> None:
    _, decision = run(64, demoted={SITE: 1})
    assert decision.reason is Reason.NOT_PROFITABLE
    assert "skipping zeros never wins" in decision.detail


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("M", [1, 2, 4])
def test_break_even_is_where_nothing_is_gained(M: int, gated: bool) -> None:
    shape = M, 28672, 8192, "bfloat16"
    union = cuda.break_even_union(*shape, gated=gated)
    per_token = 1 - (1 - union) ** (1 / M)
    assert cuda.decode_gain(*shape, per_token, gated=gated) == 1.0
    assert cuda.union_density(per_token, M) == pytest.approx(union)


def test_break_even_falls_with_tokens_and_with_launching() -> None:
    found = [cuda.break_even_union(M, K, N, "bfloat16") for M in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert 1 > found[0] > found[-1] > 0
    assert cuda.break_even_union(9, K, N, "bfloat16") == 0
    assert cuda.break_even_union(1, K, N, "bfloat16", graphs=False) == 0
    large = cuda.break_even_union(1, 53248, 16384, "bfloat16", graphs=False)
    assert large == cuda.break_even_union(1, 53248, 16384, "bfloat16")


def test_a_site_that_cannot_lose_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "break_even_union", lambda *_, **__: 1.0)
    assert calls(run(4)[0], "site_counters") == []
