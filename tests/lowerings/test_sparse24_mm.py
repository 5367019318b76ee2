"""The code generated for ``sparse24_mm``, and why there sometimes is none."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from torch import Tensor

from inductor_sparse import _compat, config, formats
from inductor_sparse.lowerings import sparse24_mm
from inductor_sparse.runtime import cuda_kernel

BF16 = torch.bfloat16
OP_CALL = "torch.ops.inductor_sparse.sparse24_mm.default("
op = torch.ops.inductor_sparse.sparse24_mm


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(M: int, K: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    words = formats.metadata_shape(M, K)
    return meta(*formats.values_shape(M, K), dtype=dtype), meta(
        *words, dtype=torch.int32
    )


def linear(values: Tensor, metadata: Tensor, weight: Tensor) -> Tensor:
    return op(values, metadata, weight.t())


def launch(generated: fake_cuda.Generated) -> str:
    """The arguments of the one launch of the kernel."""
    (arguments,) = re.findall(r"sparse24_mm_0\.run\((.*)\)", generated.code)
    return arguments


def test_bias_gelu_and_residual_are_one_kernel(tmp_path: Path) -> None:
    M, N, K = 512, 256, 1024

    def fn(v: Tensor, m: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return torch.nn.functional.gelu(linear(v, m, w) + b) + r

    generated = fake_cuda.generate(fn, *packed(M, K), meta(N, K), meta(N), meta(M, N))
    assert generated.kernels == ("sparse24_mm_0",)
    assert ", 512, 256, 1024, arg3_1, arg4_1, stream=" in launch(generated)
    (source,) = fake_cuda.cuda_sources(generated.code).values()
    compiled = fake_cuda.compile_cuda(source, tmp_path)
    assert "C75" not in compiled.log
    assert compiled.local <= 64


def test_a_result_with_three_dimensions_is_stored_as_a_matrix() -> None:
    def fn(v: Tensor, m: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return linear(v, m, w).view(8, 64, 256) + r

    inputs = (*packed(512, 1024), meta(256, 1024), meta(8, 64, 256))
    fusing = _compat.epilogue_fusion_options()
    generated = fake_cuda.generate(fn, *inputs, inductor=fusing)
    assert generated.kernels == ("sparse24_mm_0",)
    assert re.search(
        r"reinterpret_tensor\(buf\d, \(512, 256\), \(256, 1\), 0\)", launch(generated)
    )


def test_a_transposed_result_is_stored_as_the_matrix_it_is_in_memory() -> None:
    def fn(v: Tensor, m: Tensor, w: Tensor, other: Tensor) -> Tensor:
        return linear(v, m, w).t() + other

    inputs = (*packed(512, 1024), meta(256, 1024), meta(256, 512))
    generated = fake_cuda.generate(fn, *inputs)
    assert generated.kernels == ("sparse24_mm_0",)
    if "empty_strided_cuda((256, 512), (1, 256)" in generated.code:
        assert "(512, 256), (256, 1), 0)" in launch(generated)


def test_rows_are_an_argument() -> None:
    generated = fake_cuda.generate(
        linear, *packed(320, 1024), meta(256, 1024), dynamic=[320, 5]
    )
    assert re.search(r", s\d+, 256, 1024, stream=", launch(generated))
    assert "pack16(acc0, acc1)" in generated.code


def test_scales_are_applied_in_the_kernel() -> None:
    dtype = torch.float8_e4m3fn

    def fn(v: Tensor, m: Tensor, w: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return torch.relu(op(v, m, w.t(), row, col))

    scales = meta(512, dtype=torch.float32), meta(256, dtype=torch.float32)
    inputs = (*packed(512, 1024, dtype), meta(256, 1024, dtype=dtype), *scales)
    generated = fake_cuda.generate(fn, *inputs)
    assert generated.kernels == ("sparse24_mm_0",)
    assert "arg1_1, arg3_1, arg4_1, 512, 256, 1024" in launch(generated)
    assert "const float* __restrict__ row_scale" in generated.code
    assert "// torch.float8_e4m3fn, w in K order, tile 128x" in generated.code


def test_a_weight_in_n_order_is_read_as_it_lies() -> None:
    generated = fake_cuda.generate(op, *packed(512, 1024), meta(1024, 256))
    assert launch(generated).startswith("arg0_1, arg2_1, ")
    assert re.findall(r"transposed=(\w+)", generated.code)[:2] == ["False", "False"]


def test_a_weight_made_in_the_graph_is_made_k_major() -> None:
    def fn(v: Tensor, m: Tensor, w: Tensor) -> Tensor:
        return op(v, m, (w * 2).t())

    generated = fake_cuda.generate(fn, *packed(512, 1024), meta(256, 1024))
    assert generated.kernels == ("triton_poi_fused_0", "sparse24_mm_1")
    assert "buf0 = empty_strided_cuda((1024, 256), (1, 1024)" in generated.code
    assert re.findall(r"transposed=(\w+)", generated.code)[1] == "True"


def test_offsets_beyond_31_bits_are_computed_in_64(tmp_path: Path) -> None:
    M, N, K = 2**20, 4096, 64  # 2^32 elements in the result

    def fn(v: Tensor, m: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = linear(v, m, w) + r
        return y, y.float()

    generated = fake_cuda.generate(fn, *packed(M, K), meta(N, K), meta(M, N))
    assert generated.kernels == ("sparse24_mm_0",)
    (source,) = fake_cuda.cuda_sources(generated.code).values()
    assert "const long long m = row" in source
    assert "const long long row = (long long)part.m_tile * BLOCK_M" in source
    indices = re.findall(r"epilogue::\w+2\(\w+, (\(?n \+ .*?\)), ", source)
    assert indices
    assert all("4096LL" in index for index in indices), indices
    fake_cuda.compile_cuda(source, tmp_path)


def refused(
    caplog: pytest.LogCaptureFixture,
    fn: Callable[..., Any],
    *inputs: Tensor,
    **how: Any,
) -> str:
    """Why the generated code calls the op."""
    with caplog.at_level(logging.INFO, logger=sparse24_mm.log.name):
        generated = fake_cuda.generate(fn, *inputs, **how)
    assert "sparse24_mm_0" not in generated.kernels
    if not (how.get("inductor") or {}).get("cpp_wrapper"):
        assert OP_CALL in generated.code
    (message,) = (r.getMessage() for r in caplog.records if "falls back" in r.msg)
    return message.removeprefix("sparse24_mm falls back to its eager op: ")


REFUSED = [
    ((512, 1024, 256, torch.float32), "no verified kernel for float32 on sm_90"),
    ((512, 1022, 256, BF16), "w [1022, 256] with strides (1, 1022) has to be copied"),
]


@pytest.mark.parametrize("sizes, reason", REFUSED)
def test_reasons(
    sizes: tuple[int, int, int, torch.dtype],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    M, K, N, dtype = sizes
    inputs = (*packed(M, K, dtype), meta(N, K, dtype=dtype))
    assert refused(caplog, linear, *inputs) == reason


def test_a_strided_weight_is_copied() -> None:
    inputs = (*packed(512, 1024), meta(1024, 512)[:, ::2])
    generated = fake_cuda.generate(op, *inputs)
    assert generated.kernels == ("triton_poi_fused_0", "sparse24_mm_1")
    assert "sparse24_mm_1.run(arg0_1, buf0, buf1" in generated.code


def test_an_unaligned_weight_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def fn(v: Tensor, m: Tensor, flat: Tensor) -> Tensor:
        return op(v, m, flat.narrow(0, 4, 256 * 1024).view(256, 1024).t())

    reason = refused(caplog, fn, *packed(512, 1024), meta(4 + 256 * 1024))
    assert reason == "arg2_1 is not 16-byte aligned"


def test_a_weight_that_may_be_unaligned_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fn(v: Tensor, m: Tensor, w: Tensor) -> Tensor:
        copy = torch.ops.inductor_sparse.row_major_weight
        return op(v, m, copy(w, [256, 1024], [1024, 1], 0, BF16).t())

    options = {"assume_unaligned_fallback_output": True}
    inputs = (*packed(512, 1024), meta(256, 1024))
    reason = refused(caplog, fn, *inputs, inductor=options)
    assert reason.endswith("is not 16-byte aligned")


def test_without_a_compiler_the_op_is_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_kernel, "unavailable_reason", lambda: "no NVRTC; install")
    inputs = (*packed(512, 1024), meta(256, 1024))
    assert refused(caplog, linear, *inputs) == "no NVRTC; install"


def test_a_dynamic_weight_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    inputs = (*packed(512, 1024), meta(272, 1024))
    assert refused(caplog, linear, *inputs, dynamic=272) == "N or K is dynamic"


def test_an_empty_product_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    inputs = (*packed(0, 1024), meta(256, 1024))
    assert refused(caplog, linear, *inputs) == "the product is empty"


def test_a_cpp_wrapper_calls_the_op(caplog: pytest.LogCaptureFixture) -> None:
    inputs = (*packed(512, 1024), meta(256, 1024))
    reason = refused(caplog, linear, *inputs, inductor={"cpp_wrapper": True})
    assert reason == ("the kernel is launched from Python, the wrapper is not Python")


VENDORS = [((8, 0), "cutlass"), ((8, 9), "cutlass"), ((10, 0), "cusparselt")]


@pytest.mark.parametrize("capability, kernel", VENDORS)
def test_other_architectures(
    capability: tuple[int, int],
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    inputs = (*packed(512, 1024), meta(256, 1024))
    reason = refused(caplog, linear, *inputs, capability=capability)
    major, minor = capability
    assert reason == f"no verified kernel for bfloat16 on sm_{major}{minor}"
    with config.patch(allow_unverified=True):
        generated = fake_cuda.generate(linear, *inputs, capability=capability)
    call = f"extern_kernels.inductor_sparse_{kernel}("
    assert call in generated.code
    assert "out_dtype=torch.bfloat16" in generated.code.partition(call)[2][:200]


def test_no_cusparselt_no_vendor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    inputs = (*packed(512, 1024), meta(256, 1024))
    with config.patch(allow_unverified=True):
        reason = refused(caplog, linear, *inputs, capability=(10, 0))
    assert reason == "torch has no cuSPARSELt"
