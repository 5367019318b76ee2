"""The benchmarks on a GPU: every kind gives rows that agree with themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from inductor_sparse import cli
from inductor_sparse.bench import ceilings, pack, timing, variants

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ceilings that take no time; no compiled graph left behind."""
    monkeypatch.setitem(ceilings.SQUARE, "cuda", 1024)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cuda", 2**26)
    ceilings.measure.cache_clear()
    yield
    ceilings.measure.cache_clear()
    variants.release()


def rows(tmp_path: Path, *argv: str) -> list[dict[str, Any]]:
    """The rows that ``bench`` writes."""
    path = tmp_path / "rows.jsonl"
    argv = (*argv, "--device", "cuda", "--seconds", "0.05", "--json", str(path))
    assert cli.main(["bench", *argv]) == cli.OK
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_products(dtype: str, tmp_path: Path) -> None:
    size = ("--size", "1024x2048", "--tokens", "1024", "--dtype", dtype, "--quick")
    (row,) = rows(tmp_path, "gemm", *size)
    ours = row["variants"]["sparse24_mm"]
    assert "sparse24_mm" in ours["note"]
    assert ours["max_rel_err"] < 0.02
    assert row["unavailable"]["torch.compile"] == "left out by --quick"
    assert row["dense_us"] == row["variants"][row["baseline"]]["us"]


# Inductor would compile dozens of Triton kernels for the dense side, for minutes.
@inductor_config.patch(max_autotune_gemm_backends="ATEN")
def test_data_of_one_product_share_its_kernels(tmp_path: Path) -> None:
    argv = ("--size", "1024x2048", "--tokens", "1024", "--data", "trained,random")
    found = rows(tmp_path, "gemm", *argv, "--dtype", "float8_e4m3fn")
    assert [row["density"] for row in found] == [0.05, 0.1, 0.15, 1.0]
    for row in found:
        assert {"torch.compile", "_scaled_mm"} <= set(row["variants"])
        assert all(side["max_rel_err"] < 0.02 for side in row["variants"].values())
    assert len({row["variants"]["sparse24_mm"]["prepare_s"] for row in found}) == 1


def test_torchao_runs_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    size = ("--size", "1024x2048", "--tokens", "1024")
    (row,) = rows(tmp_path, "gemm", *size, "--dtype", "float8_e4m3fn", "--quick")
    assert row["variants"]["torchao"]["max_rel_err"] < 0.02, row["unavailable"]
    argv = ("--op", "ffn", "--no-gated", "--dtype", "bfloat16", "--quantize", "fp8")
    (row,) = rows(
        *(tmp_path, "ffn", *size, *argv, "--density", "0.1", "--settings", "default")
    )
    assert set(row["dense_candidates_us"]) == {"default", "torchao, default"}
    assert row["dense_rms_rel_err"] < 0.1


@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_a_whole_ffn_is_compiled_once(quantize: str, tmp_path: Path) -> None:
    argv = ("--op", "ffn", "--no-gated", "--dtype", "bfloat16", "--quantize", quantize)
    argv += ("--size", "4096x16384", "--tokens", "2048", "--settings", "default")
    found = rows(tmp_path, "ffn", *argv, "--density", "0.05,0.1")
    assert [row["status"] for row in found] == ["applied"] * 2
    assert len({row["sparse_compile_s"] for row in found}) == 1
    for row in found:  # to what rounding costs either side comes what 2:4 drops
        expected = (row["dense_rms_rel_err"] ** 2 + row["dropped_energy"]) ** 0.5
        assert row["rms_rel_err"] < 1.2 * expected


def test_packing(tmp_path: Path) -> None:
    size = ("--size", "512x2048", "--tokens", "512", "--dtype", "bfloat16")
    found = {row["op"]: row for row in rows(tmp_path, "pack", *size)}
    assert set(found) == set(pack.GPU_OPS)
    assert all(row["gb_per_s"] > 0 < row["of_copy"] for row in found.values())


def test_a_first_matmul_packs_what_it_computes(tmp_path: Path) -> None:
    size = ("--size", "1024x4096", "--tokens", "1024", "--dtype", "bfloat16")
    (row,) = rows(tmp_path, "linear", *size)
    assert "linear_sparsify24" in row["note"]
    assert row["rms_rel_err"] == pytest.approx(row["apart_rms_rel_err"], rel=0.1)
    assert row["of_matmul"] == row["fused_us"] / row["matmul_us"]


@pytest.mark.parametrize(
    "op", [("--op", "down"), ("--op", "ffn", "--gated")], ids=["down", "gated"]
)
def test_decoding_has_its_rivals(op: tuple[str, ...], tmp_path: Path) -> None:
    size = ("--size", "4096x16384", "--tokens", "1", "--dtype", "bfloat16")
    argv = (*size, *op, "--density", "0.1", "--settings", "default")
    (row,) = rows(tmp_path, "ffn", *argv)
    assert (row["stacked"], row["sites_applied"]) == (16, 16)
    assert 0 < row["empty_us"] < row["dense_us"]
    assert row["masked_load_us"] > row["empty_us"]
    assert row["union_density"] == pytest.approx(0.1, abs=0.03)
    assert max(row["max_rel_err"], row["masked_load_max_rel_err"]) < 0.03


def test_a_graph_measures_the_device_alone() -> None:
    x = torch.zeros(1, device="cuda")
    times = timing.interleave({"add": lambda _: x.add_(1)}, seconds=0, device="cuda")
    assert 0.1 < min(times["add"]) <= max(times["add"]) < 100


def test_eviction_costs_what_memory_costs() -> None:
    weight = torch.zeros(2**20, device="cuda")
    call = {"sum": lambda _: weight.sum()}
    evict = timing.Evictor(weight.nbytes, "cuda")
    assert evict.mode == "evicted"
    cold = timing.interleave(call, seconds=0.1, device="cuda", before=evict.before)
    warm = timing.interleave(call, seconds=0.1, device="cuda", before=lambda: None)
    assert min(cold["sum"]) > min(warm["sum"])
