from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from inductor_sparse.bench import ceilings, roofline
from inductor_sparse.bench.ceilings import Ceilings
from inductor_sparse.bench.models import ModelCase

DOWN = ModelCase("down", False, "relu2", "bfloat16", features=64, hidden=512)
FFN = dataclasses.replace(DOWN, op="ffn")
GATED = dataclasses.replace(FFN, gated=True)
MATRIX = 64 * 512 * 2
TIMES = {"dense_us": 2.0, "sparse_us": 1.0}


@pytest.mark.parametrize(
    ("case", "dense", "needed"),
    [(DOWN, 1, 0.25), (FFN, 2, 1.25), (GATED, 3, 1.5)],
    ids=["down", "ffn", "gated"],
)
def test_bytes_are_those_of_rows_that_matter(
    case: ModelCase, dense: float, needed: float
) -> None:
    assert roofline.weight_bytes(case, union=0.25) == (dense * MATRIX, needed * MATRIX)


def on_gpu(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> ModelCase:
    """The case as if it had run on a GPU of 0.1 GB/s and 0.5 TFLOP/s."""
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: Ceilings(100.0, 0.5))
    return dataclasses.replace(case, device="cuda")


def test_a_rival_that_computes_something_else_is_not_timed() -> None:
    model, x = DOWN.build(), DOWN.make_input(2, 0.5, 1)

    def scaled(factor: float) -> Any:
        return lambda _: [factor * model(x).detach()]

    calls = {"right": scaled(1.0), "wrong": scaled(1.1), "nan": scaled(math.nan)}
    calls["empty"] = lambda _: [torch.zeros(1)]
    able, row = roofline.checked(model, calls, (x, x))
    assert list(able) == ["right", "empty"]
    assert row["right_max_rel_err"] < 0.03
    assert row["wrong_max_rel_err"] == pytest.approx(0.1, abs=0.03)
    assert set(row) == {f"{name}_max_rel_err" for name in ("right", "wrong", "nan")}


def test_few_tokens_are_held_against_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [DOWN.make_input(1, 0.5, seed) for seed in range(4)]
    row = roofline.fields(on_gpu(DOWN, monkeypatch), DOWN.build(), inputs, TIMES)
    assert row["union_density"] == pytest.approx(0.5, abs=0.1)
    assert row["needed_bytes"] == MATRIX * row["union_density"]
    assert row["dense_gb_per_s"] == pytest.approx(MATRIX / 2e3)
    assert row["of_copy"] == pytest.approx(row["needed_bytes"] / 1e3 / 100)
    assert row["ceiling_copy_gb_per_s"] == 100.0


def test_many_tokens_are_held_against_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = [FFN.make_input(32, 0.5, 0)]
    row = roofline.fields(on_gpu(FFN, monkeypatch), FFN.build(), inputs, TIMES)
    flop = 2 * 32 * 64 * 512 * 2
    assert row["sparse_tflop_per_s"] == pytest.approx(flop / 1e6)
    assert row["dense_tflop_per_s"] == pytest.approx(flop / 2e6)
    assert row["of_ceiling"] == pytest.approx(flop / 1e6 / 0.5)
    assert "needed_bytes" not in row


def test_a_cpu_row_has_none_of_it() -> None:
    model, inputs = DOWN.build(), [DOWN.make_input(1, 0.5, 0)]
    assert roofline.fields(DOWN, model, inputs, TIMES) == {}
    assert roofline.rivals(DOWN, [model, model], inputs) == {}


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.SQUARE, "cpu", 64)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    found = ceilings.measure("cpu", "float32", seconds=0.01)
    assert found.copy_gb_per_s > 0
    assert found.matmul_tflop_per_s > 0
    assert found.fields() == {
        "ceiling_copy_gb_per_s": found.copy_gb_per_s,
        "ceiling_matmul_tflop_per_s": found.matmul_tflop_per_s,
    }
    assert ceilings.measure("cpu", "float32", seconds=0.01) is found
    assert ceilings.measure("cpu", "int8", seconds=0.01).matmul_tflop_per_s > 0


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [("none", "bfloat16"), ("fp8", "float8_e4m3fn"), ("int8", "int8")],
)
def test_the_ceiling_is_that_of_the_type_that_is_multiplied(
    quantize: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measure(device: str, dtype: str) -> Ceilings:
        asked.append(dtype)
        return Ceilings(100.0, 0.5)

    case = dataclasses.replace(on_gpu(FFN, monkeypatch), quantize=quantize)
    monkeypatch.setattr(ceilings, "measure", measure)
    roofline.fields(case, FFN.build(), [FFN.make_input(32, 0.5, 0)], TIMES)
    assert asked == [dtype]
