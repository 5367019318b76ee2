"""``sparse.quantize``: both matmuls of an FFN in 8 bits, or a word on why not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import skip_where_int8_saturates
from torch import Tensor, fx
from tracing import calls, rewrite, trace

from inductor_sparse import config
from inductor_sparse.decisions import Decision, Reason, Status, Tier
from inductor_sparse.passes import relu_squared_matmul
from inductor_sparse.passes.gpu_regimes import HOST_BOUND
from inductor_sparse.profitability import KERNELS, cuda

D, H, N = 4096, 16384, 4096
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)) ** 2, down)


def biased(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.relu(F.linear(x, up, x.new_ones(up.shape[0])))
    return F.linear(h, down, x.new_ones(down.shape[0]))


def weighted(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    bias = x.new_ones(up.shape[0])
    z = torch.addmm(bias, x.flatten(0, -2), up.t(), beta=0.5, alpha=2)
    return F.linear(F.relu(z), down).unflatten(0, x.shape[:-1])


def run(
    fn: Callable[..., Any] = ffn,
    quantize: str = "fp8",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    sizes: tuple[tuple[int, ...], ...] = ((2, 1024, D), (H, D), (N, H)),
    **context: Any,
) -> tuple[fx.GraphModule, Decision]:
    where = "meta" if device == "cuda" else "cpu"
    args = [torch.randn(size, device=where).to(dtype) for size in sizes]
    gm = trace(fn, *args, device=device)
    context.setdefault("architecture", lambda device: "sm_90")
    context.setdefault("static", [1, 2])
    options = {"quantize": quantize, **context.pop("options", {})}
    (decision,) = rewrite(gm, options=options, **context).decisions
    return gm, decision


@pytest.mark.parametrize("fn", [ffn, biased])
@pytest.mark.parametrize(("quantize", "dtype"), [("fp8", FP8), ("int8", INT8)])
def test_both_matmuls_run_in_8_bits(
    fn: Callable[..., Any], quantize: str, dtype: torch.dtype
) -> None:
    gm, decision = run(fn, quantize)
    assert (decision.status, decision.op) == (Status.APPLIED, "sparse24_mm")
    assert decision.tier is Tier.APPROXIMATE
    assert decision.weight_copy_bytes == D * H + H * N + 4 * (H + N)
    (packed,) = calls(gm, "sparsify24_quantized")
    act = "relu2" if fn is ffn else "relu"
    assert packed.args[1:4] == (act, "largest", dtype)
    assert calls(gm, "site_energy") == [packed.args[4]]
    assert len(calls(gm, "quantized_weight")) == 2
    assert len(calls(gm, "quantize_rows")) == 1
    first = "_scaled_mm" if quantize == "fp8" else "_int_mm"
    assert len(calls(gm, first)) == 1
    assert calls(gm, "mm") == calls(gm, "addmm") == calls(gm, "sparsify24") == []
    (product,) = calls(gm, "sparse24_mm")
    assert product.args[2].meta["val"].stride() == (1, H)
    assert product.meta["val"].dtype == torch.bfloat16


def test_the_bias_of_the_first_matmul_stays_inside() -> None:
    gm, _ = run(biased)
    (first,) = calls(gm, "_scaled_mm")
    assert isinstance(first.args[4], fx.Node)
    assert len(calls(gm, "add")) == 1  # the bias of the second


def test_two_matmuls_of_one_activation_share_the_first() -> None:
    def fn(x: Tensor, up: Tensor, down: Tensor, other: Tensor) -> Tensor:
        h = F.relu(F.linear(x, up)) ** 2
        return F.linear(h, down) + F.linear(h, other)

    sizes = (2048, D), (H, D), (N, H), (N, H)
    args = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in sizes]
    gm = trace(fn, *args, device="cuda")
    record = rewrite(
        gm,
        static=[1, 2, 3],
        options={"quantize": "fp8"},
        architecture=lambda device: "sm_90",
    )
    assert len(record.applied) == len(calls(gm, "sparse24_mm")) == 2
    assert len(calls(gm, "_scaled_mm")) == len(calls(gm, "sparsify24_quantized")) == 1
    assert [d.weight_copy_bytes for d in record.applied] == [
        D * H + H * N + 4 * (H + N),
        H * N + 4 * N,
    ]


def test_weights_that_are_computed_are_not_quantized() -> None:
    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return ffn(x, up, down * 2)

    gm, decision = run(fn)
    assert decision.status is Status.APPLIED
    assert calls(gm, "sparsify24_quantized") == []
    assert "; not quantized: the weight is not row-contiguous" in decision.detail


def read_twice(x: Tensor, up: Tensor, down: Tensor) -> Any:
    z = F.linear(x, up)
    return F.linear(F.relu(z), down), z


def without_first(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(torch.cat([x] * 4, -1)), down)


def scaled(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)) * 0.5, down)


def gated_by_itself(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    z = F.linear(x, up)
    return F.linear(F.relu(z) * z.sigmoid(), down)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (read_twice, "the layer before the activation is read by something else"),
        (without_first, "the activation is not that of a linear layer"),
        (scaled, "something lies between the activation and its matmul"),
        (gated_by_itself, "the layer before the activation is read by something else"),
    ],
)
def test_look_alikes_stay_in_16_bits(fn: Callable[..., Any], why: str) -> None:
    gm, decision = run(fn)
    assert decision.op == "sparse24_mm"
    assert decision.detail.endswith(f"; not quantized: {why}")
    assert calls(gm, "quantized_weight") == []
    assert len(calls(gm, "sparsify24")) == 1


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_a_small_ffn_without_cuda_graphs_stays_in_16_bits(
    quantize: str, graphs: bool
) -> None:
    sizes = (8192, 1024), (4096, 1024), (1024, 4096)
    with config.patch(cuda_graphs=graphs):
        gm, decision = run(quantize=quantize, sizes=sizes)
        forced = {"activation_format": "2:4"}
        _, asked_for = run(quantize=quantize, sizes=sizes, options=forced)
    assert decision.status is asked_for.status is Status.APPLIED
    assert len(calls(gm, "sparsify24_quantized")) == graphs
    assert decision.detail.endswith(f"; not quantized: {HOST_BOUND}") != graphs
    assert "not quantized" not in asked_for.detail


def test_what_wins_in_no_number_of_bits_is_told_that_of_8() -> None:
    sizes = (256, 1024), (4096, 1024), (1024, 4096)
    _, decision = run(sizes=sizes)
    assert decision.reason is Reason.NOT_PROFITABLE
    assert decision.detail.endswith("2:4 never wins")
    assert cuda.prefill_min_tokens(4096, 1024, "bfloat16") is not None


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (1, "; not quantized: products of int8 need 17 tokens or more"),
        (16, "; not quantized: products of int8 need 17 tokens or more"),
        (17, ""),
    ],
)
def test_int8_needs_some_tokens(tokens: int, why: str) -> None:
    forced = {"activation_format": "2:4"}
    sizes = (tokens, D), (H, D), (N, H)
    gm, decision = run(quantize="int8", sizes=sizes, options=forced)
    assert decision.detail.partition("; ")[2] == why.removeprefix("; ")
    assert len(calls(gm, "_int_mm")) == (not why)
    gm, _ = run(quantize="fp8", sizes=sizes, options=forced)
    assert len(calls(gm, "_scaled_mm")) == 1


@pytest.mark.parametrize("first", [True, False])
def test_sums_of_int8_fit_in_32_bits(first: bool) -> None:
    longest = 131056  # times 128 squared is the last multiple of 16 below 2**31
    for K, fits in ((longest, True), (longest + 16, False)):
        sizes = ((2048, K), (H, K), (N, H)) if first else ((2048, D), (K, D), (N, K))
        for quantize in ("int8", "fp8"):
            gm, decision = run(quantize=quantize, sizes=sizes)
            quantized = bool(calls(gm, "quantized_weight"))
            assert quantized == (fits or quantize == "fp8")
            why = (
                "not quantized: sums of more than 131071 products of int8 may overflow"
            )
            assert decision.detail.endswith(why) != quantized


def test_float16_is_for_int8() -> None:
    _, decision = run(dtype=torch.float16)
    assert decision.detail.endswith(
        "; not quantized: fp8 products with per-row scales need a bfloat16 model"
    )
    gm, _ = run(quantize="int8", dtype=torch.float16)
    assert len(calls(gm, "sparsify24_quantized")) == 1
    assert calls(gm, "sparse24_mm")[0].meta["val"].dtype == torch.float16


def test_sizes_that_8_bit_products_do_not_take() -> None:
    sizes = (2048, D + 8), (H, D + 8), (N, H)
    _, decision = run(sizes=sizes)
    assert decision.detail.endswith("must be multiples of 16")


def test_an_architecture_without_8_bit_kernels() -> None:
    gm, decision = run(
        architecture=lambda device: "sm_80", options={"allow_unverified": True}
    )
    assert decision.op == "sparse24_mm"
    assert "; not quantized: sparsify24_quantized has no kernel" in decision.detail
    assert calls(gm, "quantized_weight") == []


ONE_TOKEN = ((1, 1, D), (H, D), (N, H))


GRAPHS = {"cuda_graphs": True}
UNVERIFIED = {**GRAPHS, "allow_unverified": True}


def test_unless_asked_a_few_tokens_skip_zeros_in_16_bits() -> None:
    gm, decision = run(sizes=ONE_TOKEN, quantize="none", options=GRAPHS)
    assert (decision.op, decision.tier) == ("activation_spmm", Tier.EXACT)
    assert calls(gm, "quantized_weight") == []
    assert "rows" not in decision.detail


def test_rows_stay_in_16_bits_where_only_those_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = frozenset({"bfloat16", "float16"})
    monkeypatch.setitem(KERNELS, "sm_89", {"activation_spmm": half})
    how: dict[str, Any] = {"architecture": lambda device: "sm_89"}
    gm, decision = run(sizes=ONE_TOKEN, options=GRAPHS, **how)
    assert (decision.op, decision.tier) == ("activation_spmm", Tier.EXACT)
    assert calls(gm, "quantized_weight") == []
    assert decision.detail.endswith(
        "; rows not quantized: the float8_e4m3fn kernel of activation_spmm never ran "
        "on sm_89; set sparse.allow_unverified to use it"
    )
    gm, decision = run(sizes=ONE_TOKEN, options=UNVERIFIED, **how)
    assert decision.tier is Tier.APPROXIMATE
    assert len(calls(gm, "quantized_weight")) == 1


@pytest.mark.parametrize(("quantize", "dtype"), [("fp8", FP8), ("int8", INT8)])
def test_a_few_tokens_read_rows_in_8_bits(quantize: str, dtype: torch.dtype) -> None:
    gm, decision = run(biased, quantize, sizes=ONE_TOKEN, options=GRAPHS)
    assert (decision.op, decision.tier) == ("activation_spmm", Tier.APPROXIMATE)
    name = str(dtype).removeprefix("torch.")
    assert decision.detail.endswith(
        f"; rows of the weight in {name}, each with a scale"
    )
    assert decision.weight_copy_bytes == H * N + 4 * H
    (product,) = calls(gm, "activation_spmm")
    _, w, activation, counters, scale = product.args
    assert (activation, counters) == ("relu", None)
    assert (w.meta["val"].dtype, w.meta["val"].shape) == (dtype, (H, N))
    assert scale.meta["val"].shape == (H,)
    (weight,) = calls(gm, "quantized_weight")
    assert weight.args[1:] == ([H, N], [1, H], 0, dtype)
    assert calls(gm, "row_major_weight") == []


def computed(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.relu(F.linear(x, up)) @ (down.view(H, N) * 2)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"fn": gated_by_itself}, "only those of a plain ReLU or ReLU² FFN are"),
        (
            {"dtype": torch.float32},
            "only those of a bfloat16 or float16 weight are",
        ),
        ({"is_training": True}, "the graph has a backward"),
        (
            {"options": {**GRAPHS, "activation_format": "exact"}},
            "sparse.activation_format allows only exact rewrites",
        ),
        (
            {"architecture": lambda device: "sm_80", "options": UNVERIFIED},
            "activation_spmm has no float8_e4m3fn kernel for sm_80 yet",
        ),
        (
            {"fn": computed},
            "the weight is not row-contiguous, and no copy of it can be kept: it is "
            "computed, or passed in as an argument",
        ),
    ],
    ids=["gated", "float32", "training", "exact", "architecture", "computed"],
)
def test_rows_that_stay_as_they_are(how: dict[str, Any], why: str) -> None:
    gm, decision = run(sizes=ONE_TOKEN, **{"options": GRAPHS, **how})
    assert calls(gm, "quantized_weight") == []
    assert (decision.op, decision.tier) == ("activation_spmm", Tier.EXACT)
    assert decision.detail.endswith(f"; rows not quantized: {why}")


def test_a_rule_that_knows_no_8_bit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relu_squared_matmul.RULE, "packs", False)
    gm, decision = run(sizes=ONE_TOKEN, options=GRAPHS)
    assert calls(gm, "quantized_weight") == []
    assert decision.detail.endswith(
        "; rows not quantized: relu_squared_matmul does not know them"
    )


def test_rows_of_8_bits_take_half_of_the_time() -> None:
    sizes = ((1, 1, 2048), (8192, 2048), (2048, 8192))
    found = {}
    for quantize in ("none", "int8"):
        _, decision = run(biased, quantize, sizes=sizes, options=GRAPHS)
        found[quantize] = decision.expected_gain
    cost = functools.partial(cuda.decode_gain, 1, 8192, 2048, "bfloat16", None)
    assert found == {"none": cost(), "int8": cost(read_dtype="int8")}
    assert cost(read_dtype="int8") > cost()
    # All rows of a large weight: the dense product reads twice as many bytes.
    large = functools.partial(cuda.decode_gain, 1, 2**18, 2**14, "bfloat16", 1.0)
    assert large() == pytest.approx(1, abs=0.02)
    assert large(read_dtype="int8") == pytest.approx(2, abs=0.02)


def test_rows_of_8_bits_move_the_limits() -> None:
    sizes = ((8, D), (H, D), (N, H))
    plain, halved = (
        run(biased, how, sizes=sizes, options=GRAPHS)[1] for how in ("none", "int8")
    )
    limit = functools.partial(cuda.decode_max_tokens, H, N, "bfloat16", None)
    assert (limit(), limit(read_dtype="int8")) == (2, 8)
    assert (plain.op, halved.op) == ("", "activation_spmm")
    assert "skipping zeros wins up to 8 tokens" in halved.detail


def test_a_cpu_has_nothing_to_do_with_it() -> None:
    _, decision = run(device="cpu", sizes=((2, 3, 32), (64, 32), (32, 64)))
    assert (decision.op, decision.tier) == ("activation_spmm", Tier.EXACT)


class OnCpu(fx.Interpreter):
    """Runs a graph for a GPU where torch's fp8 product knows no scales of rows."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.aten._scaled_mm.default:
            return super().call_function(target, args, kwargs)
        x, w, row, column, bias, _, dtype, _ = args
        out = (x.float() * row) @ (w.float() * column)
        return (out if bias is None else out + bias).to(dtype)


@pytest.mark.parametrize("fn", [ffn, biased, weighted])
@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_the_arithmetic(
    fn: Callable[..., Any], quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph for a GPU, run by the eager definitions on a CPU."""
    from inductor_sparse.passes import gpu_regimes, regimes

    if quantize == "int8":
        skip_where_int8_saturates()
    monkeypatch.setattr(regimes, "ON_GPU", ("cpu",))
    monkeypatch.setattr(gpu_regimes.cuda, "PREFILL_TOKENS", (1,))
    sizes = (2, 16, 32), (64, 32), (32, 64)
    torch.manual_seed(0)
    gm, _ = run(
        fn, quantize, device="cpu", sizes=sizes, options={"activation_format": "2:4"}
    )
    assert len(calls(gm, "sparsify24_quantized")) == 1
    args = [torch.randn(size).bfloat16() for size in sizes]
    args[1][1::2] = -args[1][::2]  # one of two neurons is silent: nothing is dropped
    exact = fn(*(arg.double() for arg in args))
    error = (OnCpu(gm).run(*args).double() - exact).norm() / exact.norm()
    assert error < 0.08
