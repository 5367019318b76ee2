"""The explain report as fixed-width lines, never cut short.

Plain for files and pipes, coloured for terminals; the letters are the same.  The last
column is the decision: it may be long without pushing the others around.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from inductor_sparse.report.table import HEADERS, RIGHT_ALIGNED, Row

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 80
"""Sentences are folded to this; the table is as wide as what it holds."""

_GAP = "  "
_TITLE, _HEADER, _APPLIED, _DENSE, _NOTE, _PLAIN = (
    "bold",
    "underline",
    "green",
    "yellow",
    "dim",
    "",
)


def render(conclusion: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The report as one string without colours."""
    return "\n".join(line for line, _ in _lines(conclusion, rows, notes))


def render_rich(conclusion: str, rows: Sequence[Row], notes: Sequence[str]) -> Text:
    """The same report as a rich ``Text``, folded where the terminal is narrower."""
    from rich.text import Text

    text = Text(overflow="fold")
    for line, style in _lines(conclusion, rows, notes):
        text.append(line + "\n", style=style or None)
    text.rstrip()
    return text


def _lines(
    conclusion: str, rows: Sequence[Row], notes: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Each line with its style."""
    yield conclusion, _TITLE
    if rows:
        yield "", _PLAIN
        table = [HEADERS, *(row.cells for row in rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADERS))]
        yield _line(HEADERS, widths), _HEADER
        for row in rows:
            yield _line(row.cells, widths), _APPLIED if row.applied else _DENSE
            for line in _wrapped(row.note, _GAP):
                yield line, _NOTE
    if notes:
        yield "", _PLAIN
    for note in notes:
        for line in _wrapped(note):
            yield line, _PLAIN


def _wrapped(text: str, indent: str = "") -> list[str]:
    """Lines of at most :data:`WIDTH`; a longer word, such as a path, stays whole."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if header in RIGHT_ALIGNED else cell.ljust(width)
        for header, cell, width in zip(HEADERS, cells, widths, strict=True)
    ]
    return _GAP.join(padded).rstrip()
