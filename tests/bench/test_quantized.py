from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch
from numerics import skip_where_int8_saturates

from inductor_sparse.bench.models import ModelCase, relative_errors
from inductor_sparse.bench.quantized import (
    LARGEST,
    QuantizedLinear,
    by_torchao,
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
def test_a_row_of_zeros_stays_one(dtype: torch.dtype) -> None:
    values_MK, scale_M = quantize_rows(torch.zeros(2, 4), dtype)
    assert values_MK.float().count_nonzero() == 0
    assert (scale_M > 0).all()


def test_int8_linear_is_close_to_the_wide_one() -> None:
    skip_where_int8_saturates()
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=False)
    x_MK = torch.randn(32, 64)
    narrow = QuantizedLinear(linear, torch.int8)
    with torch.no_grad():
        _, rms = relative_errors(narrow(x_MK), linear(x_MK).double())
    assert 1e-4 < rms < 0.02


@pytest.mark.parametrize(("op", "gated"), [("down", 0), ("ffn", 0), ("ffn", 1)])
def test_the_8_bit_model_computes_the_same(op: str, gated: bool) -> None:
    skip_where_int8_saturates()
    case = ModelCase(op, bool(gated), "relu2", "float32", features=64, hidden=256)
    model = case.build()
    x = case.make_input(32, 0.3, seed=1)
    with torch.no_grad():
        _, rms = relative_errors(quantized(model, "int8")(x), model(x).double())
    assert rms < 0.05


def test_no_quantization_is_the_model_itself() -> None:
    model = ModelCase("down", False, "relu2", "float32", 16, 64).build()
    assert quantized(model, "none") is model


BF16 = ModelCase("ffn", True, "relu2", "bfloat16", features=64, hidden=256)


def test_without_torchao_there_is_no_such_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert by_torchao(BF16.build()) is None


def test_a_torchao_that_cannot_be_used_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert by_torchao(BF16.build()) is None
    assert "torchao is left out: import of torchao.quantization halted" in caplog.text


def test_torchao_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = BF16.build()
    assert by_torchao(model) is None, "torchao wants a GPU for this"
    api = importlib.import_module("torchao.quantization.quant_api")
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)
    theirs = by_torchao(model)
    assert theirs is not None
    assert type(theirs.down.weight).__name__ == "Float8Tensor"
    assert type(model.down.weight) is torch.nn.Parameter
    x = BF16.make_input(32, 0.3, seed=1)
    with torch.no_grad():
        expected = model(x).double()
        _, rms = relative_errors(theirs(x), expected)
        _, ours = relative_errors(quantized(model, "fp8")(x), expected)
    assert rms == pytest.approx(ours, rel=0.15)
