"""``sparse24_mm`` in compiled code on a GPU: epilogues, dynamic sizes, autotuning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from inductor_sparse import _compat, formats, lowerings
from inductor_sparse.lowerings import (
    candidate_check,
    sparse24_gemm,
    sparse24_kernel,
    tile_model,
)
from inductor_sparse.lowerings.sparse24_kernel import TileConfig

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
    # Of Inductor itself, while it makes inputs for autotuning.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    # Likewise, while it reserves a pool for CUDA graphs.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
CUDA = torch.device("cuda")
op = torch.ops.inductor_sparse.sparse24_mm


@pytest.fixture(autouse=True)
def _lowerings() -> Iterator[None]:
    lowerings.register_all()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(
    M: int, N: int, K: int, dtype: torch.dtype = BF16
) -> tuple[Tensor, Tensor, Tensor]:
    """values, metadata and a weight ``[N, K]``; products are about 1."""
    draw = candidate_check.generator(CUDA)
    values = candidate_check.random_values(
        formats.values_shape(M, K), K, dtype, CUDA, draw
    )
    words = formats.metadata_shape(M, K)
    metadata = candidate_check.random_metadata(words, CUDA, draw)
    weight = torch.empty(N, K, dtype=dtype, device=CUDA)
    weight = candidate_check.random_weight(weight, draw)
    if dtype.itemsize == 2:
        weight /= K**0.5
    return values, metadata, weight


def product(values: Tensor, metadata: Tensor, weight: Tensor) -> Tensor:
    """The masked-dense product in float64."""
    dense = formats.unpack(values, metadata, weight.shape[1]).double()
    return dense @ weight.double().t()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=BF16, device=CUDA)


def run(fn: Callable[..., object], *args: Tensor) -> tuple[object, str]:
    """The result, and the one wrapper that was generated."""
    options = _compat.epilogue_fusion_options()
    result, (code,) = run_and_get_code(torch.compile(fn, options=options), *args)
    return result, code


def sum_error(values: Tensor, metadata: Tensor, weight: Tensor) -> Tensor | float:
    """What the sums of a product may be off by, besides the rounding of its result.

    Hopper adds products of e4m3 with 13 bits behind the leading one of the largest of
    those that it adds at a time, and cuts off the rest: the error is relative to the
    magnitudes that are added up, which may cancel, not to the result.  A million sums
    cut like that on the host were off by up to 2**-12 of them where they cancel: twice
    that is allowed.
    """
    if values.dtype != E4M3:
        return 0.0
    dense = formats.unpack(values, metadata, weight.shape[1]).double()
    return 2.0**-11 * (dense.abs() @ weight.double().abs().t())


def close(result: Tensor, expected: Tensor, sums_off_by: Tensor | float = 0.0) -> None:
    eps, found = torch.finfo(result.dtype).eps, result.double()
    nearest = found.clamp(expected - sums_off_by, expected + sums_off_by)
    torch.testing.assert_close(found, nearest, rtol=2 * eps, atol=2 * eps)


def launches(code: str) -> int:
    """Kernels that a wrapper launches, of any kind."""
    return code.count(".run(")


@pytest.mark.parametrize("M, N", [(300, 512), (129, 100), (64, 65)])
def test_bias_gelu_and_residual_in_the_kernel(M: int, N: int) -> None:
    values, metadata, weight = operands(M, N, 512)
    bias, residual = randn(N), randn(M, N)

    def fn(v: Tensor, m: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return torch.nn.functional.gelu(op(v, m, w.t()) + b) + r

    result, code = run(fn, values, metadata, weight, bias, residual)
    assert launches(code) == 1
    y = product(values, metadata, weight) + bias.double()
    close(result, torch.nn.functional.gelu(y) + residual.double())


@pytest.mark.parametrize(
    "dtype, tile",
    [
        (dtype, tile)
        for dtype in (BF16, E4M3)
        for tile in sparse24_kernel.configs(dtype)
    ],
    ids=str,
)
def test_an_epilogue_in_every_tile(
    dtype: torch.dtype, tile: TileConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_model, "best_tile", lambda *sizes: tile)
    M, N = 600, 1032
    values, metadata, weight = operands(M, N, 512, dtype)
    bias, residual = randn(N), randn(M, N)

    def fn(v: Tensor, m: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return op(v, m, w.t()) + b + r

    result, code = run(fn, values, metadata, weight, bias, residual)
    assert launches(code) == 1
    y = product(values, metadata, weight) + bias.double() + residual.double()
    close(result, y, sum_error(values, metadata, weight))


def test_several_outputs_and_three_dimensions() -> None:
    values, metadata, weight = operands(256, 512, 512)
    residual = randn(4, 64, 512)

    def fn(v: Tensor, m: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        y = op(v, m, w.t()).view(4, 64, 512) + r
        return y, torch.relu(y).square().float(), y.half()

    (y, squared, half), code = run(fn, values, metadata, weight, residual)
    assert launches(code) == 1
    expected = product(values, metadata, weight).view(4, 64, 512) + residual.double()
    close(y, expected)
    torch.testing.assert_close(
        squared.double(), expected.relu().square(), rtol=2**-7, atol=2**-6
    )
    close(half.bfloat16(), expected)


def test_transposed_result() -> None:
    values, metadata, weight = operands(256, 256, 512)
    other = randn(256, 256)

    def fn(v: Tensor, m: Tensor, w: Tensor, o: Tensor) -> Tensor:
        return op(v, m, w.t()).t() + o

    result, _ = run(fn, values, metadata, weight, other)
    close(result, product(values, metadata, weight).t() + other.double())


@pytest.mark.parametrize("M, N", [(256, 256), (328, 520), (8, 64), (2048, 4096)])
@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
def test_a_transposed_copy_is_the_kernel_s_own_store(
    M: int, N: int, dtype: torch.dtype
) -> None:
    values, metadata, weight = operands(M, N, 512, dtype)
    residual = randn(M, N)

    def fn(v: Tensor, m: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return (op(v, m, w.t()) + r).t().contiguous()

    result, code = run(fn, values, metadata, weight, residual)
    assert launches(code) == 1
    assert result.is_contiguous()
    y = product(values, metadata, weight) + residual.double()
    close(result.t(), y, sum_error(values, metadata, weight))


@pytest.mark.parametrize("dtype", [E4M3, torch.int8], ids=str)
def test_scales_bias_and_residual_of_8_bit_products(dtype: torch.dtype) -> None:
    M, N, K = 300, 512, 1024
    values, metadata, weight = operands(M, N, K, dtype)
    row, col = torch.rand(M, device=CUDA) + 0.5, (torch.rand(N, device=CUDA) + 0.5)
    col = col / (K * 64 if dtype == torch.int8 else K**0.5)
    bias, residual = randn(N), randn(M, N)

    def fn(v: Tensor, m: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        row, col, bias, residual = rest
        return op(v, m, w.t(), row, col) + bias + residual

    args = (values, metadata, weight, row, col, bias, residual)
    result, code = run(fn, *args)
    assert launches(code) == 1
    y = product(values, metadata, weight) * row.double()[:, None] * col.double()
    close(result, y + bias.double() + residual.double())


def test_a_weight_in_n_order() -> None:
    values, metadata, weight = operands(300, 512, 512)
    by_row = weight.t().contiguous()
    result, code = run(
        lambda v, m, w: torch.relu(op(v, m, w)), values, metadata, by_row
    )
    assert launches(code) == 1
    close(result, product(values, metadata, weight).relu())


def test_any_number_of_rows_from_one_graph() -> None:
    weight, bias = operands(64, 512, 512)[2], randn(512)
    fn = torch.compile(lambda v, m, w, b: torch.relu(op(v, m, w.t()) + b), dynamic=True)
    for M in (300, 64, 1, 1000):
        values, metadata, _ = operands(M, 512, 512)
        expected = (product(values, metadata, weight) + bias.double()).relu()
        close(fn(values, metadata, weight, bias), expected)


def test_cuda_graphs() -> None:
    fn = torch.compile(
        lambda v, m, w, b: torch.relu(op(v, m, w.t()) + b), mode="reduce-overhead"
    )
    values, metadata, weight = operands(300, 512, 512)
    bias = randn(512)
    for _ in range(4):
        values = values * 1.5
        torch.compiler.cudagraph_mark_step_begin()
        result = fn(values, metadata, weight, bias).clone()
        expected = (product(values, metadata, weight) + bias.double()).relu()
        torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=2**-4)


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
def test_autotuning_takes_a_right_candidate(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    values, metadata, weight = operands(512, 1024, 1024, dtype)
    out = {"out_dtype": torch.float32} if dtype == E4M3 else {}
    with inductor_config.patch(max_autotune_gemm=True), caplog.at_level(logging.INFO):
        result, _ = run(
            lambda v, m, w: op(v, m, w.t(), **out), values, metadata, weight
        )
    assert "autotuning rejects" not in caplog.text
    expected = product(values, metadata, weight)
    assert candidate_check.relative_error(result, expected) < 2**-7


def test_a_wrong_or_failing_candidate_is_never_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch = sparse24_gemm.launch

    def broken(tile: object, *args: Tensor) -> None:
        if tile.block_n == 128:
            raise torch.OutOfMemoryError("CUDA out of memory, they say")
        launch(tile, *args)
        args[-1][::64, 64:128] = 0  # fast, and wrong

    monkeypatch.setattr(sparse24_gemm, "launch", broken)
    values, metadata, weight = operands(512, 1024, 1024)
    with inductor_config.patch(max_autotune_gemm=True, autotune_local_cache=False):
        result, code = run(lambda v, m, w: op(v, m, w.t()), values, metadata, weight)
    assert "CUDA out of memory, they say" in caplog.text
    assert "is off by" in caplog.text
    assert "sparse24_mm_0.run" not in code
    assert "extern_kernels.inductor_sparse_" in code
    close(result, product(values, metadata, weight))
