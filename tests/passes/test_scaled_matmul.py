"""fp8 products of a quantized activation, as libraries write them -> packed 2:4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import cuda_sources, generate
from row_quantization import (
    FP8,
    LIMIT,
    WAYS,
    Quantized,
    by_division,
    by_product,
    layer,
    product,
    relu2,
)
from torch import Tensor, fx
from tracing import calls, rewrite, trace

from inductor_sparse import profitability
from inductor_sparse.decisions import Decision, Reason, Status, Tier

M, K, N = 4096, 16384, 8192


def run(
    fn: Callable[..., Tensor],
    shape: tuple[int, ...] = (M, K),
    scales: int = N,
    arch: str = "sm_90",
    device: str = "cuda",
    **context: Any,
) -> tuple[fx.GraphModule, list[Decision]]:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    w = torch.empty(N, K, dtype=FP8, device="meta")
    t = torch.empty((1, scales) if scales > 1 else (), device="meta")
    gm = trace(fn, x, w, t, device=device)
    context.setdefault("architecture", lambda device: arch)
    return gm, rewrite(gm, static=[1, 2], **context).decisions


@pytest.mark.parametrize("quantize", WAYS)
@pytest.mark.parametrize("act", [relu2, F.relu])
@pytest.mark.parametrize("shape", [(M, K), (2, M // 2, K)], ids=["2d", "3d"])
def test_quantized_by_rows(
    quantize: Callable[[Tensor], Quantized],
    act: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
) -> None:
    gm, (decision,) = run(layer(quantize, act), shape)
    begin = profitability.cuda.prefill_min_tokens(K, N, "float8_e4m3fn")
    assert decision.status is Status.APPLIED
    assert decision.detail == (
        f"for this shape, without CUDA graphs, 2:4 wins from {begin} tokens on"
    )
    assert (decision.rule, decision.tier) == ("scaled_matmul", Tier.APPROXIMATE)
    (packed,) = calls(gm, "sparsify24_quantized")
    name = "relu2" if act is relu2 else "relu"
    assert packed.args[1:4] == (name, "largest", FP8)
    assert packed.args[4] is calls(gm, "site_energy")[0]
    (made,) = calls(gm, "sparse24_mm")
    assert made.args[2].meta["val"].stride() == (1, K)
    assert made.args[4].meta["val"].shape == (N,)
    assert calls(gm, "_scaled_mm") == calls(gm, "amax") == calls(gm, "pow") == []


def test_one_scale_for_the_weight_and_a_bias() -> None:
    def fn(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        q, s = by_division(relu2(x))
        bias = x.new_ones(N)
        return product(q, s, w, t * t.new_ones(1, N), bias=bias)

    gm, (decision,) = run(fn, scales=1)
    assert decision.status is Status.APPLIED
    assert calls(gm, "sparse24_mm")[0].args[4].meta["val"].shape == (N,)
    assert len(calls(gm, "add")) == 1


def whole_tensor(h: Tensor) -> Quantized:
    scale = h.abs().amax().float() / LIMIT
    return (h / scale).to(FP8), scale * scale.new_ones(*h.shape[:-1], 1)


def given_scale(h: Tensor) -> Quantized:
    scale = h.new_ones(*h.shape[:-1], 1, dtype=torch.float32)
    return (h / scale).to(FP8), scale


def wrong_scale(h: Tensor) -> Quantized:
    q, s = by_division(h)
    return q, s.reciprocal()


def other_rows(h: Tensor) -> Quantized:
    s = (h + 1).abs().amax(dim=-1, keepdim=True).float() / LIMIT
    return (h / s).to(FP8), s


def not_scaled(h: Tensor) -> Quantized:
    return h.to(FP8), h.abs().amax(dim=-1, keepdim=True).float()


def half_scale(h: Tensor) -> Quantized:
    q, s = by_division(h)
    return q, s * 0.5


def another_multiple(h: Tensor) -> Quantized:
    amax = h.abs().amax(dim=-1, keepdim=True).float()
    return (h.float() * (LIMIT / amax)).clamp(-LIMIT, LIMIT).to(FP8), amax / 224


def clipped_scale(h: Tensor) -> Quantized:
    q, s = by_division(h)
    return q, s.clamp(max=0.001)


def clipped_values(h: Tensor) -> Quantized:
    s = h.abs().amax(dim=-1, keepdim=True).float() / LIMIT
    return (h.float() / s).clamp(max=20.0).to(FP8), s


def clipped_maximum(h: Tensor) -> Quantized:
    s = h.abs().amax(dim=-1, keepdim=True).clamp(max=3.0).float() / LIMIT
    return (h.float() / s).clamp(-LIMIT, LIMIT).to(FP8), s


def clipped_by_a_tensor(h: Tensor) -> Quantized:
    amax = h.abs().amax(dim=-1, keepdim=True).float()
    s = amax.minimum(amax.new_full((), 3.0)) / LIMIT
    return (h.float() / s).clamp(-LIMIT, LIMIT).to(FP8), s


def bounded_by_another_value(h: Tensor) -> Quantized:
    amax = h.abs().amax(dim=-1, keepdim=True).float()
    s = amax.maximum(h.float().sum(dim=-1, keepdim=True)) / LIMIT
    return (h.float() / s).clamp(-LIMIT, LIMIT).to(FP8), s


def clipped_inverse(h: Tensor) -> Quantized:
    scale = (LIMIT / h.abs().amax(dim=-1, keepdim=True).float()).clamp(min=1.0)
    return (h.float() * scale).clamp(-LIMIT, LIMIT).to(FP8), scale.reciprocal()


def for_another_format(h: Tensor) -> Quantized:
    s = h.abs().amax(dim=-1, keepdim=True).float() / torch.finfo(torch.float8_e5m2).max
    return (h.float() / s).clamp(-LIMIT, LIMIT).to(FP8), s


def where_the_largest_is(h: Tensor) -> Quantized:
    s = h.max(dim=-1, keepdim=True)[1].float() / LIMIT
    return (h.float() / s).to(FP8), s


def inverse_maximum(h: Tensor) -> Quantized:
    s = LIMIT / h.abs().amax(dim=-1, keepdim=True).float()
    return (h.float() / s).to(FP8), s


def negated(h: Tensor) -> Quantized:
    s = h.abs().amax(dim=-1, keepdim=True).float() / -LIMIT
    return (h.float() / s).to(FP8), s


def in_powers_of_two(h: Tensor) -> Quantized:
    s = h.abs().amax(dim=-1, keepdim=True).float() / LIMIT
    return (h.float() / s).to(FP8), s.to(torch.float8_e8m0fnu).float()


def with_headroom(h: Tensor) -> Quantized:
    s = h.abs().amax(dim=-1, keepdim=True).float() / 224
    return (h.float() / s).to(FP8), 1.0 / (1.0 / s)


def bounded_inverse(h: Tensor) -> Quantized:
    """An upper bound of 448 / amax is a lower one of the scale: for rows of zeros."""
    scale = (LIMIT / h.abs().amax(dim=-1, keepdim=True).float()).clamp(max=1e12)
    return (h.float() * scale).to(FP8), scale.reciprocal()


def bounded_by_a_tensor(h: Tensor) -> Quantized:
    amax = h.abs().amax(dim=-1, keepdim=True).float()
    s = amax.maximum(amax.new_full((), 1e-12)) / LIMIT
    return (h.float() / s).to(FP8), s


@pytest.mark.parametrize(
    "quantize", [with_headroom, bounded_inverse, bounded_by_a_tensor]
)
def test_scales_that_lose_nothing(quantize: Callable[[Tensor], Quantized]) -> None:
    _, (decision,) = run(layer(quantize))
    assert decision.status is Status.APPLIED


NOT_THE_LARGEST = "the scale of a row is not taken from the largest value of the row"
WRONG_SCALE = "the scale of the product is not the one that the rows were divided by"
CLIPPED = "values are clipped that e4m3 could hold after another scaling"


@pytest.mark.parametrize(
    ("quantize", "detail"),
    [
        (whole_tensor, NOT_THE_LARGEST),
        (given_scale, NOT_THE_LARGEST),
        (other_rows, NOT_THE_LARGEST),
        (where_the_largest_is, NOT_THE_LARGEST),
        (negated, NOT_THE_LARGEST),
        (wrong_scale, WRONG_SCALE),
        (half_scale, WRONG_SCALE),
        (another_multiple, WRONG_SCALE),
        (clipped_scale, WRONG_SCALE),
        (in_powers_of_two, WRONG_SCALE),
        (inverse_maximum, WRONG_SCALE),
        (clipped_values, CLIPPED),
        (clipped_by_a_tensor, CLIPPED),
        (bounded_by_another_value, NOT_THE_LARGEST),
        (clipped_maximum, CLIPPED),
        (clipped_inverse, CLIPPED),
        (for_another_format, CLIPPED),
        (not_scaled, "the operand is not divided by a scale"),
    ],
)
def test_look_alikes(quantize: Callable[[Tensor], Quantized], detail: str) -> None:
    gm, (decision,) = run(layer(quantize))
    assert decision.reason is Reason.NO_KERNEL_YET
    assert decision.detail == detail
    assert len(calls(gm, "_scaled_mm")) == 1


def refusal(fn: Callable[..., Tensor], t: Tensor) -> str:
    """Why a product with the scales ``t`` of the weight stays dense."""
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    w = torch.empty(N, K, dtype=FP8, device="meta")
    gm = trace(fn, x, w, t, device="cuda")
    (decision,) = rewrite(gm, static=[1, 2]).decisions
    assert decision.reason is Reason.NO_KERNEL_YET
    return decision.detail


def test_one_scale_for_the_activation() -> None:
    def fn(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        h = relu2(x)
        scale = h.abs().amax().float() / LIMIT
        return product((h / scale).to(FP8), scale, w, t)

    detail = "the activation has one scale for the whole tensor; ours are per row"
    assert refusal(fn, torch.empty((), device="meta")) == detail


def test_scales_of_blocks() -> None:
    def fn(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        blocks = relu2(x).unflatten(-1, (-1, 128))
        scale = blocks.abs().amax(-1).float() / LIMIT
        q = (blocks / scale.unsqueeze(-1)).to(FP8).flatten(-2)
        scale = scale.t().clone(memory_format=torch.contiguous_format).t()
        return product(q, scale, w, t.t(), use_fast_accum=False)

    # For this K there are as many blocks as features.
    t = torch.empty(N // 128, K // 128, device="meta")
    assert t.numel() == N
    assert refusal(fn, t) == "the activation is scaled in blocks"


def test_smooth_activation() -> None:
    _, (decision,) = run(layer(by_division, F.silu))
    assert decision.reason is Reason.ACTIVATION_NOT_SPARSE
    assert run(layer(by_division, lambda x: x))[1] == []


def test_another_result_dtype() -> None:
    def fn(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        q, s = by_division(relu2(x))
        one = s.flatten().select(0, 0)
        return product(q, one, w, t, out_dtype=torch.float32)

    _, (decision,) = run(fn, scales=1)
    assert decision.reason is Reason.UNSUPPORTED_DTYPE
    assert decision.detail == (
        "float8_e4m3fn by float8_e4m3fn to float32; e4m3 to bfloat16 is known"
    )


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        ({"arch": "sm_89"}, Reason.ARCH_UNSUPPORTED),
        ({"shape": (256, K)}, Reason.NOT_PROFITABLE),
        ({"is_training": True}, Reason.TRAINING_GRAPH),
        ({"options": {"activation_format": "exact"}}, Reason.NO_KERNEL_YET),
        ({"options": {"disabled_rules": "scaled_matmul"}}, Reason.RULE_DISABLED),
    ],
)
def test_obstacles(context: dict[str, Any], reason: Reason) -> None:
    gm, (decision,) = run(layer(by_division), **context)
    assert decision.reason is reason
    assert len(calls(gm, "_scaled_mm")) == 1


def test_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph for a GPU, run by the eager definitions on a CPU."""
    from inductor_sparse.passes import scaled_matmul

    monkeypatch.setattr(scaled_matmul, "ON_GPU", ("cpu",))
    torch.manual_seed(0)
    x = torch.randn(8, 64).bfloat16()
    x[:, 1::2] = -x[:, ::2].abs()  # every other neuron is silent: nothing is dropped
    w, t = (torch.randn(32, 64) * 20).to(FP8), torch.rand(1, 32) + 0.5
    gm = trace(layer(by_product), x, w, t)
    record = rewrite(
        gm,
        static=[1, 2],
        options={"activation_format": "2:4"},
        architecture=lambda device: "sm_90",
    )
    assert [d.op for d in record.applied] == ["sparse24_mm"]
    exact = relu2(x.double()) @ (w.double() * t.double().t()).t()
    error = (gm(x, w, t).double() - exact).norm() / exact.norm()
    assert error < 0.05


@pytest.mark.parametrize("quantize", WAYS)
def test_it_is_lowered(quantize: Callable[[Tensor], Quantized]) -> None:
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    w = torch.empty(N, K, dtype=FP8, device="meta")
    t = torch.empty(1, N, device="meta")
    generated = generate(layer(quantize), x, w, t, options={})
    assert [d.status for d in generated.decisions] == [Status.APPLIED]
    assert "._scaled_mm(" not in generated.code
    assert len(cuda_sources(generated.code)) == 1
