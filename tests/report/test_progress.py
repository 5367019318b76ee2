"""The progress bar: absent when quick or piped, and never in the way of the items."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from inductor_sparse.report import progress
from inductor_sparse.report.progress import tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not a fixture: pytest replaces the stream between set-up and the test."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def items(length: int) -> Iterator[int]:
    yield from range(length)


def test_quick_work_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    assert list(tracked(range(3), "calibrating")) == [0, 1, 2]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("sized", [True, False])
def test_slow_work_draws_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, sized: bool
) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY_SECONDS", -1.0)
    source = range(3) if sized else items(3)
    assert list(tracked(source, "calibrating")) == [0, 1, 2]
    assert "calibrating" in terminal.getvalue()
    assert ("2/3" if sized else "2/?") in terminal.getvalue()


def test_a_pipe_gets_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY_SECONDS", -1.0)
    assert list(tracked(items(3), "calibrating")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_the_bar_is_taken_down_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY_SECONDS", -1.0)
    # The cursor, hidden while the bar is up, is shown again.
    with pytest.raises(ZeroDivisionError):
        for item in tracked(range(3), "calibrating"):
            1 / (item - 1)
    drawn = terminal.getvalue()
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1
