from __future__ import annotations

import pytest
import torch

from inductor_sparse.bench.models import ModelCase, relative_errors
from inductor_sparse.bench.quantized import (
    LARGEST,
    QuantizedLinear,
    quantize_rows,
    quantized,
)

DTYPES = list(LARGEST)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_use_the_whole_range(dtype: torch.dtype) -> None:
    x_MK = torch.tensor([[1.0, -4.0], [0.01, 0.002]])
    values_MK, scale_M = quantize_rows(x_MK, dtype)
    assert values_MK.float().abs().amax(dim=1).tolist() == [LARGEST[dtype]] * 2
    restored = values_MK.float() * scale_M[:, None]
    torch.testing.assert_close(restored, x_MK, rtol=0.07, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_has_scale_one(dtype: torch.dtype) -> None:
    values_MK, scale_M = quantize_rows(torch.zeros(2, 4), dtype)
    assert values_MK.float().count_nonzero() == 0
    assert scale_M.tolist() == [1.0, 1.0]


def test_int8_linear_is_close_to_the_wide_one() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=False)
    x_MK = torch.randn(32, 64)
    narrow = QuantizedLinear(linear, torch.int8)
    with torch.no_grad():
        _, rms = relative_errors(narrow(x_MK), linear(x_MK).double())
    assert 1e-4 < rms < 0.02


@pytest.mark.parametrize(("op", "gated"), [("down", 0), ("ffn", 0), ("ffn", 1)])
def test_the_8_bit_model_computes_the_same(op: str, gated: bool) -> None:
    case = ModelCase(op, bool(gated), "relu2", "float32", features=64, hidden=256)
    model = case.build()
    x = case.make_input(32, 0.3, seed=1)
    with torch.no_grad():
        _, rms = relative_errors(quantized(model, "int8")(x), model(x).double())
    assert rms < 0.05


def test_no_quantization_is_the_model_itself() -> None:
    model = ModelCase("down", False, "relu2", "float32", 16, 64).build()
    assert quantized(model, "none") is model
