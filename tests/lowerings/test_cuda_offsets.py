"""Offsets in CUDA C++ are 64-bit: compiled with pointers that take no other."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fake_cuda import cuda_sources, generate

from inductor_sparse import formats
from inductor_sparse.errors import SparseKernelError
from inductor_sparse.lowerings import linear_sparsify24_kernel, sparse24_kernel
from inductor_sparse.runtime import nvrtc

pytestmark = pytest.mark.skipif(
    nvrtc.unavailable_reason() is not None, reason="needs NVRTC"
)
BF16 = torch.bfloat16

WIDE = """
template <typename T> struct Wide {
  T* p;
  template <typename I> __device__ T& operator[](I at) const {
    static_assert(sizeof(I) == 8, "a 32-bit offset");
    return p[at];
  }
  template <typename I> __device__ T* operator+(I at) const { return &(*this)[at]; }
};
struct Offset {
  long long at;
  template <typename I> __device__ Offset(I at) : at(at) {
    static_assert(sizeof(I) == 8, "a 32-bit offset");
  }
  __device__ operator long long() const { return at; }
};
struct Size {
  int n;
  __device__ operator int() const { return n; }
};
__device__ inline long long operator*(long long at, Size size) { return at * size.n; }
__device__ void operator*(int at, Size size) = delete;
"""
BY_COLUMN = ("bias", "col_scale", "energy")
"""Indexed by a column, of which there are less than 2**31, or by the block."""


def checked(source: str) -> str:
    """``source`` where only 64-bit numbers are added to pointers or scaled by sizes."""
    head, kernel = source.split('extern "C"')
    signature, body = kernel.split(") {", 1)

    def wide(match: re.Match[str]) -> str:
        kind, name = match.groups()
        of_functions = name.startswith(("in_ptr", "out_ptr"))
        kept = name in BY_COLUMN or of_functions
        return match[0] if kept else f"Wide<{kind}> {name}"

    signature = re.sub(r"((?:const )?[\w:]+)\* __restrict__ (\w+)", wide, signature)
    signature = re.sub(r"const int (\w)\b", r"const Size \1", signature)
    head = head.replace("long long at,", "Offset at,").replace("? at :", "? at.at :")
    assert "Wide<" in signature or "Offset at" in head
    return f'{WIDE}{head}extern "C"{signature}) {{{body}'


@pytest.mark.parametrize("out_dtype", [torch.float32, BF16])
def test_scales_and_plain_stores(out_dtype: torch.dtype) -> None:
    dtype = torch.float8_e4m3fn
    source = sparse24_kernel.kernel_source(
        "kernel",
        dtype,
        sparse24_kernel.configs(dtype)[0],
        sparse24_kernel.plain_epilogue(out_dtype, 9),
        has_row_scale=True,
        has_col_scale=True,
    )
    nvrtc.compile_source("kernel", checked(source))
    for narrow, why in (("(int)(m * N + n)", "offset"), ("(int)m * N + n", "deleted")):
        wrong = source.replace("out[m * N + n]", f"out[{narrow}]")
        with pytest.raises(SparseKernelError, match=why):
            nvrtc.compile_source("kernel", checked(wrong))


@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_stores(has_bias: bool) -> None:
    tile = next(iter(linear_sparsify24_kernel.TILES))
    source = linear_sparsify24_kernel.kernel_source(
        "kernel", BF16, tile, has_bias=has_bias, has_energy=has_bias
    )
    nvrtc.compile_source("kernel", checked(source))


def test_printed_loads_and_stores() -> None:
    def fn(v: Any, m: Any, w: Any, bias: Any, other: Any) -> Any:
        product = torch.ops.inductor_sparse.sparse24_mm(v, m, w.t())
        y = product + bias + other.t()
        return y.float(), y, y.t().contiguous()

    M, K, N = 2**20, 64, 4096
    shapes = formats.values_shape(M, K), (N, K), (N,), (N, M)
    values, w, bias, other = (
        torch.empty(shape, dtype=BF16, device="meta") for shape in shapes
    )
    words = formats.metadata_shape(M, K)
    metadata = torch.empty(words, dtype=torch.int32, device="meta")
    made = generate(fn, values, metadata, w, bias, other)
    ((name, source),) = cuda_sources(made.code).items()
    text = checked(source)
    assert text.count("epilogue::load") and text.count("epilogue::store")
    nvrtc.compile_source(name.rpartition("_")[0], text)
