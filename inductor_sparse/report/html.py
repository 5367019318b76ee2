"""The explain report as a fragment of HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from inductor_sparse.report.table import HEADERS, RIGHT_ALIGNED, Row


def render(conclusion: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A self-contained ``<div>``: the conclusion, the table, and the notes below it."""
    parts = ["<div>", f"<p><b>{escape(conclusion)}</b></p>"]
    if rows:
        head = "".join(_cell("th", header, header) for header in HEADERS)
        body = "".join(_row(row) for row in rows)
        parts.append(
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    return "\n".join([*parts, "</div>"])


def _row(row: Row) -> str:
    cells = "".join(
        _cell("td", header, cell)
        for header, cell in zip(HEADERS, row.cells, strict=True)
    )
    note = (
        f'<tr><td colspan="{len(HEADERS)}"><small>{escape(row.note)}</small></td></tr>'
    )
    return f"<tr>{cells}</tr>{note if row.note else ''}"


def _cell(tag: str, header: str, text: str) -> str:
    align = "right" if header in RIGHT_ALIGNED else "left"
    return f'<{tag} style="text-align:{align}">{escape(text)}</{tag}>'
