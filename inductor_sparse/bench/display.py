"""Tables and progress for the command line: rich on a terminal, plain text elsewhere.

Tables go to standard output, progress to standard error, so that a table or JSON can be
piped while progress stays visible.  Nothing here needs rich to be importable.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from inductor_sparse.errors import SparseError

if TYPE_CHECKING:
    from rich.progress import Progress

Update = Callable[[str, int], object]
"""Told what is going on and how many steps are done."""

QUIET_SECONDS = 2.0
"""Work shorter than this shows no progress at all."""


class TableError(SparseError, ValueError):
    """A row has another number of cells than the table has headers."""


def table_text(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, one line per row, no colour and no frames.

    Raises:
        TableError: a row does not have one cell per header.
    """
    _check(headers, rows)
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def print_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str] | None = None,
) -> None:
    """Print to standard output; ``styles`` are rich styles, one per row, for terminals.

    Raises:
        TableError: a row does not have one cell per header.
    """
    _check(headers, rows)
    if not sys.stdout.isatty():
        print(table_text(headers, rows))
        return
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(table_text(headers, rows))
        return
    table = Table(*headers)
    for index, row in enumerate(rows):
        style = styles[index] if styles is not None else ""
        table.add_row(*(Text(cell) for cell in row), style=style)
    Console().print(table)


def print_line(text: str, style: str = "") -> None:
    """Print one line to standard output at once; ``style`` is rich's, for terminals."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.text import Text

            Console().print(Text(text, style))
            return
    print(text, flush=True)


def print_report(report: object) -> None:
    """Print what has a rich form in colour on a terminal, else as its ``str``."""
    if not sys.stdout.isatty():
        print(report)
        return
    try:
        from rich.console import Console
    except ImportError:
        print(report)
        return
    Console().print(report)


@contextlib.contextmanager
def progress(total: int | None, unit: str) -> Iterator[Update]:
    """Show how far a job is; yields ``update(message, steps_done)``.

    On a terminal a bar, shown once the job has run for two seconds, with the time
    elapsed.  Elsewhere a line per finished step, so that the log of a long job is
    neither empty nor full of bars.

    Args:
        total: number of steps, or ``None`` for a job without steps.
        unit: what a step is, in the plural.
    """
    bar = _bar() if sys.stderr.isatty() else None
    if bar is None:
        yield _line_reporter(total, unit)
        return
    task = bar.add_task(unit, total=total)
    timer = threading.Timer(QUIET_SECONDS, bar.start)
    timer.start()
    try:
        yield lambda message, done: bar.update(
            task, completed=done, description=message
        )
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def _bar() -> Progress | None:
    """A bar that vanishes when it ends, or ``None`` without rich."""
    try:
        from rich import progress as parts
        from rich.console import Console
    except ImportError:
        return None
    columns = (
        parts.SpinnerColumn(),
        parts.BarColumn(bar_width=20),
        parts.MofNCompleteColumn(),
        parts.TimeElapsedColumn(),
        parts.TextColumn("{task.description}", markup=False),
    )
    return parts.Progress(*columns, console=Console(stderr=True), transient=True)


def _line_reporter(total: int | None, unit: str) -> Update:
    """An ``update`` that prints a line whenever a step was finished."""
    reported = 0

    def update(message: str, steps_done: int) -> None:
        nonlocal reported
        if total is not None and steps_done > reported:
            reported = steps_done
            print(f"{steps_done}/{total} {unit}: {message}", file=sys.stderr)

    return update


def _check(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One cell per header in every row."""
    for row in rows:
        if len(row) != len(headers):
            raise TableError(
                f"{len(headers)} headers but {len(row)} cells: {list(row)}"
            )
