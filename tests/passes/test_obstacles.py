"""What keeps a matching site dense: dtype, shape, device, options, measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from tracing import calls, listing, rewrite, trace

from inductor_sparse.decisions import Decision, Reason, Status
from inductor_sparse.plan import Plan, SitePlan


def ffn(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x) ** 2, w)


def run(
    M: int = 5,
    K: int = 8,
    N: int = 6,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **context: Any,
) -> tuple[fx.GraphModule, Decision]:
    x, w = torch.zeros(M, K, dtype=dtype), torch.zeros(N, K, dtype=dtype)
    gm = trace(ffn, x, w, device=device)
    (decision,) = rewrite(gm, static=[1], **context).decisions
    applied = decision.status is Status.APPLIED
    assert len(calls(gm, "activation_spmm")) == applied
    assert (decision.reason is None) == applied
    return gm, decision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_supported_dtypes(dtype: torch.dtype) -> None:
    _, decision = run(dtype=dtype)
    assert decision.status is Status.APPLIED
    assert decision.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_unsupported_dtypes(dtype: torch.dtype) -> None:
    _, decision = run(dtype=dtype)
    assert decision.reason is Reason.UNSUPPORTED_DTYPE
    assert str(dtype).removeprefix("torch.") in decision.detail


@pytest.mark.parametrize(("name", "size"), [("K", 0), ("N", 0), ("N", 1), ("M", 0)])
def test_degenerate_shapes(name: str, size: int) -> None:
    _, decision = run(**{name: size})
    assert decision.reason is Reason.UNSUPPORTED_SHAPE
    assert decision.detail == f"{name} is {size}"


def test_small_layers_are_not_refused() -> None:
    _, decision = run(M=1, K=2, N=2)
    assert decision.status is Status.APPLIED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_that_is_not_there(dtype: torch.dtype) -> None:
    gm, decision = run(device="cuda", dtype=dtype, architecture=lambda device: "")
    assert decision.reason is Reason.ARCH_UNSUPPORTED
    assert (decision.device, decision.rule) == ("cuda", "relu_squared_matmul")
    assert decision.shapes == {"M": 5, "K": 8, "N": 6}
    assert listing(gm).count("mm") > 0


def test_cuda_fires_the_same_rules() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        a, b, c = F.relu(x), F.relu(x) ** 2, F.relu(x) * (x + 1)
        return F.linear(a, w) + F.linear(b, w) + F.linear(c, w)

    args = torch.zeros(5, 8), torch.zeros(6, 8)
    on_cpu = rewrite(trace(fn, *args), static=[1]).decisions
    on_cuda = rewrite(
        trace(fn, *args, device="cuda"), static=[1], architecture=lambda device: "sm_90"
    ).decisions
    assert [d.rule for d in on_cuda] == [d.rule for d in on_cpu]
    assert {d.reason for d in on_cuda} == {Reason.NOT_PROFITABLE}


def test_rule_turned_off_by_option() -> None:
    _, decision = run(options={"disabled_rules": "other, relu_squared_matmul"})
    assert decision.reason is Reason.RULE_DISABLED
    _, decision = run(options={"disabled_rules": "relu_matmul"})
    assert decision.status is Status.APPLIED


def test_rule_turned_off_by_inductor() -> None:
    with inductor_config.patch(disabled_passes="relu_squared_matmul"):
        _, decision = run()
    assert decision.reason is Reason.RULE_DISABLED


def test_look_alike_keeps_its_reason_when_the_rule_is_off() -> None:
    gm = trace(
        lambda x, w: F.linear(F.relu(x) ** 3, w), torch.zeros(5, 8), torch.zeros(6, 8)
    )
    record = rewrite(gm, options={"disabled_rules": "relu_squared_matmul"})
    assert record.decisions[0].reason is Reason.EXPONENT_NOT_TWO


def plan(density: float) -> Plan:
    return Plan({"mm:8x6": SitePlan(density, density, 0.25, 0.5, 1, 5)})


def test_planned_density() -> None:
    _, decision = run(plan=plan(0.05))
    assert decision.status is Status.APPLIED
    assert (decision.density, decision.dropped_energy) == (0.05, 0.25)
    sparser = decision.expected_gain
    _, decision = run(plan=plan(0.5))
    assert decision.expected_gain is not None
    assert sparser is not None
    assert sparser > decision.expected_gain >= 1


def test_planned_too_dense() -> None:
    _, decision = run(plan=plan(0.7))
    assert decision.reason is Reason.TOO_DENSE
    assert "0.7" in decision.detail
    assert "0.6" in decision.detail
    _, decision = run(plan=plan(0.55), options={"max_density": 0.5})
    assert decision.reason is Reason.TOO_DENSE


def test_planned_where_skipping_loses() -> None:
    _, decision = run(plan=plan(0.7), options={"max_density": 0.8})
    assert decision.reason is Reason.NOT_PROFITABLE
    assert decision.detail == (
        "the plan measured density 0.7, and with 5 tokens of float32 skipping zeros "
        "wins below 0.6"
    )


def test_demoted_at_run_time() -> None:
    _, decision = run(demoted={"mm:8x6": 0})
    assert decision.reason is Reason.TOO_DENSE
    assert decision.detail.startswith("observed at run time: too many non-zeros")
    _, decision = run(demoted={"mm:9x6": 0})
    assert decision.status is Status.APPLIED
