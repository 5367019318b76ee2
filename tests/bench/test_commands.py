from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from inductor_sparse import cli
from inductor_sparse.bench import commands, ffn, gemm, pack
from inductor_sparse.bench.rows import PROTOCOL


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What argparse says about ``argv``."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("--density", "0", "'0' is not a fraction between 0 and 1"),
        ("--density", "0.1,x", "'x' is not a fraction between 0 and 1"),
        ("--dtype", "float32,int8", "'int8' is not one of float32, bfloat16, float16"),
        ("--op", "up", "'up' is not one of down, ffn"),
        ("--tokens", "1,-2", "'-2' is not a whole number above 0"),
        ("--features", "1.5", "'1.5' is not a whole number above 0"),
        ("--seconds", "nan", "'nan' is not a duration above 0"),
        ("--device", "tpu", "invalid choice: 'tpu'"),
        ("--size", "4096", "'4096' is not FEATURESxHIDDEN"),
        ("--size", "8x16,4x0", "'0' is not a whole number above 0"),
        ("--data", "real", "'real' is not one of random, trained"),
        ("--settings", "fast", "'fast' is not one of default, freezing"),
        ("--quantize", "fp4", "invalid choice: 'fp4'"),
    ],
)
def test_bench_rejects_bad_arguments(
    argument: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = usage_error(capsys, "bench", "ffn", argument, value)
    assert f"argument {argument}" in error
    assert message in error


def test_only_an_fp8_model_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("bench", "ffn", "--quantized-model", "--quantize", "int8")
    assert cli.main(argv) == cli.ERROR
    assert "--quantized-model needs --quantize fp8" in capsys.readouterr().err


def sweep_of(monkeypatch: pytest.MonkeyPatch, *argv: str) -> ffn.Sweep:
    """The grid that ``bench ffn`` would measure."""
    sweeps: list[ffn.Sweep] = []
    monkeypatch.setattr(ffn, "run", lambda sweep, _: iter(sweeps.append(sweep) or []))
    assert cli.main(["bench", "ffn", *argv]) == cli.OK
    return sweeps[0]


@pytest.mark.parametrize(
    ("argv", "kinds"),
    [
        ([], [("down", False), ("ffn", False), ("ffn", True)]),
        (["--gated"], [("ffn", True)]),
        (["--no-gated"], [("down", False), ("ffn", False)]),
        (["--op", "down"], [("down", False)]),
    ],
)
def test_bench_grid_follows_op_and_gated(
    argv: list[str], kinds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {case.dtype for case in sweep_of(monkeypatch).cases} == {"float32"}
    sweep = sweep_of(monkeypatch, *argv, "--dtype", "float32,bfloat16")
    found = [(case.dtype, case.op, case.gated) for case in sweep.cases]
    assert found == [(d, *kind) for d in ("float32", "bfloat16") for kind in kinds]
    assert sweep.tokens == (1, 16, 128, 512)
    assert sweep.densities == (0.05, 0.1, 0.5)


def test_bench_rejects_an_empty_grid(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ffn", "--op", "down", "--gated"]) == cli.ERROR
    assert "`down` is never gated" in capsys.readouterr().err


def test_bench_writes_rows_and_resumes(
    tmp_path: Path,
    ffn_row: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    argv = ["bench", "ffn", "--op", "down", "--settings", "default"]
    argv += ["--json", str(path), "--resume"]
    monkeypatch.setattr(ffn, "run", lambda sweep, _: iter([ffn_row]))
    assert cli.main(argv) == cli.OK
    assert [json.loads(line) for line in path.read_text().splitlines()] == [ffn_row]
    table = capsys.readouterr().out.splitlines()
    assert "8.00x [7.90, 8.10]" in table[1]
    sweep = sweep_of(monkeypatch, *argv[2:])
    assert sweep.done == {ffn.row_key(ffn_row)}
    assert sweep.size() == 11
    assert path.read_text().count("\n") == 1


def test_bench_resume_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ffn", "--resume"]) == cli.ERROR
    assert "--resume needs --json FILE" in capsys.readouterr().err


def test_bench_json_without_file_prints_rows_only(
    ffn_row: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ffn, "run", lambda sweep, _: iter([ffn_row]))
    assert cli.main(["bench", "ffn", "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out) == ffn_row


def test_interrupt_keeps_and_shows_the_rows(
    ffn_row: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(sweep: ffn.Sweep, report: object) -> Any:
        yield ffn_row
        raise KeyboardInterrupt

    monkeypatch.setattr(ffn, "run", run)
    assert cli.main(["bench", "ffn"]) == cli.INTERRUPTED
    captured = capsys.readouterr()
    assert "8.00x" in captured.out
    assert captured.err.endswith("interrupted\n")


@pytest.mark.parametrize("kind", ["ffn", "gemm", "pack", "linear", "compile"])
def test_bench_rejects_a_device_that_is_not_there(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["bench", kind, "--device", "cuda"]) == cli.ERROR
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_plot_command_names_its_picture(
    tmp_path: Path, ffn_row: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    rows.write_text(json.dumps(ffn_row))
    assert cli.main(["bench", "plot", str(rows), "--out", str(out)]) == cli.OK
    assert capsys.readouterr().out.strip() == str(out)
    assert out.exists()


def test_sizes_and_data_are_axes_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--op", "down", "--size", "8x16,4x32", "--data", "random,trained"]
    sweep = sweep_of(monkeypatch, *argv, "--quantize", "int8")
    found = [(case.features, case.hidden, case.data) for case in sweep.cases]
    data = ("random", "trained")
    assert found == [(*size, kind) for size in ((8, 16), (4, 32)) for kind in data]
    assert {case.quantize for case in sweep.cases} == {"int8"}


def test_settings_and_format_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--settings", "max-autotune,default", "--activation-format", "2:4"]
    sweep = sweep_of(monkeypatch, *argv)
    assert [setting.name for setting in sweep.settings] == ["default", "max-autotune"]
    assert sweep.options == {"sparse.activation_format": "2:4"}


def test_a_gpu_leaves_freezing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    sweep = sweep_of(monkeypatch, "--device", "cuda")
    assert [setting.name for setting in sweep.settings] == ["default", "max-autotune"]
    assert len(sweep_of(monkeypatch).settings) == 4


def test_a_gpu_has_its_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    sweep = sweep_of(monkeypatch, "--device", "cuda")
    assert {case.dtype for case in sweep.cases} == {"bfloat16"}
    assert sweep.densities == (0.02, 0.05, 0.1, 0.2, 0.5)
    assert sweep.tokens == (1, 2, 4, 8, 16, 2048, 8192)
    argv = ("--dtype", "float16", "--tokens", "3", "--density", "0.3")
    told = sweep_of(monkeypatch, "--device", "cuda", *argv)
    assert {case.dtype for case in told.cases} == {"float16"}
    assert (told.tokens, told.densities) == ((3,), (0.3,))


OPS = ("gemm", "down")  # the second row is not one of this benchmark


def test_gemm_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[gemm.GemmCase] = []
    monkeypatch.setattr(gemm, "run", lambda todo, *_: iter(seen.extend(todo) or []))
    argv = ["bench", "gemm", "--tokens", "8,16", "--size", "4x8", "--data", "trained"]
    argv += ["--density", "0.1", "--dtype", "int8", "--json", str(tmp_path / "r.jsonl")]
    assert cli.main(argv) == cli.OK
    assert [case.tokens for case in seen] == [8, 16]
    pairs = zip(seen, OPS, strict=True)
    rows = [
        dataclasses.asdict(case) | {"op": op, "protocol": PROTOCOL}
        for case, op in pairs
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen.clear()
    assert cli.main([*argv, "--resume"]) == cli.OK
    assert [case.tokens for case in seen] == [16]


def test_pack_resumes_and_keeps_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ffn_row: dict[str, Any]
) -> None:
    seen: list[pack.PackCase] = []
    monkeypatch.setattr(pack, "run", lambda todo, *_: iter(seen.extend(todo) or []))
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(ffn_row) + "\n")
    argv = ["bench", "pack", "--tokens", "8,16", "--json", str(path), "--resume"]
    assert cli.main(argv) == cli.OK
    assert [case.rows for case in seen] == [4096, 8, 16]
    with path.open("a") as stream:
        stream.write(
            json.dumps(dataclasses.asdict(seen[1]) | {"protocol": PROTOCOL}) + "\n"
        )
    seen.clear()
    assert cli.main(argv) == cli.OK
    assert [case.rows for case in seen] == [4096, 16]
    assert json.loads(path.read_text().splitlines()[0]) == ffn_row


def test_rows_of_another_method_are_measured_again(
    tmp_path: Path, ffn_row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    argv = ["--op", "down", "--tokens", "1", "--density", "0.1"]
    argv += ["--json", str(path), "--resume"]
    for protocol, left in ((PROTOCOL, 0), (1, 1), (None, 1)):
        path.write_text(json.dumps(ffn_row | {"protocol": protocol}))
        sweep = sweep_of(monkeypatch, *argv, "--settings", "default")
        assert sweep.size() == left


def test_rows_that_tried_fewer_settings_are_measured_again(
    tmp_path: Path, ffn_row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ffn_row))
    argv = ["--op", "down", "--tokens", "1", "--density", "0.1"]
    argv += ["--json", str(path), "--resume", "--settings"]
    assert sweep_of(monkeypatch, *argv, "default").size() == 0
    assert sweep_of(monkeypatch, *argv, "default,max-autotune").size() == 1


@pytest.mark.parametrize(("quick", "left"), [([], 1), (["--quick"], 0)])
def test_quick_products_are_measured_again_in_full(
    quick: list[str], left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[gemm.GemmCase] = []
    monkeypatch.setattr(gemm, "run", lambda todo, *_: iter(seen.extend(todo) or []))
    case = gemm.GemmCase(8, 8, 4, "float32", "random", 1.0)
    row = dataclasses.asdict(case) | {"op": "gemm", "protocol": PROTOCOL}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row | {"unavailable": {"x": gemm.LEFT_OUT}}))
    argv = ["bench", "gemm", "--tokens", "8", "--size", "4x8", "--json", str(path)]
    assert cli.main([*argv, "--resume", *quick]) == cli.OK
    assert len(seen) == left


def test_no_row_begins_after_the_minutes(
    ffn_row: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(commands.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(ffn, "run", lambda sweep, _: itertools.repeat(ffn_row))
    path = tmp_path / "rows.jsonl"
    argv = ["bench", "ffn", "--minutes", "1.5", "--json", str(path)]
    assert cli.main(argv) == cli.OK
    assert path.read_text().count("\n") == 3
