"""``sparse.quantize_scales``: the first matmul packs, or a word on why it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import compile_cuda, cuda_sources, generate
from torch import Tensor, fx, nn
from tracing import calls, rewrite, trace

from inductor_sparse.decisions import Decision, Status
from inductor_sparse.profitability import KERNELS, UNVERIFIED_KERNELS

D, H, N = 4096, 16384, 4096
FP8 = torch.float8_e4m3fn
PREDICTED = {"quantize": "fp8", "quantize_scales": "predicted"}


def ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)) ** 2, down)


def biased(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.relu(F.linear(x, up, x.new_ones(up.shape[0])))
    return F.linear(h, down, x.new_ones(down.shape[0]))


def run(
    fn: Callable[..., Any] = ffn,
    options: dict[str, Any] | None = None,
    device: str = "cuda",
    sizes: tuple[tuple[int, ...], ...] = ((2, 1024, D), (H, D), (N, H)),
    **how: Any,
) -> tuple[fx.GraphModule, Decision]:
    where = "meta" if device == "cuda" else "cpu"
    args = [torch.randn(size, device=where).bfloat16() for size in sizes]
    gm = trace(fn, *args, device=device, **how)
    decisions = rewrite(
        gm,
        options={**PREDICTED, **(options or {})},
        architecture=lambda device: "sm_90",
        static=range(1, len(sizes)),
    ).decisions
    return gm, decisions[0]


@pytest.mark.parametrize("fn", [ffn, biased])
def test_the_first_matmul_packs(fn: Callable[..., Any]) -> None:
    gm, decision = run(fn)
    assert (decision.status, decision.op) == (Status.APPLIED, "sparse24_mm")
    assert decision.detail.endswith("; scales predicted")
    assert decision.weight_copy_bytes == D * H + H * N + 4 * (H + N)
    (packed,) = calls(gm, "linear_sparsify24_quantized")
    x, _, w1, _, bias, row_scale, activation, select, energy = packed.args
    assert (x.meta["val"].shape, w1.meta["val"].shape) == ((2048, D), (H, D))
    assert (bias is None) == (fn is ffn)
    assert (activation, select) == ("relu2" if fn is ffn else "relu", "largest")
    assert calls(gm, "site_energy") == [energy]
    assert row_scale.meta["val"].shape == (2048,)
    (product,) = calls(gm, "sparse24_mm")
    assert product.args[3] is row_scale
    assert len(calls(gm, "quantized_weight")) == 2
    assert len(calls(gm, "quantize_rows")) == 1
    for gone in ("mm", "addmm", "_scaled_mm", "sparsify24_quantized", "relu"):
        assert calls(gm, gone) == []


def twice(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.relu(F.linear(x, up)) ** 2
    return F.linear(h, down) + F.linear(h, down * 2)


def shared_bias(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    z = torch.addmm(x.new_ones(len(x), 1), x, up.t())
    return F.linear(F.relu(z), down)


@pytest.mark.parametrize(
    ("fn", "options", "why"),
    [
        (
            ffn,
            {"quantize": "int8"},
            "int8 has no exponent that could absorb a loose bound",
        ),
        (twice, {}, "something else reads the activation"),
        (
            shared_bias,
            {},
            "its bias is scaled, or is not a vector with one value per feature",
        ),
    ],
)
def test_scales_stay_exact_where_they_cannot_be_predicted(
    fn: Callable[..., Any], options: dict[str, Any], why: str
) -> None:
    gm, decision = run(fn, options, sizes=((2048, D), (H, D), (N, H)))
    assert decision.op == "sparse24_mm"
    assert decision.detail.endswith(f"; scales not predicted: {why}")
    assert calls(gm, "linear_sparsify24_quantized") == []
    assert len(calls(gm, "sparsify24_quantized")) == 1


def test_scales_stay_exact_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = {**KERNELS["sm_90"]}
    untried = {"linear_sparsify24_quantized": ran.pop("linear_sparsify24_quantized")}
    monkeypatch.setitem(KERNELS, "sm_90", ran)
    _, decision = run()
    assert decision.detail.endswith(
        "; scales not predicted: linear_sparsify24_quantized has no kernel for sm_90"
    )
    monkeypatch.setitem(UNVERIFIED_KERNELS, "sm_90", untried)
    _, decision = run()
    assert decision.detail.endswith(
        "; scales not predicted: the float8_e4m3fn kernel of "
        "linear_sparsify24_quantized never ran on sm_90; "
        "set sparse.allow_unverified to use it"
    )
    _, decision = run(options={"allow_unverified": True})
    assert decision.detail.endswith("; scales predicted")


def test_both_readers_of_an_activation_say_so() -> None:
    def two(x: Tensor, up: Tensor, left: Tensor, right: Tensor) -> Tensor:
        h = F.relu(F.linear(x, up)) ** 2
        return F.linear(h, left) + F.linear(h, right)

    sizes = ((2048, D), (H, D), (N, H), (N, H))
    args = [torch.empty(size, device="meta").bfloat16() for size in sizes]
    decisions = rewrite(
        trace(two, *args, device="cuda"),
        options=PREDICTED,
        architecture=lambda device: "sm_90",
        static=range(1, len(sizes)),
    ).decisions
    why = "; scales not predicted: something else reads the activation"
    assert [d.op for d in decisions] == ["sparse24_mm"] * 2
    assert all(decision.detail.endswith(why) for decision in decisions)


def test_exact_scales_are_the_default() -> None:
    gm, decision = run(options={"quantize_scales": "exact"})
    assert "predicted" not in decision.detail
    assert len(calls(gm, "sparsify24_quantized")) == 1


@pytest.mark.parametrize("fn", [ffn, biased])
def test_the_arithmetic(
    fn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph for a GPU, run by the eager definitions on a CPU."""
    from inductor_sparse.passes import gpu_regimes, regimes

    monkeypatch.setattr(regimes, "ON_GPU", ("cpu",))
    monkeypatch.setattr(gpu_regimes.cuda, "PREFILL_TOKENS", (1,))
    sizes = (2, 16, 32), (64, 32), (32, 64)
    torch.manual_seed(0)
    gm, _ = run(fn, {"activation_format": "2:4"}, device="cpu", sizes=sizes)
    assert len(calls(gm, "linear_sparsify24_quantized")) == 1
    args = [torch.randn(size).bfloat16() for size in sizes]
    args[1][1::2] = -args[1][::2]  # one of two neurons is silent: nothing is dropped
    exact = fn(*(arg.double() for arg in args))
    error = (gm(*args).double() - exact).norm() / exact.norm()
    assert error < 0.08


class Block(nn.Module):
    """A norm, and an FFN behind it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(1024)
        self.up = nn.Linear(1024, 4096, bias=bias)
        self.down = nn.Linear(4096, 1024, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))).square())


@pytest.mark.parametrize("tokens", [(), (8192,)])
@pytest.mark.parametrize("bias", [False, True])
def test_generated_code(bias: bool, tokens: tuple[int, ...], tmp_path: Any) -> None:
    model = Block(bias).bfloat16().to("meta")
    x = torch.empty(8192, 1024, dtype=torch.bfloat16, device="meta")
    made = generate(
        model, x, options={**PREDICTED, "activation_format": "2:4"}, dynamic=tokens
    )
    assert [d.op for d in made.decisions if d.status is Status.APPLIED] == [
        "sparse24_mm"
    ]
    # The norm, the quantization and the bound are one kernel; of a bias, its maximum.
    assert len(made.triton_kernels) == 1 + bias, made.triton_kernels
    first, second = made.cuda_kernels
    assert first.startswith("linear_sparsify24_e4m3")
    assert second.startswith("sparse24_mm")
    assert "extern_kernels." not in made.code
    assert compile_cuda(cuda_sources(made.code)[first], tmp_path).local == 0
