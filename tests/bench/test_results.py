"""What the documents say of all rows that are kept holds for each of them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from inductor_sparse.bench import commands, edges
from inductor_sparse.bench.ffn import row_key
from inductor_sparse.bench.rows import FEW_TOKENS, is_current, read_rows

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS, EDGES = (read_rows(RESULTS / f"{n}.jsonl") for n in ("h200", "h200-edges"))
OF_MODELS = [row for row in ROWS if row["op"] in ("down", "ffn")]


def test_nothing_that_was_rewritten_on_a_gpu_is_slower_than_dense() -> None:
    applied = [row for row in OF_MODELS if row["status"] == "applied"]
    assert len(applied) > 200
    assert min(row["ratio"] for row in applied) > 1


def test_nothing_is_slower_where_least_is_expected() -> None:
    assert min(row["ratio"] for row in EDGES) > 1
    assert {row["status"] for row in EDGES} == {"applied"}
    assert sum(row["ratio_low"] < 1 for row in EDGES) == 2
    assert all(map(is_current, EDGES))
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    wanted = set()
    for line in edges.commands():
        one = parser.parse_args([*line.split(), "--device", "cuda"])
        (case,) = commands._model_cases(one)
        wanted.add((*dataclasses.astuple(case), *one.tokens, *one.density))
    assert {row_key(row) for row in EDGES} == wanted
    assert len(EDGES) == len(wanted)


def test_few_tokens_had_a_plan_and_many_had_none() -> None:
    plans = {(row["tokens"] > FEW_TOKENS, row["calibrated"]) for row in OF_MODELS}
    assert plans == {(False, True), (True, False)}


@pytest.mark.parametrize("quantize, column", [("none", 3), ("fp8", 4)])
@pytest.mark.parametrize("tokens", [512, 2048, 8192])
def test_the_front_page_says_what_a_whole_ffn_gains(
    tokens: int, quantize: str, column: int
) -> None:
    def is_it(row: dict[str, Any]) -> bool:
        size = (row["features"], row["hidden"], row["tokens"]) == (4096, 16384, tokens)
        data = (row["data"], row["density"]) == ("trained", 0.1)
        return size and data and row["quantize"] == quantize

    gain = [row["ratio"] for row in OF_MODELS if is_it(row)][-1]
    page = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    (line,) = (s for s in page.splitlines() if s.startswith(f"| ffn | {tokens} |"))
    assert line.split("|")[column].strip() == f"{gain:.2f}x"
