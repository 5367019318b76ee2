"""Thresholds on magnitudes: found however they are spelled, skipped, never packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from torch import Tensor
from tracing import calls, rewrite, rewrite_one, rewrite_skipping, trace

from inductor_sparse import config
from inductor_sparse.decisions import Reason, Status, Tier

Activation = Callable[[Tensor], Tensor]
HALF = torch.tensor(0.5)


def by_index(x: Tensor) -> Tensor:
    h = x.clone()
    h[h.abs() < 0.5] = 0
    return h


SPELLINGS: dict[str, Activation] = {
    "where(|x| > t)": lambda x: torch.where(x.abs() > 0.5, x, 0.0),
    "where(|x| <= t)": lambda x: torch.where(x.abs() <= 0.5, torch.zeros_like(x), x),
    "x * (|x| > t)": lambda x: x * (x.abs() > 0.5),
    "(|x| >= t) * x": lambda x: x.abs().ge(0.5) * x,
    "mask as float": lambda x: x * (x.abs() > 0.5).to(x.dtype),
    "a threshold for each neuron": lambda x: torch.where(
        x.abs() > x.new_full((8,), 0.5), x, 0.0
    ),
    "in float32": lambda x: torch.where(x.float().abs() > 0.5, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x.abs() < 0.5, 0.0),
    "by index": by_index,
    "hardshrink": lambda x: F.hardshrink(x, 0.5),
    "softshrink": lambda x: F.softshrink(x, 0.5),
    "squared": lambda x: torch.where(x.abs() > 0.5, x, 0.0) ** 2,
    "silu of it": lambda x: F.silu(torch.where(x.abs() > 0.5, x, 0.0)),
    "of silu": lambda x: F.hardshrink(F.silu(x), 0.5),
    "scaled": lambda x: 2 * torch.where(x.abs() > 0.5, x, 0.0),
}
NOT_ONE: dict[str, Activation] = {
    "never below it": lambda x: torch.where(x.abs() > -1.0, x, 0.0),
    "only zeros": lambda x: torch.where(x.abs() > 0.0, x, 0.0),
    "what is large": lambda x: torch.where(x.abs() > 0.5, 0.0, x),
    "factor where it is small": lambda x: x * (x.abs() < 0.5),
    "of something else": lambda x: torch.where((x + 1).abs() > 0.5, x, 0.0),
    "not zero": lambda x: torch.where(x.abs() > 0.5, x, 1.0),
    "signed": lambda x: torch.where(x > -0.5, x, 0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_zeros_are_skipped_and_values_kept(name: str, dtype: torch.dtype) -> None:
    act = SPELLINGS[name]
    x, w = torch.randn(2, 3, 8).to(dtype), torch.randn(6, 8).to(dtype)
    decision = rewrite_skipping(act, x, w)
    assert (decision.rule, decision.op) == ("magnitude_matmul", "activation_spmm")
    assert decision.tier is Tier.EXACT
    assert "magnitude" in decision.activation


@pytest.mark.parametrize("name", NOT_ONE)
def test_what_is_none(name: str) -> None:
    act = NOT_ONE[name]
    gm = trace(lambda x, w: F.linear(act(x), w), torch.randn(5, 8), torch.randn(6, 8))
    assert rewrite(gm, static=[1]).decisions == []


def test_a_threshold_that_is_a_tensor() -> None:
    def fn(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.linear(torch.where(x.abs() > t, x, 0.0), w)

    x, w = torch.randn(5, 8), torch.randn(6, 8)
    gm, decision = rewrite_one(fn, x, w, HALF)
    assert decision.rule == "magnitude_matmul"
    torch.testing.assert_close(gm(x, w, HALF), fn(x, w, HALF))


def test_nan_and_values_at_the_threshold_stay_what_they_are() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(torch.where(x.abs() >= 0.5, x, 0.0), w)

    x, w = torch.full((3, 8), 0.25), torch.randn(6, 8)
    x[0, 1], x[1, 2], x[2, 3] = torch.nan, -0.5, torch.inf
    gm, _ = rewrite_one(fn, x, w)
    torch.testing.assert_close(gm(x, w), fn(x, w), equal_nan=True)


D, HIDDEN = 8, 16


def cats(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = F.silu(F.linear(x, gate))
    return F.linear(torch.where(g.abs() > 0.3, g, 0.0) * F.linear(x, up), down)


def masked(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = F.silu(F.linear(x, gate))
    return F.linear(g * (g.abs() > 0.3) * F.linear(x, up), down)


def fatrelu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.threshold(F.linear(x, gate), 0.3, 0.0) * F.linear(x, up), down)


def scaled(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = F.hardshrink(F.linear(x, gate), 0.3)
    return F.linear(g * 2 * F.linear(x, up), down)


def both(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g, u = F.hardshrink(F.linear(x, gate), 0.3), F.hardshrink(F.linear(x, up), 0.3)
    return F.linear(g * u, down)


def wide_up(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = F.hardshrink(F.linear(x, gate), 0.3).half()
    return F.linear(g * F.linear(x, up), down)


GATED: dict[Any, tuple[str, str, str]] = {
    cats: ("magnitude_matmul", "glu_spmm", "magnitude*up"),
    masked: ("magnitude_matmul", "glu_spmm", "magnitude*up"),
    fatrelu: ("gated_matmul", "glu_spmm", "relu*up"),
    scaled: ("magnitude_matmul", "activation_spmm", "magnitude*up"),
    both: ("magnitude_matmul", "activation_spmm", "magnitude*magnitude"),
    wide_up: ("magnitude_matmul", "activation_spmm", "magnitude*up"),
}


@pytest.mark.parametrize("fn", GATED, ids=lambda fn: fn.__name__)
def test_a_gate_skips_the_up_projection(fn: Callable[..., Tensor]) -> None:
    sizes = (2, 3, D), (HIDDEN, D), (HIDDEN, D), (D, HIDDEN)
    args = [torch.randn(size) for size in sizes]
    gm, decision = rewrite_one(fn, *args)
    assert decision.status is Status.APPLIED
    assert (decision.rule, decision.op, decision.activation) == GATED[fn]
    for glu in calls(gm, "glu_spmm"):
        assert glu.args[4] == "identity"
    assert len(calls(gm, "mm")) == (1 if decision.op == "glu_spmm" else 2)
    exact = fn(*(arg.double() for arg in args))
    assert_within_budget(gm(*args), fn(*args), exact)


def test_many_tokens_on_a_gpu_are_not_packed() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.hardshrink(x, 0.5), w)

    def run(M: int, **options: Any) -> Any:
        shapes = (M, 16384), (4096, 16384)
        args = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes]
        how = {"architecture": lambda device: "sm_90", "options": options}
        with config.patch(cuda_graphs=True):
            return rewrite_one(fn, *args, device="cuda", **how)[1]

    assert run(1).op == "activation_spmm"
    many = run(8192)
    assert many.reason is Reason.NOT_PROFITABLE
    assert "2:4" not in many.detail
    forced = run(8192, activation_format="2:4")
    assert forced.reason is Reason.NO_KERNEL_YET
    assert forced.detail == "the rule magnitude_matmul has no 2:4 rewrite"


def test_a_disabled_rule() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.hardshrink(x, 0.5), w)

    options = {"disabled_rules": "magnitude_matmul"}
    _, decision = rewrite_one(fn, torch.randn(5, 8), torch.randn(6, 8), options=options)
    assert decision.reason is Reason.RULE_DISABLED
