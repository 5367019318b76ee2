"""On a GPU: a few tokens skip zeros, many are packed 2:4, and between is dense."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from tracing import calls, rewrite, trace

from inductor_sparse import config, profitability
from inductor_sparse.decisions import Decision, Reason, Status, Tier
from inductor_sparse.plan import Plan, SitePlan

pytestmark = pytest.mark.usefixtures("launched_by_cuda_graphs")

K, N = 16384, 4096
FEW = profitability.cuda.decode_max_tokens(K, N, "bfloat16", None)
MANY = profitability.cuda.prefill_min_tokens(K, N, "bfloat16", graphs=True)
LIMITS = (
    f"for this shape skipping zeros wins up to {FEW} tokens, "
    f"2:4 wins from {MANY} tokens on"
)
HALF = [torch.bfloat16, torch.float16]
UNVERIFIED = {"allow_unverified": True}


def ffn(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x) ** 2, w)


def relu_ffn(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x), w)


def scaled(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x) ** 2 * 0.5, w)


def gated(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x) * (x + 1), w)


def run(
    fn: Callable[..., Any] = ffn,
    M: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    arch: str = "sm_90",
    outputs: int = N,
    **context: Any,
) -> tuple[fx.GraphModule, Decision]:
    x = torch.empty(M, K, dtype=dtype, device="meta")
    w = torch.empty(outputs, K, dtype=dtype, device="meta")
    gm = trace(fn, x, w, device="cuda")
    context.setdefault("architecture", lambda device: arch)
    (decision,) = rewrite(gm, static=[1], **context).decisions
    assert decision.arch == arch
    assert decision.device == "cuda"
    return gm, decision


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("fn", "arguments"),
    [
        (ffn, ("relu2", "largest")),
        (relu_ffn, ("relu", "largest")),
        (scaled, ("identity", "largest_abs")),
        (gated, ("identity", "largest_abs")),
    ],
)
def test_many_tokens_are_packed(
    fn: Callable[..., Tensor], arguments: tuple[str, str], dtype: torch.dtype
) -> None:
    gm, decision = run(fn, dtype=dtype)
    assert (decision.status, decision.op) == (Status.APPLIED, "sparse24_mm")
    assert decision.tier is Tier.APPROXIMATE
    assert decision.weight_copy_bytes == 0
    assert decision.expected_gain is not None
    assert decision.expected_gain > 1
    (packed,) = calls(gm, "sparsify24")
    assert packed.args[1:3] == arguments
    (product,) = calls(gm, "sparse24_mm")
    assert product.args[2].meta["val"].stride() == (1, K)  # as nn.Linear stores it
    assert calls(gm, "mm") == calls(gm, "row_major_weight") == []


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_a_few_tokens_skip_zeros(dtype: torch.dtype) -> None:
    gm, decision = run(M=FEW, dtype=dtype)
    assert (decision.status, decision.op) == (Status.APPLIED, "activation_spmm")
    assert decision.tier is Tier.EXACT
    assert decision.weight_copy_bytes == K * N * dtype.itemsize
    assert len(calls(gm, "activation_spmm")[0].args) == 3  # nothing is counted


@pytest.mark.parametrize("M", [0, 1, 3, 2047, 8191])
@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_any_number_of_tokens_has_a_regime(M: int, quantize: str) -> None:
    gm, decision = run(M=M, options={"quantize": quantize})
    packed, skipped = ("sparse24_mm", None), ("activation_spmm", None)
    three = skipped if quantize == "fp8" else ("", Reason.NOT_PROFITABLE)
    expected = {0: ("", Reason.UNSUPPORTED_SHAPE), 1: skipped, 3: three}
    assert (decision.op, decision.reason) == expected.get(M, packed)
    assert gm.graph.find_nodes(op="output")[0].args[0].meta["val"].shape == (M, N)


def test_between_the_two_is_dense() -> None:
    gm, decision = run(M=64)
    assert decision.reason is Reason.NOT_PROFITABLE
    assert decision.detail == f"with 64 tokens the dense product wins; {LIMITS}"
    assert decision.expected_gain is None
    assert len(calls(gm, "mm")) == 1


def test_a_fixed_number_of_tokens_that_gains_too_little_stays_dense() -> None:
    # Above the limit, but more than half of a last round of tiles.
    gain = profitability.cuda.prefill_gain(2305, K, 2048, "bfloat16", graphs=True)
    assert 1 < gain < profitability.cuda.PREFILL_MARGIN
    _, decision = run(M=2305, outputs=2048)
    assert decision.reason is Reason.NOT_PROFITABLE
    assert decision.detail == (
        f"with 2305 tokens 2:4 is expected to gain {gain:.2f}x, and a static number "
        "of tokens must gain 1.12x; for this shape skipping zeros wins up to 1 token, "
        "2:4 wins from 2048 tokens on"
    )


def test_a_number_of_tokens_that_fills_the_gpu_is_packed_earlier() -> None:
    # 1024 tokens are one round of tiles, 1152 begin a second one.
    assert run(M=1024)[1].op == "sparse24_mm"
    assert run(M=1152)[1].reason is Reason.NOT_PROFITABLE


def test_an_applied_site_names_its_limits() -> None:
    _, decision = run()
    assert decision.detail == LIMITS


def test_exact_turns_packing_off() -> None:
    _, decision = run(options={"activation_format": "exact"})
    assert decision.reason is Reason.NOT_PROFITABLE
    assert decision.detail.endswith(f"skipping zeros wins up to {FEW} tokens")
    _, decision = run(M=1, options={"activation_format": "exact"})
    assert decision.op == "activation_spmm"


@pytest.mark.parametrize("M", [1, 64, 2048])
def test_2_4_is_taken_at_every_size(M: int) -> None:
    _, decision = run(M=M, options={"activation_format": "2:4"})
    assert decision.op == "sparse24_mm"
    assert decision.detail == f"for this shape 2:4 wins from {MANY} tokens on"
    assert decision.expected_gain is not None
    assert (decision.expected_gain > 1) == (M == 2048)


@pytest.mark.parametrize(
    ("arch", "M", "reason", "detail"),
    [
        (
            "sm_75",
            1,
            Reason.ARCH_UNSUPPORTED,
            "activation_spmm has no kernel for sm_75",
        ),
        ("sm_75", 99, Reason.ARCH_UNSUPPORTED, "activation_spmm has no kernel for"),
        (
            "sm_120",
            2048,
            Reason.ARCH_UNSUPPORTED,
            "sparsify24 has no kernel for sm_120",
        ),
        ("", 1, Reason.ARCH_UNSUPPORTED, "cannot ask for its architecture"),
        ("sm_80", 1, Reason.KERNEL_UNVERIFIED, "activation_spmm never ran on sm_80"),
        ("gfx942", 2048, Reason.KERNEL_UNVERIFIED, "sparsify24 never ran on gfx942"),
    ],
)
def test_other_architectures(arch: str, M: int, reason: Reason, detail: str) -> None:
    _, decision = run(M=M, arch=arch)
    assert decision.reason is reason
    assert detail in decision.detail


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100", "gfx942"])
def test_unverified_kernels_may_be_allowed(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    options = {"allow_unverified": True}
    assert run(arch=arch, options=options)[1].op == "sparse24_mm"
    assert run(M=1, arch=arch, options=options)[1].op == "activation_spmm"


@pytest.mark.parametrize(
    "arch",
    [
        *("sm_80", "sm_87", "sm_103", "sm_110", "sm_120", "sm_121"),
        *("gfx908", "gfx90a", "gfx942", "gfx950"),
    ],
)
def test_a_few_tokens_are_told_by_a_rule(arch: str) -> None:
    _, decision = run(M=1, arch=arch)
    assert decision.reason is Reason.KERNEL_UNVERIFIED
    assert decision.detail == (
        f"the bfloat16 kernel of activation_spmm never ran on {arch}; "
        "set sparse.allow_unverified to use it"
    )
    assert run(M=1, arch=arch, options=UNVERIFIED)[1].op == "activation_spmm"


@pytest.mark.parametrize(
    "arch", ["sm_75", "gfx906", "gfx1030", "gfx1201", "xe_1", "cpu"]
)
def test_no_other_architecture_is_offered_anything(arch: str) -> None:
    assert profitability.kernels.unverified_kernels(arch) == {}


def test_8_bit_rows_by_architecture() -> None:
    has = functools.partial(profitability.has_kernel, op="activation_spmm")
    for dtype in ("int8", "float8_e4m3fn"):
        assert has("sm_90", dtype=dtype)
    for arch in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_121"):
        assert has(arch, dtype="int8", unverified=True)
        assert not has(arch, dtype="int8")
        newer = int(arch[3:]) >= 89
        assert has(arch, dtype="float8_e4m3fn", unverified=True) == newer
        assert not has(arch, dtype="float8_e4m3fn")
    assert not has("gfx942", dtype="int8", unverified=True)


def test_what_ran_is_not_called_unverified() -> None:
    for arch, ran in profitability.KERNELS.items():
        untried = profitability.kernels.unverified_kernels(arch)
        assert not any(ran[op] & untried.get(op, frozenset()) for op in ran)


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from inductor_sparse.passes import toolchains

    monkeypatch.setattr(toolchains.nvrtc, "unavailable_reason", lambda: "no NVRTC here")
    _, decision = run()
    assert decision.reason is Reason.NO_KERNEL_YET
    assert decision.detail == "sparse24_mm cannot run: no NVRTC here"
    assert run(M=1)[1].op == "activation_spmm"


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from inductor_sparse.passes import toolchains

    monkeypatch.setattr(toolchains.triton_text, "available", lambda: False)
    for M, op in ((1, "activation_spmm"), (2048, "sparsify24")):
        _, decision = run(M=M)
        assert decision.reason is Reason.NO_KERNEL_YET
        assert decision.detail.startswith(f"{op} cannot run: triton is missing")


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_missing_library(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    _, decision = run(arch=arch, options=UNVERIFIED)
    assert decision.reason is Reason.NO_KERNEL_YET
    assert decision.detail.startswith("sparse24_mm cannot run: torch has no cuSPARSELt")
    assert run(arch="sm_80", options=UNVERIFIED)[1].op == "sparse24_mm"


def test_float32_has_no_packed_kernel() -> None:
    _, decision = run(dtype=torch.float32)
    assert decision.reason is Reason.NO_KERNEL_YET
    assert decision.detail == "sparsify24 has no float32 kernel for sm_90 yet"


@pytest.mark.parametrize("M", [FEW, 64])
def test_what_can_never_be_packed_names_no_limit_for_it(M: int) -> None:
    packs = f"2:4 wins from {MANY} tokens on"
    assert packs in run(M=M)[1].detail
    assert packs in run(M=M, arch="sm_80", options=UNVERIFIED)[1].detail
    assert run(M=M, dtype=torch.float32)[1].detail.endswith("2:4 never wins")
    assert run(M=M, arch="sm_120", options=UNVERIFIED)[1].detail.endswith(
        "2:4 never wins"
    )
    assert run(M=M, outputs=N + 4)[1].detail.endswith("2:4 never wins")


def test_a_missing_package_keeps_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from inductor_sparse.passes import toolchains

    monkeypatch.setattr(toolchains.nvrtc, "unavailable_reason", lambda: "no NVRTC here")
    assert run(M=64)[1].detail.endswith(f"2:4 wins from {MANY} tokens on")


def plan(density: float, dropped: float) -> Plan:
    site = SitePlan(density, density, dropped, dropped, 1, 5)
    return Plan({f"mm:{K}x{N}": site})


def test_planned_loss() -> None:
    _, decision = run(plan=plan(0.1, 0.004))
    assert (decision.op, decision.dropped_energy) == ("sparse24_mm", 0.004)
    _, decision = run(plan=plan(0.1, 0.02))
    assert decision.reason is Reason.TOO_DENSE
    assert decision.detail == (
        "the plan measured that 2:4 drops 0.02 of the energy, above "
        "sparse.max_dropped_energy 0.01"
    )
    looser = {"max_dropped_energy": 0.05}
    assert run(plan=plan(0.1, 0.02), options=looser)[1].status is Status.APPLIED
    # What skips zeros loses nothing.
    assert run(M=1, plan=plan(0.1, 0.02))[1].op == "activation_spmm"


def test_planned_density_moves_the_limit() -> None:
    limit = profitability.cuda.decode_max_tokens
    sparse, dense = (limit(K, N, "bfloat16", density) for density in (0.02, 0.5))
    assert sparse > dense > 0
    assert run(M=sparse, plan=plan(0.02, 0))[1].op == "activation_spmm"
    _, decision = run(M=sparse, plan=plan(0.5, 0))
    assert decision.reason is Reason.NOT_PROFITABLE
    assert f"skipping zeros wins up to {dense} tokens" in decision.detail
    _, decision = run(plan=plan(0.7, 0))
    assert decision.reason is Reason.TOO_DENSE


def test_training_stays_dense() -> None:
    _, decision = run(is_training=True)
    assert decision.reason is Reason.TRAINING_GRAPH
    assert "the model would learn something else" in decision.detail
    assert run(M=1, is_training=True)[1].op == "activation_spmm"


def test_packages_run_without_python() -> None:
    from torch._inductor.virtualized import V

    with V.set_aot_compilation(True):
        _, decision = run()
        assert decision.reason is Reason.NO_KERNEL_YET
        assert "AOTInductor" in decision.detail
        assert run(M=1)[1].reason is Reason.NO_KERNEL_YET
    with inductor_config.patch(cpp_wrapper=True):
        assert run(M=1)[1].reason is Reason.NO_KERNEL_YET


def test_narrow_products_are_not_packed() -> None:
    narrow = profitability.cuda.PREFILL_MIN_SIZE // 2
    _, decision = run(M=65536, outputs=narrow)
    assert decision.reason is Reason.NOT_PROFITABLE
    assert "2:4 never wins" in decision.detail


def test_cuda_graphs_launch_small_products_in_no_time() -> None:
    gain = functools.partial(profitability.cuda.prefill_gain, 512, 8192, 8192)
    assert gain("bfloat16") <= 1 < gain("bfloat16", graphs=True)
    site = functools.partial(run, M=512)
    assert site()[1].op == "sparse24_mm"
    with config.patch(cuda_graphs=False):
        assert site()[1].reason is Reason.NOT_PROFITABLE
        with inductor_config.patch({"triton.cudagraphs": True}):
            assert site()[1].op == "sparse24_mm"


def test_a_token_does_not_hide_what_launching_takes() -> None:
    with config.patch(cuda_graphs=False):
        _, decision = run(M=1)
        assert decision.reason is Reason.NOT_PROFITABLE
        assert "without CUDA graphs, skipping zeros never wins" in decision.detail
    gain = functools.partial(profitability.cuda.decode_gain, 1)
    large = functools.partial(gain, 28672, 8192, "bfloat16", 0.1)
    assert large() > 1 > large(graphs=False)
    largest = functools.partial(gain, 53248, 16384, "bfloat16", 0.1)
    assert largest() > largest(graphs=False) > 1


def test_a_decision_says_whether_cuda_graphs_were_expected() -> None:
    assert run(M=1)[1].cuda_graphs
    with config.patch(cuda_graphs=False):
        assert not run(M=1)[1].cuda_graphs
        with inductor_config.patch({"triton.cudagraphs": True}):
            assert run(M=1)[1].cuda_graphs


def test_thresholds_are_monotonic() -> None:
    limit = profitability.cuda.decode_max_tokens
    densities = (0.02, 0.1, 0.3, 0.9)
    found = [limit(K, N, "bfloat16", density) for density in densities]
    assert found == sorted(found, reverse=True)
    assert limit(512, 512, "bfloat16", None) == 0
    begin = profitability.cuda.prefill_min_tokens
    assert begin(512, 4096, "bfloat16") is None
    small, large = begin(4096, 1024, "bfloat16"), begin(K, N, "bfloat16")
    assert small is not None
    assert large is not None
    assert small > large
