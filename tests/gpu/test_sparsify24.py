"""The kernels of ``sparsify24`` on a GPU: the bits of the reference on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packing_kernels import same_bits
from torch import Tensor

from inductor_sparse import formats, lowerings, ops, reference
from inductor_sparse.runtime import sparsify24_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

sparse = torch.ops.inductor_sparse
WAYS = (
    ("relu2", "largest"),
    ("relu", "largest_abs"),
    ("identity", "largest"),
    ("identity", "largest_abs"),
)
SHAPES = ((1, 1), (65, 130), (130, 1000))
FORMATS = (torch.int8, torch.float8_e4m3fn)


def any_bits(M: int, K: int, dtype: torch.dtype, share: float = 0.3) -> Tensor:
    """Normal numbers, ``share`` of them replaced by any bits there are, or zeros."""
    generator = torch.Generator().manual_seed(M * K)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    bits = torch.randint(low, high, (M, K), dtype=integer, generator=generator)
    x = torch.randn(M, K, generator=generator).to(dtype)
    chance = torch.rand(M, K, generator=generator)
    x = torch.where(chance < share, bits.view(dtype), x)
    return torch.where(chance > 0.9, -0.0, x.double()).to(dtype)


def needs(dtype: torch.dtype) -> None:
    """Skip the test where the GPU cannot convert to ``dtype``."""
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs e4m3")


@pytest.mark.parametrize("dtype", sparsify24_cuda.DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "select"), WAYS)
def test_the_bits_are_those_of_the_reference(
    activation: str, select: str, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        x = any_bits(*shape, dtype)
        values, metadata = sparse.sparsify24(x.cuda(), activation, select)
        expected_values, expected_metadata = ops.sparsify24(x, activation, select)
        assert torch.equal(metadata.cpu(), expected_metadata)
        assert same_bits(values, expected_values)


@pytest.mark.parametrize("quantized", FORMATS, ids=str)
@pytest.mark.parametrize(("activation", "select"), WAYS)
def test_quantized_bits_are_those_of_the_reference(
    activation: str, select: str, quantized: torch.dtype
) -> None:
    needs(quantized)
    arguments = (activation, select, quantized)
    for (M, K), share in zip(SHAPES, (0.0, 0.005, 0.001), strict=True):
        x = any_bits(M, K, torch.bfloat16, share)
        x[-3:-2] = 0.0
        x[-2:-1] *= 1e-38
        results = sparse.sparsify24_quantized(x.cuda(), *arguments)
        expected = ops.sparsify24_quantized(x, *arguments)
        assert torch.equal(results[1].cpu(), expected[1])
        assert same_bits(results[0], expected[0])
        assert same_bits(results[2], expected[2])


@pytest.mark.parametrize("quantized", [None, *FORMATS], ids=str)
@pytest.mark.parametrize("dtype", sparsify24_cuda.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_the_bits_of_a_gated_product(
    activation: str, dtype: torch.dtype, quantized: torch.dtype | None
) -> None:
    needs(quantized or torch.int8)
    for M, K in SHAPES:
        share = 0.0 if quantized else 0.3
        x, up = any_bits(M, K, dtype, share), any_bits(K, M, dtype, share).t()
        arguments = [activation, "largest_abs", *([quantized] if quantized else [])]
        op = "sparsify24_quantized" if quantized else "sparsify24"
        results = getattr(sparse, op)(x.cuda(), *arguments, up=up.cuda())
        expected = getattr(ops, op)(x, *arguments, up=up)
        for actual, wanted in zip(results, expected, strict=True):
            assert same_bits(actual, wanted)


@pytest.mark.parametrize("quantized", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("activation", "select"), WAYS)
def test_quantized_bits_of_every_number(
    activation: str, select: str, dtype: torch.dtype, quantized: torch.dtype
) -> None:
    needs(quantized)
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    neighbours = torch.arange(2**16)
    bits = torch.cat((order, neighbours)).to(torch.int16).view(1024, 128)
    x = bits.view(dtype)
    x[x.isnan()] = torch.nan  # which of several is kept does not matter
    arguments = (activation, select, quantized)
    results = sparse.sparsify24_quantized(x.cuda(), *arguments)
    expected = ops.sparsify24_quantized(x, *arguments)
    for actual, wanted in zip(results, expected, strict=True):
        assert same_bits(actual, wanted)


def test_a_row_that_is_read_twice() -> None:
    x = any_bits(70, sparsify24_cuda.LARGEST_WHOLE_ROW + 100, torch.float16, 0.0)
    results = sparse.sparsify24_quantized(x.cuda(), "relu2", "largest", torch.int8)
    expected = ops.sparsify24_quantized(x, "relu2", "largest", torch.int8)
    for actual, wanted in zip(results, expected, strict=True):
        assert same_bits(actual, wanted)


def compiled_results(x: Tensor, quantized: torch.dtype | None) -> tuple[Tensor, ...]:
    lowerings.register_all()
    torch.compiler.reset()

    def select(x: Tensor) -> Any:
        if quantized is None:
            return sparse.sparsify24(x, "relu2", "largest")
        return sparse.sparsify24_quantized(x, "relu2", "largest", quantized)

    return torch.compile(select, fullgraph=True, dynamic=False)(x)


@pytest.mark.parametrize("quantized", [None, *FORMATS], ids=str)
@pytest.mark.parametrize("shape", [(1, 2048), (100, 1000), (256, 2048)], ids=str)
def test_compiled(shape: tuple[int, int], quantized: torch.dtype | None) -> None:
    needs(quantized or torch.int8)
    x = any_bits(*shape, torch.bfloat16, 0.0)
    for given in (x, x, x, x.t()):
        results = compiled_results(given.cuda(), quantized)
        if quantized is None:
            expected = ops.sparsify24(given, "relu2", "largest")
        else:
            expected = ops.sparsify24_quantized(given, "relu2", "largest", quantized)
        for actual, wanted in zip(results, expected, strict=True):
            assert same_bits(actual, wanted)


@pytest.mark.parametrize("quantized", [None, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [200, 4096])
def test_energy(rows: int, quantized: torch.dtype | None) -> None:
    x = torch.randn(rows, 1000, device="cuda", dtype=torch.bfloat16)
    energy = x.new_zeros((ops.ENERGY_SLOTS, 2), dtype=torch.float64)
    if quantized is None:
        values, _ = sparse.sparsify24(x, "relu2", "largest", energy)
    else:
        sparse.sparsify24_quantized(x, "relu2", "largest", quantized, energy)
        values, _ = sparse.sparsify24(x, "relu2", "largest")
    kept, total = energy.sum(0).tolist()
    all_kept = values.double().square().sum().item()
    all_total = x.relu().square().double().square().sum().item()
    assert kept / total == pytest.approx(
        all_kept / all_total, rel=1e-5 if rows < 256 else 1e-2
    )
    share = total / all_total
    # Of many tiles, or rows, one of 32 is summed.
    assert share == pytest.approx(1.0, rel=1e-5) if rows < 256 else 0.02 < share < 0.05


def test_more_than_2_to_the_31_elements() -> None:
    rows, columns = 2**16 + 70, 2**15
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of memory")
    tail = any_bits(70, columns, torch.bfloat16, 0.0)
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-70:] = tail.cuda()
    values, metadata = sparse.sparsify24(x, "relu2", "largest")
    expected, index = reference.sparsify24(tail, "relu2", "largest")
    assert same_bits(values[-70:], expected)
    # 2**16 rows are whole blocks: the tail has blocks of its own.
    assert torch.equal(metadata[-2:].cpu(), formats.pack_index(index, torch.bfloat16))
    quantized = sparse.sparsify24_quantized(x, "relu2", "largest", torch.int8)
    wanted = ops.sparsify24_quantized(tail, "relu2", "largest", torch.int8)
    assert same_bits(quantized[0][-70:], wanted[0])
    assert torch.equal(quantized[1][-2:].cpu(), wanted[1])
    assert same_bits(quantized[2][-70:], wanted[2])
