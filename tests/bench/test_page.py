from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inductor_sparse.bench import page
from inductor_sparse.bench.rows import PROTOCOL, RowFileError

Row = dict[str, Any]

PAGE = """\
Before.

<!-- table ffn from rows.jsonl -->
anything
| old | table |
<!-- end of table -->

Between.

<!-- table pack from rows.jsonl -->
<!-- end of table -->
After.
"""


def gemm_row(data: str, density: float, ratio: float, **more: Any) -> Row:
    side = {"tflop_per_s": 1000.0, "ratio": 1.0}
    variants = {
        "sparse24_mm": side,
        "torch.mm": side | {"tflop_per_s": 1000.0 / ratio, "ratio": ratio},
        "cuSPARSELt": side | {"ratio": ratio / 1.5},
    }
    return {
        "op": "gemm",
        "tokens": 4096,
        "hidden": 16384,
        "features": 4096,
        "dtype": "bfloat16",
        "device": "cuda",
        "data": data,
        "density": density,
        "ratio": ratio,
        "baseline": "torch.mm",
        "variants": variants,
        "protocol": PROTOCOL,
        **more,
    }


def table(kind: str, *rows: Row) -> list[list[str]]:
    """The cells of a table."""
    text = page.TABLES[kind](page.latest(rows))
    return [line.strip("| ").split(" | ") for line in text.splitlines()]


def test_data_of_one_product_share_a_line() -> None:
    rows = [
        gemm_row("trained", 0.1, 1.5),
        gemm_row("random", 1.0, 1.8),
        gemm_row("trained", 0.05, 1.4, protocol=PROTOCOL - 1),
    ]
    headers, rules, line = table("gemm", *rows)
    assert headers == [
        *("M x K x N", "type", "sparse", "dense", "5%", "10%", "random"),
        *("over cuSPARSELt, 10%", "over cuSPARSELt, random"),
    ]
    assert rules == ["---"] * 2 + ["--:"] * 7
    assert line == [
        *("4096 x 16384 x 4096", "bf16", "1,000", "667", "1.40x°", "1.50x", "1.80x"),
        *("1.00x", "1.20x"),
    ]


def test_products_are_ordered_by_type_size_and_tokens() -> None:
    shapes = [
        {"dtype": "int8"},
        {"dtype": "float8_e4m3fn"},
        {"features": 8192, "hidden": 28672},
        {"tokens": 16384},
        {"tokens": 512},
        {"features": 8192, "hidden": 8192},
    ]
    rows = [gemm_row("trained", 0.1, 1.5, **shape) for shape in shapes]
    _, _, *lines = table("gemm", *rows)
    assert [(line[0], line[1]) for line in lines] == [
        ("4096 x 8192 x 8192", "bf16"),
        ("512 x 16384 x 4096", "bf16"),
        ("16384 x 16384 x 4096", "bf16"),
        ("4096 x 28672 x 8192", "bf16"),
        ("4096 x 16384 x 4096", "fp8"),
        ("4096 x 16384 x 4096", "int8"),
    ]


def test_the_last_row_of_a_measurement_counts(ffn_row: Row) -> None:
    old, new = ffn_row | {"calibrated": True, "ratio": 3.0}, ffn_row | {"ratio": 4.0}
    assert page.latest([old, new]) == [new]
    other = ffn_row | {"density": 0.2}
    assert page.latest([old, other, new]) == [new, other]


def test_whole_ffns_are_those_with_many_tokens(ffn_row: Row) -> None:
    many = ffn_row | {"op": "ffn", "tokens": 512, "dtype": "bfloat16"}
    narrow = many | {"quantize": "fp8", "data": "trained", "status": "dense"}
    narrow["dense_candidates_us"] = {"default": 9.0, "torchao, default": 123.4}
    rows = (ffn_row, many, narrow, many | {"gated": True})
    headers, _, wide, eight_bits = table("ffn", *rows)
    assert headers[5:] == ["10% [95 %]", "10%, random", "torchao us", "error (dense)"]
    assert wide[:3] + wide[6:7] == ["4096, 16384", "bf16", "512", "8.00x"]
    assert eight_bits[1] == "fp8"
    assert eight_bits[3:6] == ["12,346", "1,543", "8.00x (dense) [7.90, 8.10]"]
    assert eight_bits[7:] == ["123", "0.0% (0.0%)"]


def test_edges_have_a_line_each(ffn_row: Row) -> None:
    row = ffn_row | {"data": "trained", "tokens": 512}
    rectified = row | {"op": "ffn", "activation": "relu", "dtype": "float16"}
    narrow = row | {"op": "ffn", "gated": True, "quantize": "fp8"}
    rows = (narrow, narrow | {"quantized_model": True}, rectified, row)
    headers, _, *lines = table("edges", *rows)
    assert headers == [
        *("op", "type", "features, hidden", "tokens", "dense us", "sparse us"),
        *("gain [95 %]", "error (dense)"),
    ]
    assert [line[:2] for line in lines] == [
        ["down", "fp32"],
        ["ffn, ReLU", "fp16"],
        ["gated ffn", "fp8"],
        ["gated ffn, an fp8 model", "fp8"],
    ]
    assert lines[0][2:7] == [
        *("4096, 16384", "512", "12,346", "1,543", "8.00x [7.90, 8.10]")
    ]


def test_rows_from_before_an_axis_have_its_default(ffn_row: Row) -> None:
    old = {name: ffn_row[name] for name in ffn_row if name != "quantized_model"}
    assert page.latest([old, ffn_row]) == [ffn_row]


def test_few_tokens_have_densities_side_by_side(ffn_row: Row) -> None:
    gpu = ffn_row | {"sparse_gb_per_s": 1500.0, "of_copy": 0.35, "dense_us": 40.0}
    gpu |= {"sparse_us": 8.0, "masked_load_us": 32.0}
    half = gpu | {"density": 0.5, "ratio": 0.98, "protocol": 1}
    gpu["dense_candidates_us"] = {"default": 44.0, "max-autotune": 40.0}
    headers, _, line = table("decode", gpu, half, ffn_row | {"tokens": 17})
    assert headers[3:] == [
        *("dense us", "sparse us", "10%", "50%", "masked load", "needed")
    ]
    assert line == [
        *("down", "4096, 16384", "1", "40.0", "8.0", "8.00x*", "0.98x°"),
        *("1.25x", "1.50 TB/s, 35%"),
    ]


def test_a_page_keeps_all_but_its_tables(tmp_path: Path, ffn_row: Row) -> None:
    packing = {"op": "relu2", "rows": 8, "op_us": 128.3, "gb_per_s": 4185.0}
    packing |= {"of_copy": 0.99, "protocol": PROTOCOL, "device": "cuda"}
    rows = [ffn_row | {"op": "ffn", "tokens": 512, "data": "trained"}, packing]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = page.filled(PAGE, tmp_path)
    assert page.filled(made, tmp_path) == made
    before, _, rest = made.partition("| features, hidden |")
    assert before == "Before.\n\n<!-- table ffn from rows.jsonl -->\n\n"
    assert "anything" not in made
    assert "<!-- end of table -->\n\nBetween.\n\n<!-- table pack" in rest
    assert "| dense `relu(z)²` | 128 | 4,185 | 99% |" in rest
    assert rest.endswith("\n\n<!-- end of table -->\nAfter.\n")


def test_a_page_names_what_it_cannot_make(tmp_path: Path) -> None:
    with pytest.raises(RowFileError, match="cannot read rows"):
        page.filled(PAGE, tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(KeyError, match="poem"):
        page.filled(PAGE.replace("table ffn", "table poem"), tmp_path)
