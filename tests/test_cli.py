from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inductor_sparse import cli
from inductor_sparse.doctor import CHECKS, Check, CheckStatus
from inductor_sparse.errors import SparseOptionError
from inductor_sparse.passes import PIPELINE

TARGET = """
import torch
from torch import nn

class Ffn(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.activation = activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))

def relu2():
    return Ffn(lambda x: torch.relu(x) ** 2).eval(), (torch.randn(4, 16),)

def with_kwargs():
    return Ffn(torch.relu).eval(), [], {"x": torch.randn(4, 16)}

def silu():
    return Ffn(nn.functional.silu).eval(), (torch.randn(4, 16),)

def only_a_model():
    return Ffn(torch.relu)
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a module with models, importable as ``cli_target`` too."""
    path = tmp_path / "cli_target.py"
    path.write_text(TARGET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_target", raising=False)
    return str(path)


def test_explain_prints_a_table(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", f"{target}:relu2"]) == cli.OK
    captured = capsys.readouterr()
    assert "down" in captured.out
    assert captured.err == ""


def test_explain_json_has_the_sites(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", "cli_target:with_kwargs", "--json"]) == cli.OK
    (site,) = json.loads(capsys.readouterr().out)["sites"]
    assert site["module"] == "down"
    assert site["rule"] == "relu_matmul"
    assert site["status"] == "applied"


def test_explain_strict_exits_with_bad_news(target: str) -> None:
    assert cli.main(["explain", f"{target}:silu", "--strict"]) == cli.BAD_NEWS
    assert cli.main(["explain", f"{target}:relu2", "--strict"]) == cli.OK


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_colon", "is not package.module:function or path.py:function"),
        ("no_such_module:make", "cannot import no_such_module"),
        ("no_such_file.py:make", "there is no file no_such_file.py"),
        ("cli_target:missing", "cli_target has no function 'missing'"),
        ("cli_target:only_a_model", "must return .* it returned Ffn"),
    ],
)
def test_explain_rejects_a_bad_target(target: str, name: str, message: str) -> None:
    with pytest.raises(SparseOptionError, match=message):
        cli.load_target(name)


def test_errors_go_to_stderr_with_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "no_colon"]) == cli.ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("error: 'no_colon' is not")
    assert captured.out == ""


def test_passes_json_is_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes", "--json"]) == cli.OK
    rows = json.loads(capsys.readouterr().out)["passes"]
    assert [row["name"] for row in rows] == [step.name for step in PIPELINE]
    assert {row["kind"] for row in rows} == {"rule", "pass"}
    assert all(row["summary"] for row in rows)
    assert all((row["tier"] is None) == (row["kind"] == "pass") for row in rows)


def test_passes_tables_have_a_cell_per_header(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["passes", "--markdown"]) == cli.OK
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PIPELINE) + 2
    assert {line.replace(r"\|", "").count("|") for line in lines} == {5}
    assert cli.main(["passes"]) == cli.OK
    assert len(capsys.readouterr().out.splitlines()) == len(PIPELINE) + 1


@pytest.mark.parametrize("status", list(CheckStatus))
def test_doctor_exits_by_its_worst_check(
    status: CheckStatus,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checks = [Check("one", status, "seen", "do"), Check("two", CheckStatus.PASS, "x")]
    monkeypatch.setattr("inductor_sparse.doctor.run_checks", lambda: checks)
    expected = cli.BAD_NEWS if status is CheckStatus.FAIL else cli.OK
    assert cli.main(["doctor", "--json"]) == expected
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (expected == cli.OK)
    assert report["checks"][0]["status"] == status.value
    assert cli.main(["doctor"]) == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [status.value, "one", "seen"]
    assert lines[2].strip() == "what to do: do"
    assert lines[3].split() == ["pass", "two", "x"]
    assert lines[0].index("found") == lines[1].index("seen") == lines[3].index("x")


@pytest.mark.parametrize("terminal", [False, True])
def test_doctor_prints_each_check_when_it_ends(
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def checks() -> Iterator[Check]:
        yield Check("quick", CheckStatus.PASS, "yes")
        assert "quick" in capsys.readouterr().out
        yield Check("slow", CheckStatus.WARN, "late", "wait")
        assert "wait" in capsys.readouterr().out

    monkeypatch.setattr("inductor_sparse.doctor.run_checks", checks)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert cli.main(["doctor"]) == cli.OK


def test_names_of_checks_fit_their_column() -> None:
    assert max(len(name) for name, _, _ in CHECKS) < cli._NAME_WIDTH


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inductor_sparse", "passes", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passes"]
