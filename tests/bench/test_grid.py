"""The grid is ordinary commands that cover what the tables need, once."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from inductor_sparse import cli, profitability
from inductor_sparse.bench import commands, edges, ffn, gemm, grid, linear, pack
from inductor_sparse.bench.models import ModelCase
from inductor_sparse.bench.rows import FEW_TOKENS

SIZES = [(4096, 16384), (8192, 28672), (5120, 21504)]
TOKENS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
DENSITIES = [0.05, 0.1, 0.15]


def parsed() -> list[argparse.Namespace]:
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    return [parser.parse_args(line.split()) for line in grid.commands()]


def test_every_product_of_the_tables_is_measured() -> None:
    cases = set()
    for one in parsed():
        if one.command is commands._bench_gemm and not one.quick:
            axes = (one.tokens, commands._sizes(one), one.dtype, one.data, one.density)
            cases |= set(itertools.product(*axes))
    dtypes = ["bfloat16", "float8_e4m3fn", "int8"]
    data = ["random", "trained"]
    shapes = [*itertools.product(TOKENS, SIZES), (8192, (8192, 8192))]
    wanted = itertools.product(shapes, dtypes, data, DENSITIES)
    assert cases == {(*shape, *rest) for shape, *rest in wanted}


def test_all_shapes_come_before_all_data() -> None:
    seen: set[tuple[Any, ...]] = set()
    for one in parsed():
        gemm_or_ffn = one.command in (commands._bench_gemm, commands._bench_ffn)
        if gemm_or_ffn and max(one.tokens) > FEW_TOKENS:
            kind = one.dtype[0] if one.command is commands._bench_gemm else one.quantize
            shapes = itertools.product(one.tokens, commands._sizes(one))
            missing = {(kind, *shape) for shape in shapes} - seen
            first = commands._sizes(one) == [(8192, 8192)]
            assert not missing or first or one.data == ["trained"]
            seen |= missing
    assert len(seen) == 5 * len(TOKENS) * len(SIZES) + 3


def test_slow_rows_come_last() -> None:
    """Autotuned sides take five times as long: but for what is quoted, they wait."""

    def is_slow(one: argparse.Namespace) -> bool:
        if one.command is commands._bench_gemm:
            return not one.quick
        return "max-autotune" in (getattr(one, "settings", None) or ())

    slow = [is_slow(one) for one in parsed()[10:]]
    first = slow.index(True)
    assert first > 20
    assert all(slow[first:])


@pytest.mark.parametrize("setting", ["default", "max-autotune"])
def test_every_ffn_of_the_tables_is_measured(setting: str) -> None:
    many, few = set(), set()
    for one in parsed():
        if one.command is not commands._bench_ffn or setting not in one.settings:
            continue
        axes = (one.tokens, commands._sizes(one), one.density)
        for tokens, size, density in itertools.product(*axes):
            if tokens > FEW_TOKENS:
                for data in one.data:
                    many.add((tokens, size, one.quantize, data, density))
            else:
                (op,) = one.op
                few.add((op, one.gated, tokens, size, density))
    data = ["random", "trained"]
    wanted = itertools.product(TOKENS, SIZES, ["none", "fp8"], data, DENSITIES)
    assert many == set(wanted)
    kinds = [("down", False), ("ffn", False), ("ffn", True)]
    decode = itertools.product(kinds, [1, 2, 4, 8, 16], [0.02, 0.05, 0.1, 0.2, 0.5])
    wanted_few = {(*kind, m, SIZES[0], d) for kind, m, d in decode}
    if setting == "default":
        wanted_few |= {
            ("down", False, 1, SIZES[1], d) for d in (0.02, 0.05, 0.1, 0.2, 0.5)
        }
    assert few == wanted_few


def test_one_token_meets_its_best_baseline_before_other_shapes() -> None:
    """The figures that are quoted first are against max-autotune as well."""
    first = [
        (*one.op, one.gated)
        for one in parsed()[:10]
        if one.command is commands._bench_ffn
        and one.tokens == [1]
        and one.settings == ["default", "max-autotune"]
    ]
    assert first == [("down", False), ("ffn", False), ("ffn", True)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be measured, in order; each takes no time."""
    seen: list[Any] = []

    def record(todo: Any, *_: Any) -> Any:
        seen.append(todo)
        return iter(())

    for module in (ffn, gemm, linear, pack):
        monkeypatch.setattr(module, "run", record)
    return seen


def run(path: Path, minutes: float = 1.0) -> int:
    argv = ["--device", "cpu", "--minutes", str(minutes), "--json", str(path)]
    return cli.main(["bench", "grid", *argv])


def test_one_command_runs_them_all(tmp_path: Path, measured: list[Any]) -> None:
    assert run(tmp_path / "rows.jsonl") == cli.OK
    assert len(measured) == len(list(grid.commands()))
    first, *_ = measured[0]
    assert (first.tokens, first.hidden, first.features) == (8192, 8192, 8192)


def test_edges_are_run_instead(tmp_path: Path, measured: list[Any]) -> None:
    path = str(tmp_path / "rows.jsonl")
    argv = ["--device", "cpu", "--edges", "--json", path]
    assert cli.main(["bench", "grid", *argv]) == cli.OK
    assert len(measured) == len(list(edges.commands()))
    cases = [case for sweep in measured for case in sweep.cases]
    assert {case.data for case in cases} == {"trained"}
    assert sum(case.quantized_model for case in cases) == 5


@pytest.mark.parametrize("dtype", list(edges.DOWN))
def test_of_the_products_among_the_edges_least_is_expected(dtype: str) -> None:
    gain = profitability.cuda.prefill_gain
    for tokens, features, hidden in edges.DOWN[dtype]:
        expected = gain(tokens, hidden, features, dtype, graphs=True)
        assert profitability.cuda.PREFILL_MARGIN <= expected < 1.25


def test_a_second_run_goes_on(
    tmp_path: Path, measured: list[Any], ffn_row: dict[str, Any]
) -> None:
    case = ModelCase(
        *("ffn", False, "relu2", "bfloat16", 4096, 16384, "cpu", "trained", "fp8")
    )
    row = ffn_row | dataclasses.asdict(case)
    row["dense_candidates_us"] = {"default": 1.0, "max-autotune": 1.0}
    path = tmp_path / "rows.jsonl"
    row |= {"tokens": 8192, "density": 0.15}
    path.write_text(json.dumps(row) + "\n")
    assert run(path) == cli.OK
    sweeps = [todo for todo in measured if isinstance(todo, ffn.Sweep)]
    sweep = next(one for one in sweeps if one.tokens == (8192,) and one.size() == 5)
    assert sweep.remaining(case, 8192) == (0.05, 0.1)


def test_a_failing_command_does_not_stop_the_others(
    tmp_path: Path,
    measured: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error: no luck")

    monkeypatch.setattr(pack, "run", fail)
    assert run(tmp_path / "rows.jsonl") == cli.ERROR
    assert len(measured) == len(list(grid.commands())) - 1
    error = capsys.readouterr().err
    assert "error: bench pack --dtype bfloat16" in error
    assert error.rstrip().endswith("CUDA error: no luck")


def test_the_minutes_are_those_of_all_commands(
    tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 9.0)
    monkeypatch.setattr(grid.time, "monotonic", lambda: next(clock))
    left: list[float] = []
    monkeypatch.setattr(
        commands, "_run_bench", lambda one, *_, **__: left.append(one.minutes) or 0
    )
    assert run(tmp_path / "rows.jsonl", minutes=0.5) == cli.OK
    assert [60 * minutes for minutes in left] == pytest.approx([21.0, 12.0, 3.0])
