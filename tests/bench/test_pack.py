from __future__ import annotations

import json

import pytest
import torch

from inductor_sparse.bench import pack, page, tables
from inductor_sparse.bench.pack import PackCase


def test_cases_cover_both_ops() -> None:
    todo = pack.cases(
        tokens=[1, 8], sizes=[(64, 128)], dtypes=["bfloat16"], device="cpu"
    )
    assert todo == [
        PackCase("row_major_weight", 64, 128, "bfloat16"),
        PackCase("sparsify24", 1, 128, "bfloat16"),
        PackCase("sparsify24", 8, 128, "bfloat16"),
    ]


def test_a_gpu_packs_activations_only() -> None:
    todo = pack.cases(
        tokens=[8], sizes=[(64, 128), (32, 96)], dtypes=["bfloat16"], device="cuda"
    )
    assert [(case.op, case.columns) for case in todo] == [
        (op, columns) for columns in (128, 96) for op in pack.GPU_OPS
    ]
    assert {case.rows for case in todo} == {8}


@pytest.mark.parametrize("op", ["row_major_weight", *pack.GPU_OPS])
def test_a_row_is_consistent(op: str) -> None:
    (row,) = pack.run([PackCase(op, 64, 128, "float32")], seconds=0.02)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["ratio"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["rounds"] >= 9
    (cells,) = tables.cells(tables.PACK, [row])
    assert len(cells) == len(tables.headers(tables.PACK))


@pytest.mark.parametrize("op", pack.GPU_OPS)
def test_every_op_of_a_gpu_has_a_name_in_the_table(op: str) -> None:
    assert op in pack._OPERATIONS
    assert op in page._PACKING


def test_what_a_gate_packs_has_either_sign() -> None:
    h_MK = torch.tensor([[-3.0, 1.0, 2.0, -0.5]]).repeat(1, 16)
    values, _ = pack._sparsify24_largest_abs(h_MK)
    assert values[0, :2].tolist() == [-3.0, 2.0]


def test_bytes_are_those_read_and_written() -> None:
    # 64 x 128 floats read and as many written: 64 KiB per call of the copy.
    times = {"op": [2.0] * 9, "copy": [1.0] * 9}
    case = PackCase("row_major_weight", 64, 128, "float32")
    row = pack._describe(case, times, op_bytes=65536, copy_bytes=65536)
    assert row["copy_gb_per_s"] == pytest.approx(65.536)
    assert row["gb_per_s"] == pytest.approx(32.768)
    assert (row["ratio"], row["verdict"]) == (0.5, "slower")


def test_the_prepared_weight_is_the_transpose() -> None:
    weight_NK = torch.randn(6, 10)
    (prepared_KN,) = pack._row_major_weight(weight_NK)
    assert prepared_KN.is_contiguous()
    assert torch.equal(prepared_KN, weight_NK.t())
