"""CUDA C++ kernels in Inductor's graph: their definitions and their calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_cuda_op
import torch
from fake_cuda import compile_cuda, cuda_sources, generate
from small_cuda_op import mm, mm_and_sums
from torch import Tensor

from inductor_sparse.runtime.cuda_kernel import CudaKernel

small_cuda_op.register()


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


A, B, BIAS = empty(32, 16), empty(16, 24), empty(24)


def body(code: str) -> str:
    """The wrapper's ``call``."""
    return code[code.index("def call(") : code.index("runner = ")]


def test_the_wrapper_defines_the_kernel_and_launches_it() -> None:
    code = generate(lambda a, b: mm(a, b), A, B).code
    imported = "from inductor_sparse.runtime.cuda_kernel import CudaKernel, TensorMap"
    assert code.count(imported) == 1
    (stream,) = re.findall(r"(\w+) = get_raw_stream\(0\)", body(code))
    launch = f"small_mm_0.run(arg0_1, arg1_1, 32, 24, 16, buf0, stream={stream})"
    assert launch in body(code)
    definition = re.search(
        r"^small_mm_0 = (CudaKernel\(.*?grid=64\))$", code, re.S | re.M
    )
    assert definition is not None
    kernel = eval(definition.group(1), {"CudaKernel": CudaKernel})
    assert kernel.name == "small_mm"
    assert kernel.signature == (*["pointer"] * 2, *["int64"] * 3, "pointer")
    assert (kernel.threads, kernel.cluster, kernel.grid) == (128, 1, 64)


def test_equal_texts_are_one_kernel_and_others_are_not() -> None:
    def fn(a: Tensor, b: Tensor, *biases: Tensor) -> tuple[Tensor, ...]:
        return mm(a, b) + biases[0], mm(a * 2, b) + biases[1], mm(a, b * 2).relu()

    generated = generate(fn, A, B, BIAS, BIAS)
    assert len(generated.cuda_kernels) == 2
    runs = re.findall(r"small_mm_\d+\.run\(", body(generated.code))
    assert len(runs) == 3
    assert len(set(runs)) == 2


def test_symbolic_sizes_are_arguments() -> None:
    def fn(a: Tensor, b: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return (mm(a, b) + bias).relu() + residual

    generated = generate(fn, A, B, BIAS, empty(32, 24), dynamic=(32, 24))
    (source,) = cuda_sources(generated.code).values()
    assert "const long long ks0" in source
    rows, columns = re.findall(r"(s\d+) = arg\d_1_size\[\d\]", body(generated.code))
    launch = re.search(r"small_mm_0\.run\((.*?)\)", body(generated.code))
    assert launch is not None
    assert launch.group(1).startswith(f"arg0_1, arg1_1, {rows}, {columns}, 16, ")
    assert f", {columns}, stream=" in launch.group(1)


def test_an_operand_may_be_a_view() -> None:
    code = generate(lambda a, b: mm(a.view(16, 32), b.view(32, 12)), A, B).code
    assert "small_mm_0.run(reinterpret_tensor(arg0_1, (16, 32), (32, 1), 0), " in code


def test_nothing_is_fused_in_front_of_a_kernel() -> None:
    generated = generate(lambda a, b: mm(a.relu(), b), A, B)
    assert len(generated.triton_kernels) == len(generated.cuda_kernels) == 1


def test_the_output_that_nobody_reads_is_not_allocated() -> None:
    generated = generate(lambda a, b, bias: mm(a, b) + bias, A, B, BIAS)
    assert "buf1 = empty_strided_cuda" in body(generated.code)
    assert "buf0" not in body(generated.code)


@pytest.mark.parametrize("dynamic", [(), (5,)])
def test_a_kernel_with_two_outputs(dynamic: tuple[int, ...], tmp_path: Path) -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, sums = mm_and_sums(a, b)
        return y + 1, sums, y.relu()

    torch.manual_seed(0)
    a, b = torch.randn(5, 4).bfloat16(), torch.randn(4, 8).bfloat16()
    generated = generate(fn, a, b, dynamic=dynamic)
    assert generated.kernels == ("small_mm_0",)
    exact = a.double() @ b.double()
    one, sums, relu = small_cuda_op.on_cpu(generated, tmp_path, a, b)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)
    for ours, wanted in ((one, exact + 1), (relu, exact.relu())):
        torch.testing.assert_close(ours.double(), wanted, rtol=2**-8, atol=2**-8)


def test_a_further_output_is_read_by_other_kernels() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        y, sums = mm_and_sums(a, b)
        return y + sums

    call = body(generate(fn, A, B).code)
    assert call.index("small_mm_0.run(") < call.index("triton_poi_fused")


@pytest.mark.parametrize(
    ("fn", "writes"),
    [
        (lambda a, b: mm(a, b).float() * 2, None),  # through TMA: 16 bits only
        (lambda a, b: (mm(a, b) * 2, mm(a, b)), torch.bfloat16),
        (lambda a, b: mm(a, b).half() * 2, torch.float16),
        (lambda a, b: mm(a, b[:, :12].clone()) * 2, None),  # rows of 24 bytes
    ],
)
def test_which_output_a_kernel_stores_by_itself(
    fn: Callable[..., Any], writes: torch.dtype | None
) -> None:
    source = next(iter(cuda_sources(generate(fn, A, B).code).values()))
    assert ("primary" in source) == (writes is not None)
    if writes is not None:
        kind = "bfloat16" if writes == torch.bfloat16 else "float16"
        assert f"epilogue::{kind}* primary" in source


def test_a_wrapper_that_is_not_python_calls_the_op() -> None:
    options = {"cpp_wrapper": True}
    code = generate(lambda a, b: mm(a, b), A, B, inductor=options).code
    assert "small_cuda_op" in code
    assert "CudaKernel(" not in code


@pytest.mark.parametrize("option", ["benchmark_kernel", "benchmark_fusion"])
def test_inductor_cannot_benchmark_the_kernel(option: str) -> None:
    options = {option: True}
    generated = generate(lambda a, b: mm(a, b) + 1, A, B, inductor=options)
    assert generated.cuda_kernels == ("small_mm_0",)
    assert "small_mm_0.run(" in body(generated.code)


def test_what_two_refused_epilogues_read_lives_until_both_ran() -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = mm(a, b)
        return torch.special.i0(y), torch.special.i1(y), y * 2

    lines = body(generate(fn, A, B).code).splitlines()
    runs = [at for at, line in enumerate(lines) if ".run(" in line]
    (freed,) = (at for at, line in enumerate(lines) if "del buf0" in line)
    assert len(runs) >= 2
    assert freed > runs[-1]


def test_epilogues_compile_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")

    def fn(a: Tensor, b: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        y = torch.nn.functional.gelu(mm(a, b) + bias)
        clipped = y.clamp(-1, 1).masked_fill(mask, float("-inf"))
        low = (y * 3).to(torch.float8_e4m3fn)
        return (
            y.t() * 2,
            clipped,
            low,
            (y * 9).round().to(torch.int8),
            y.float().rsqrt(),
        )

    mask = empty(32, 24, dtype=torch.bool)
    (source,) = cuda_sources(generate(fn, A, B, BIAS, mask).code).values()
    compiled = compile_cuda(source, tmp_path)
    assert compiled.local == 0
    assert "warning" not in compiled.log
    for instruction in ("max.NaN.f32", "cvt.rn.bf16.f32", "cvt.rn.satfinite.e4m3x2"):
        assert instruction in compiled.ptx
