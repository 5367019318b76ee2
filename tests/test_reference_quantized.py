"""Row quantization, and 2:4 selection with it, against their meaning in words."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inductor_sparse import formats, ops, reference
from inductor_sparse.reference import quantized

INF, NAN = math.inf, math.nan
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
FORMATS = (E4M3, INT8)


def rows(*lists: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(lists, dtype=dtype)


def test_int8_rounds_half_to_even_and_is_symmetric() -> None:
    x = rows([127.0, -127.0, 0.5, 1.5, 2.5, -2.5, 126.4])
    values, scale = reference.quantize_rows(x, INT8)
    assert values.tolist() == [[127, -127, 0, 2, 2, -2, 126]]
    assert scale.tolist() == [1.0]


def test_e4m3_rounds_half_to_even() -> None:
    # Between 16 and 32 the numbers of e4m3 are 2 apart.
    x = rows([448.0, 17.0, 19.0, -21.0, 2.0**-10, -(2.0**-10), 2.0**-9])
    values, scale = reference.quantize_rows(x, E4M3)
    expected = [[448.0, 16.0, 20.0, -20.0, 0.0, 0.0, 2.0**-9]]
    assert values.float().tolist() == expected
    assert not values.float()[0, 4:6].signbit().any()
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_row_of_zeros_has_scale_one(dtype: torch.dtype) -> None:
    values, scale = reference.quantize_rows(rows([0.0, -0.0], [4.0, 2.0]), dtype)
    limit = reference.QUANTIZED_LIMITS[dtype]
    assert values[0].float().tolist() == [0.0, 0.0]
    assert scale[0] == 1.0
    assert scale[1] == torch.tensor(4.0) / limit


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@given(exponent=st.integers(-148, 127), seed=st.integers(0, 9))
def test_the_error_is_at_most_half_a_step(
    dtype: torch.dtype, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(4, 16, generator=generator).double() * 2.0**exponent).float()
    values, scale = reference.quantize_rows(x, dtype)
    back = values.double() * scale.double()[:, None]
    wide = x.double()
    # int8: half of a step of amax / 127; e4m3: 2**-4 of the number, or of the smallest.
    amax = wide.amax(1, keepdim=True)
    floor = max(quantized.SMALLEST_AMAX, 0.0) / 127
    step = amax / 254 if dtype == INT8 else wide / 16 + amax / 448 * 2.0**-10
    assert ((back - wide).abs() <= 1.001 * step + floor).all()


@pytest.mark.parametrize(("bad", "scale"), [(NAN, NAN), (INF, INF), (-INF, INF)])
def test_a_row_that_is_not_finite_has_no_finite_result(
    bad: float, scale: float
) -> None:
    x = rows([1.0, bad, 3.0], [1.0, 2.0, 3.0])
    for dtype in FORMATS:
        values, scales = reference.quantize_rows(x, dtype)
        assert scales[0].isnan() if math.isnan(scale) else scales[0] == scale
        assert scales[1].isfinite()
        if dtype == E4M3:
            assert values[0, 1].float().isnan()
        else:
            assert values[0].tolist() == [0, 0, 0]
        product = values.float() @ torch.ones(3, 1) * scales[:, None]
        assert product.isnan().tolist() == [[True], [False]]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_no_columns_and_no_rows(dtype: torch.dtype) -> None:
    values, scale = reference.quantize_rows(torch.zeros(2, 0), dtype)
    assert (values.shape, scale.tolist()) == ((2, 0), [1.0, 1.0])
    values, scale = reference.quantize_rows(torch.zeros(0, 5), dtype)
    assert (values.shape, scale.shape) == ((0, 5), (0,))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("select", reference.SELECTS)
def test_selection_is_that_of_the_wide_values(select: str, dtype: torch.dtype) -> None:
    # In 8 bits most of these would be ties.
    x = 1 + torch.randn(5, 70, generator=torch.Generator().manual_seed(0)) / 1000
    results = reference.sparsify24_quantized(x, "identity", select, dtype)
    values, index = reference.sparsify24(x, "identity", select)
    assert torch.equal(results[1], index)
    expected, scale = reference.quantize_rows(values, dtype)
    assert torch.equal(results[0].float(), expected.float())
    assert torch.equal(results[2], scale)


def test_the_scale_is_taken_from_what_is_dropped_as_well() -> None:
    x = rows([1.0, 2.0, -254.0, 0.5])
    values, _, scale = reference.sparsify24_quantized(x, "identity", "largest", INT8)
    assert scale.tolist() == [2.0]
    assert values[0, :2].tolist() == [0, 1]


def test_the_activation_is_rounded_before_it_is_quantized() -> None:
    x = rows([1.0 + 2**-7, 0.0], dtype=torch.bfloat16)
    _, _, scale = reference.sparsify24_quantized(x, "relu2", "largest", E4M3)
    assert scale == torch.tensor(1.0 + 2**-6) / 448


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_sparse24_mm_of_8_bits(dtype: torch.dtype) -> None:
    M, K, N = 70, 100, 9
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator)
    w, col_scale = reference.quantize_rows(
        torch.randn(N, K, generator=generator), dtype
    )
    values, metadata, scale = ops.sparsify24_quantized(x, "relu2", "largest", dtype)
    exact = formats.unpack(values, metadata, K).double() @ w.double().T
    exact = exact * scale.double()[:, None] * col_scale.double()
    arguments = (values, metadata, w.T, scale, col_scale)
    y = ops.sparse24_mm(*arguments, out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    assert ops.sparse24_mm(*arguments).dtype == torch.bfloat16
    assert ops.sparse24_mm(*arguments, out_dtype=torch.float16).dtype == torch.float16


def test_int8_sums_are_exact() -> None:
    # In float32 the running sum would pass 2**24 and lose the ones.
    x24 = torch.full((1, 2048), 127, dtype=INT8)
    w = torch.full((2048, 1), 127, dtype=INT8)
    w[-1] = 1
    y = reference.sparse24_mm(x24, w, out_dtype=torch.float64)
    exact = 127 * 127 * 2047 + 127
    assert y.item() == torch.tensor(float(exact), dtype=torch.float32).item()


def test_a_16_bit_product_may_be_wide() -> None:
    x24 = torch.full((1, 2), 256.0, dtype=torch.bfloat16)
    w = torch.tensor([[1.0], [2.0**-8]], dtype=torch.bfloat16)
    assert reference.sparse24_mm(x24, w).item() == 256.0
    assert reference.sparse24_mm(x24, w, out_dtype=torch.float32).item() == 257.0
