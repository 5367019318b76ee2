"""fp8 products of a quantized activation: sizes, and who else reads the activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from row_quantization import (
    FP8,
    WAYS,
    Quantized,
    by_division,
    layer,
    product,
    relu2,
)
from torch import Tensor, fx
from tracing import calls, rewrite, trace

from inductor_sparse.decisions import Decision, Reason, Status
from inductor_sparse.passes import gpu_obstacles

K = 16384
Function = Callable[..., Any]


PLAIN = layer(by_division)


def run(
    fn: Function, M: int, N: int, **options: str
) -> tuple[fx.GraphModule, Decision]:
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    w = torch.empty(N, K, dtype=FP8, device="meta")
    gm = trace(fn, x, w, torch.empty(1, N, device="meta"), device="cuda")
    context = {"architecture": lambda device: "sm_90", "options": options}
    (decision,) = rewrite(gm, static=[1, 2], **context).decisions
    return gm, decision


@pytest.mark.parametrize("quantize", WAYS)
def test_a_quantized_activation_that_something_else_reads_gains_less(
    quantize: Callable[[Tensor], Quantized],
) -> None:
    def read_by(other: str) -> Function:
        def fn(x: Tensor, w: Tensor, t: Tensor) -> Any:
            h = relu2(x)
            q, s = quantize(h)
            also = {"nothing": x, "h": h, "q": q, "s": s}[other]
            return product(q, s, w, t), also.view(torch.uint8).sum()

        return fn

    _, alone = run(read_by("nothing"), 4096, 8192)
    assert alone.status is Status.APPLIED
    gains = {other: run(read_by(other), 4096, 8192)[1] for other in ("h", "q", "s")}
    assert {found.status for found in gains.values()} == {Status.APPLIED}
    (gain,) = {found.expected_gain for found in gains.values()}
    assert gain < alone.expected_gain
    # With few features the quantization takes as long as packing saves.
    _, alone = run(read_by("nothing"), 4096, 1024)
    _, read = run(read_by("q"), 4096, 1024)
    assert (alone.status, read.reason) == (Status.APPLIED, Reason.NOT_PROFITABLE)


def test_two_products_of_one_quantized_activation_replace_it() -> None:
    def fn(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        q, s = by_division(relu2(x))
        return product(q, s, w, t) + product(q, s, w, 2 * t)

    x = torch.empty(4096, K, dtype=torch.bfloat16, device="meta")
    w = torch.empty(1024, K, dtype=FP8, device="meta")
    gm = trace(fn, x, w, torch.empty(1, 1024, device="meta"), device="cuda")
    found = rewrite(gm, static=[1, 2], architecture=lambda device: "sm_90").decisions
    assert [d.status for d in found] == [Status.APPLIED] * 2
    assert calls(gm, "_scaled_mm") == calls(gm, "amax") == []


@pytest.mark.parametrize("wanted", ["auto", "2:4"])
def test_no_tokens(wanted: str) -> None:
    gm, decision = run(PLAIN, 0, 8192, activation_format=wanted)
    assert decision.reason is Reason.UNSUPPORTED_SHAPE
    assert decision.detail == "M is 0"
    assert len(calls(gm, "_scaled_mm")) == 1


@pytest.mark.parametrize("M", [1, 77])
def test_any_number_of_tokens_can_be_packed(M: int) -> None:
    _, decision = run(PLAIN, M, 8192, activation_format="2:4")
    assert decision.status is Status.APPLIED
    assert run(PLAIN, M, 8192)[1].reason is Reason.NOT_PROFITABLE


def test_sizes_that_depend_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_obstacles, "size_hint", lambda size: None)
    gm, decision = run(PLAIN, 4096, 8192, activation_format="2:4")
    assert decision.reason is Reason.UNSUPPORTED_SHAPE
    assert decision.detail == "a size depends on data"
    assert len(calls(gm, "_scaled_mm")) == 1
