from __future__ import annotations

import time
from typing import Any

import pytest

from inductor_sparse.bench import display, tables
from inductor_sparse.bench.display import (
    TableError,
    print_report,
    print_table,
    progress,
    table_text,
)


def test_columns_are_aligned() -> None:
    text = table_text(["a", "long"], [["wide cell", "x"], ["y", ""]])
    assert text == "a          long\nwide cell  x\ny"


@pytest.mark.parametrize("show", [table_text, print_table])
def test_rejects_a_row_of_another_width(show: Any) -> None:
    with pytest.raises(TableError, match="2 headers but 1 cells"):
        show(["a", "b"], [["only one"]])


def test_table_is_plain_when_not_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table(["check"], [["[bold]not markup[/bold]"]], ["green"])
    assert capsys.readouterr().out == "check\n[bold]not markup[/bold]\n"


def test_table_is_framed_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    print_table(["check"], [["[bold]not markup[/bold]"]], ["green"])
    out = capsys.readouterr().out
    assert "[bold]not markup[/bold]" in out
    assert "┃" in out


def test_report_is_its_text_when_not_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report("[bold]verbatim[/bold]")
    assert capsys.readouterr().out == "[bold]verbatim[/bold]\n"


def test_progress_is_a_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(2, "rows") as update:
        update("compiling", 0)
        update("first", 1)
        update("compiling", 1)
        update("second", 2)
    captured = capsys.readouterr()
    assert captured.err == "1/2 rows: first\n2/2 rows: second\n"
    assert captured.out == ""


def test_progress_without_steps_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "checks") as update:
        update("checking", 0)
    assert capsys.readouterr().err == ""


def test_progress_bar_appears_only_when_a_job_is_slow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress(2, "rows") as update:
        update("quick", 1)
    assert "quick" not in capsys.readouterr().err
    monkeypatch.setattr(display, "QUIET_SECONDS", 0.0)
    with progress(2, "rows") as update:
        update("slow [job]", 1)
        # Nothing to wait on from outside: the bar starts on a thread of its own.
        time.sleep(0.3)
    assert "slow [job]" in capsys.readouterr().err


def test_ffn_cells_say_what_the_row_says(ffn_row: dict[str, Any]) -> None:
    (cells,) = tables.cells(tables.FFN, [ffn_row])
    shown = dict(zip(tables.headers(tables.FFN), cells, strict=True))
    assert shown["dense / sparse [95 %]"] == "8.00x [7.90, 8.10]"
    assert shown["dense us"] == "12,346"
    assert shown["verdict"] == "faster"
    assert shown["sites"] == "1 applied"
    ffn_row |= {"status": "dense", "reason": "too-dense", "gated": True, "op": "ffn"}
    (cells,) = tables.cells(tables.FFN, [ffn_row])
    assert "dense: too-dense" in cells
    assert cells[0] == "gated ffn"
