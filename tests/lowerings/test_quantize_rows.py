"""``quantize_rows`` in generated code: the bits of the reference, fused with a norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_cuda import compile_triton, generate
from torch import Tensor

from inductor_sparse import lowerings, reference

FORMATS = (torch.int8, torch.float8_e4m3fn)


def _quantize(dtype: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.inductor_sparse.quantize_rows(x, dtype)


def _awkward_rows(rows: int, columns: int) -> Tensor:
    """Ordinary rows, and one of each kind that has a rule of its own."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns) * torch.rand(rows, 1).mul(20).sub(10).exp2()
    x[3] = 0.0
    x[4, 2] = torch.nan
    x[5, 7] = -torch.inf
    x[6] *= 1e-38
    x[7, ::2] = -1e-9  # rounded away: +0.0 is stored
    x[8] = torch.arange(columns) - columns // 2  # exact ties in int8
    x[8, 0] = 127
    return x


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, except that every NaN is as good as any other."""
    assert actual.dtype == expected.dtype
    nan = actual.float().isnan() & expected.float().isnan()
    bits = torch.int8 if actual.element_size() == 1 else torch.int32
    differ = (actual.view(bits) != expected.view(bits)) & ~nan
    assert not differ.any(), differ.nonzero()[:5]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_the_bits_are_those_of_the_reference(
    dtype: torch.dtype, source: torch.dtype
) -> None:
    lowerings.register_all()
    x = _awkward_rows(37, 100).to(source)
    values, scale = torch.compile(lambda x: _quantize(dtype, x))(x)
    expected_values, expected_scale = reference.quantize_rows(x, dtype)
    assert values.is_contiguous()
    assert_same_bits(values, expected_values)
    assert_same_bits(scale, expected_scale)


def test_rows_of_a_transposed_matrix_with_any_number_of_rows() -> None:
    lowerings.register_all()
    compiled = torch.compile(lambda x: _quantize(torch.int8, x.t()), dynamic=True)
    for columns in (9, 70):
        x = _awkward_rows(16, columns)
        values, scale = compiled(x)
        expected_values, expected_scale = reference.quantize_rows(x.t(), torch.int8)
        assert_same_bits(values, expected_values)
        assert_same_bits(scale, expected_scale)


def test_an_empty_matrix_is_left_to_the_op() -> None:
    lowerings.register_all()
    compiled = torch.compile(lambda x: _quantize(torch.int8, x), dynamic=False)
    for rows, columns in ((0, 8), (3, 0)):
        values, scale = compiled(torch.empty(rows, columns))
        assert values.shape == (rows, columns)
        assert torch.equal(scale, torch.ones(rows))


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_norm_and_the_quantization_behind_it_are_one_kernel(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def block(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _quantize(dtype, torch.nn.functional.rms_norm(x, (4096,), weight, 1e-6))

    x = torch.empty(512, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    made = generate(block, x, weight)
    assert len(made.triton_kernels) == 1
    assert "inline_asm_elementwise('div.rn.f32" in made.code
    (kernel,) = compile_triton(made, tmp_path).values()
    assert kernel.local == 0


@pytest.mark.parametrize(
    ("columns", "once", "dtype"),
    [
        (5120, True, torch.int8),
        (32768, True, torch.float8_e4m3fn),
        (32769, False, torch.float8_e4m3fn),
    ],
)
def test_a_matrix_in_memory_is_read_once_if_a_row_fits(
    columns: int, once: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    x = torch.empty(512, columns, dtype=torch.bfloat16, device="meta")
    made = generate(lambda x: _quantize(dtype, x), x, dynamic=512)
    assert ("row_scale(" in made.code) == once
    (kernel,) = compile_triton(made, tmp_path).values()
    assert kernel.local == 0
    assert "div.rn.f32" in kernel.ptx and "div.full" not in kernel.ptx


def test_a_gpu_without_e4m3_calls_the_op() -> None:
    x = torch.empty(64, 128, dtype=torch.bfloat16, device="meta")
    for dtype, kernels in ((torch.float8_e4m3fn, 0), (torch.int8, 1)):
        made = generate(lambda x, d=dtype: _quantize(d, x), x, capability=(8, 0))
        assert len(made.triton_kernels) == kernels
        called = "= torch.ops.inductor_sparse.quantize_rows.default(" in made.code
        assert called == (kernels == 0)
