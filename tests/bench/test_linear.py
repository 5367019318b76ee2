"""A first matmul and its packing, in one kernel and in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inductor_sparse import cli
from inductor_sparse.bench import linear, tables
from inductor_sparse.bench.linear import LinearCase
from inductor_sparse.bench.rows import PROTOCOL

CASE = LinearCase(8, 16, 64, "float32")


def test_a_row_is_consistent() -> None:
    (row,) = linear.run([CASE], seconds=0.02)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert linear.row_key(row) == CASE.key
    assert row["of_matmul"] == row["fused_us"] / row["matmul_us"]
    assert row["ratio"] == pytest.approx(row["apart_us"] / row["fused_us"])
    assert row["rms_rel_err"] < 1e-6 > row["apart_rms_rel_err"]
    (cells,) = tables.cells(tables.LINEAR, [row])
    assert len(cells) == len(tables.headers(tables.LINEAR))


def test_a_wrong_kernel_shows() -> None:
    x_MD, w_KD = torch.randn(8, 16), torch.randn(64, 16)

    def doubled(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        values, metadata = linear.two_kernels(x, w)
        return 2 * values, metadata

    def displaced(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        values, metadata = linear.two_kernels(x, w)
        return values, torch.zeros_like(metadata)

    def empty(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        values, metadata = linear.two_kernels(x, w)
        return torch.zeros_like(values), metadata

    assert linear._error(linear.one_kernel, x_MD, w_KD) < 1e-6
    assert linear._error(doubled, x_MD, w_KD) == pytest.approx(1.0)
    assert linear._error(displaced, x_MD, w_KD) > 0.1
    assert linear._error(empty, x_MD, w_KD) == pytest.approx(1.0)


def test_the_command_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(linear, "run", lambda todo, *_: iter(seen.extend(todo) or []))
    path = tmp_path / "rows.jsonl"
    argv = ["bench", "linear", "--size", "16x64", "--tokens", "8,16"]
    argv += ["--json", str(path), "--resume"]
    row = {"op": "linear_sparsify24", **vars(CASE), "protocol": PROTOCOL}
    path.write_text(json.dumps(row) + "\n")
    assert cli.main(argv) == cli.OK
    assert [case.tokens for case in seen] == [16]
