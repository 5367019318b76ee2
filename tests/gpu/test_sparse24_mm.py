"""``sparse24_mm`` on a GPU: the kernel, its tiles, the vendors', and compiled code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inductor_sparse import formats
from inductor_sparse.lowerings import (
    candidate_check,
    sparse24_gemm,
    sparse24_kernel,
    vendor24,
)
from inductor_sparse.lowerings.sparse24_kernel import TileConfig

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]

BF16, FP16, E4M3, INT8 = (
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int8,
)
DTYPES = (BF16, FP16, E4M3, INT8)
CUDA = torch.device("cuda")
Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

op = torch.ops.inductor_sparse.sparse24_mm


def operands(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    *,
    order: str = "k",
    scaled: bool = False,
) -> Operands:
    draw = candidate_check.generator(CUDA)
    values = candidate_check.random_values(
        formats.values_shape(M, K), K, dtype, CUDA, draw
    )
    words = formats.metadata_shape(M, K)
    metadata = candidate_check.random_metadata(words, CUDA, draw)
    shape = (N, K) if order == "k" else (K, N)
    w = torch.empty(shape, dtype=dtype, device=CUDA)
    w = candidate_check.random_weight(w.t() if order == "k" else w, draw)
    scales = (None, None)
    if scaled:
        scales = tuple(
            torch.rand(size, device=CUDA, generator=draw) + 0.5 for size in (M, N)
        )
    return values, metadata, w, *scales


def error(result: Tensor, inputs: Operands) -> float:
    rows = candidate_check.sample_rows(result.shape[0])
    expected = candidate_check.expected_rows(rows, *inputs)
    return candidate_check.relative_error(result[rows.to(CUDA)], expected)


SHAPES = [
    (1, 8, 64),
    (17, 72, 64),
    (100, 100, 192),
    (130, 257, 448),
    (100, 72, 100),
    (8192, 264, 320),
    (520, 4096, 1024),
]


@pytest.mark.parametrize("order", ["k", "n"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape(dtype: torch.dtype, scaled: bool, order: str) -> None:
    for M, N, K in SHAPES:
        inputs = operands(M, N, K, dtype, order=order, scaled=scaled)
        result = op(*inputs)
        assert result.is_contiguous()
        allowed = torch.finfo(result.dtype).eps
        assert error(result, inputs) < allowed, (M, N, K)


@pytest.mark.parametrize("out_dtype", sparse24_gemm.OUT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [64, 65])
def test_any_result_dtype(dtype: torch.dtype, out_dtype: torch.dtype, N: int) -> None:
    inputs = operands(100, N, 256, dtype, scaled=True)
    scaled_down = (*inputs[:3], inputs[3] / 2**8, inputs[4])  # fits float16
    result = op(*scaled_down, out_dtype=out_dtype)
    assert result.dtype == out_dtype
    assert error(result, scaled_down) < max(torch.finfo(out_dtype).eps, 2.0**-10)


TILES = [
    pytest.param(dtype, order, tile, id=f"{dtype}-{order}-{tile}")
    for dtype, order in ((BF16, "k"), (BF16, "n"), (E4M3, "k"), (INT8, "k"))
    for tile in sparse24_kernel.configs(dtype, order)
]


@pytest.mark.parametrize("dtype, order, tile", TILES)
def test_every_tile(dtype: torch.dtype, order: str, tile: TileConfig) -> None:
    # The last shape has whole tiles and, of most sizes, a last round of halves.
    for M, N, K in ((300, 520, 448), (1024, 1024, 1088), (2500, 2120, 320)):
        inputs = operands(M, N, K, dtype, order=order, scaled=True)
        result = torch.empty(M, N, dtype=BF16, device=CUDA)
        sparse24_gemm.launch(tile, *inputs, result)
        assert error(result, inputs) < torch.finfo(BF16).eps, (M, N, K)


@pytest.mark.parametrize("size", [(0, 8, 64), (8, 0, 64), (8, 8, 0)], ids=str)
def test_empty_products(size: tuple[int, int, int]) -> None:
    M, N, K = size
    values, metadata, _, *_ = operands(max(M, 1), 8, max(K, 64), BF16)
    shapes = formats.values_shape(M, K), formats.metadata_shape(M, K)
    values, metadata = values.new_zeros(shapes[0]), metadata.new_zeros(shapes[1])
    result = op(values, metadata, values.new_ones(K, N))
    assert result.shape == (M, N)
    assert result.count_nonzero() == 0


def test_unaligned_and_strided_operands() -> None:
    values, metadata, w, *_ = operands(100, 64, 192, BF16)
    expected = op(values, metadata, w)
    shifted = torch.empty(w.numel() + 1, dtype=BF16, device=CUDA)[1:].view(64, 192)
    wide = torch.zeros(192, 130, dtype=BF16, device=CUDA)[:, ::2][:, :64]
    padded = torch.zeros(100, 200, dtype=BF16, device=CUDA)[:, 3:99]
    assert torch.equal(op(values, metadata, shifted.copy_(w.t()).t()), expected)
    assert torch.equal(op(values, metadata, wide.copy_(w)), expected)
    assert torch.equal(op(padded.copy_(values), metadata, w), expected)


def test_nan_and_inf_reach_the_result() -> None:
    values, metadata, w, *_ = operands(64, 16, 64, BF16)
    values[3, 0], values[5, 1] = float("nan"), float("inf")
    result = op(values, metadata, w)
    assert result[3].isnan().all()
    assert not result[5].isfinite().any()
    others = [row for row in range(64) if row not in (3, 5)]
    assert result[others].isfinite().all()


def test_another_stream() -> None:
    inputs = operands(512, 512, 4096, BF16)
    expected = op(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(inputs[0])
        torch.cuda._sleep(20_000_000)
        late.copy_(inputs[0])
        result = op(late, *inputs[1:])
    stream.synchronize()
    assert torch.equal(result, expected)


def test_cuda_graph() -> None:
    inputs = operands(256, 512, 1024, BF16)
    op(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = op(*inputs)
    inputs[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert error(result, inputs) < torch.finfo(BF16).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kernel", [vendor24.masked_dense, vendor24.cusparselt])
def test_kernels_of_others(
    kernel: Callable[..., Tensor], scaled: bool, dtype: torch.dtype
) -> None:
    out_dtype = dtype if dtype.itemsize == 2 else BF16
    if kernel is vendor24.cusparselt:
        refusal = vendor24.cusparselt_refusal(dtype, out_dtype, 512, scaled=scaled)
        if refusal is not None:
            pytest.skip(refusal)
    inputs = operands(100, 512, 320, dtype, scaled=scaled)
    result = kernel(*inputs)
    assert result.dtype == out_dtype
    assert error(result, inputs) < candidate_check.tolerance(out_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacking(dtype: torch.dtype) -> None:
    for M, K in ((1, 64), (70, 100), (1030, 4096)):
        values, metadata, *_ = operands(M, 8, K, dtype)
        found = vendor24.unpack(values, metadata, K)
        expected = formats.unpack(values, metadata, K)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
