"""A progress bar that appears only when there is something to wait for."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

DELAY_SECONDS = 2.0


def tracked(items: Iterable[T], label: str) -> Iterator[T]:
    """Yield ``items``; after two seconds show on standard error how many are done.

    Nothing is drawn where standard error is not a terminal.  Without a known length the
    bar counts and moves, but does not fill.
    """
    total = len(items) if isinstance(items, Sized) else None
    start = time.monotonic()
    bar: Progress | None = None
    try:
        for done, item in enumerate(items):
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
            elif time.monotonic() - start > DELAY_SECONDS and sys.stderr.isatty():
                bar = _started(label, total, done)
            yield item
    finally:
        if bar is not None:
            bar.stop()


def _started(label: str, total: int | None, done: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    bar = Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task(label, total=total, completed=done)
    bar.start()
    return bar
