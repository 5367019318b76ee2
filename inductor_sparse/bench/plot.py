"""Draw the rows of ``bench ffn``: ratio over tokens, one line per density.

Rows of a GPU have a figure of their own: :mod:`inductor_sparse.bench.plot_gpu`.  Needs
matplotlib, which the optional extra ``inductor-sparse[bench]`` installs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inductor_sparse.bench.rows import Row, RowFileError
from inductor_sparse.errors import SparseError

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, told apart by all common forms of colour vision."""

MARKERS = "os^Dvp"
FIELDS = ("op", "tokens", "density", "dtype", "ratio", "ratio_low", "ratio_high")


class PlotDependencyError(SparseError, ImportError):
    """matplotlib is not installed."""


def draw(rows: Sequence[Row], out: str | Path) -> Path:
    """Write the figure of ``rows`` to ``out`` (format by suffix) and return its path.

    One panel per op and dtype; error bars are the 95 % intervals; below the line at
    1.0, shaded, the sparse backend is slower than the best dense one.  The background
    is an opaque white, so that the picture reads the same on a light and on a dark
    page.

    Raises:
        PlotDependencyError: matplotlib is missing.
        RowFileError: there are no rows, or rows of another benchmark.
    """
    if rows and all(row.get("device") == "cuda" for row in rows):
        from inductor_sparse.bench import plot_gpu

        return plot_gpu.draw(rows, Path(out))
    _check(rows)
    panels = sorted({_panel(row) for row in rows})
    dtypes = sorted({dtype for _, dtype in panels}, reverse=True)
    ops = sorted({op for op, _ in panels})
    made = figure(4.0 * len(ops), 3.2 * len(dtypes) + 0.5)
    grid = made.subplots(len(dtypes), len(ops), squeeze=False, sharex=True, sharey=True)
    for dtype, line in zip(dtypes, grid, strict=True):
        for op, axes in zip(ops, line, strict=True):
            _draw_panel(axes, [row for row in rows if _panel(row) == (op, dtype)])
            axes.set_ylim(*limits(rows))
            axes.set_title(f"{op}, {dtype}", fontsize=10)
    tokens = sorted({row["tokens"] for row in rows})
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
        axes.set_xticks(tokens, [str(count) for count in tokens])
    for line in grid:
        line[0].set_ylabel("dense time / sparse time")
    return save(made, Path(out), caption(rows))


def save(made: Any, path: Path, text: str) -> Path:
    """Write a figure with ``text`` below it; the same rows give the same file."""
    from matplotlib import rc_context

    lines = 1 + text.count("\n")
    height = made.get_size_inches()[1]
    made.text(0.01, 0.03 / height, text, fontsize=7, va="bottom")
    made.tight_layout(rect=(0, (0.02 + 0.13 * lines) / height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "inductor-sparse"}):
        made.savefig(path, dpi=160, facecolor="white", **undated)
    return path


def caption(rows: Sequence[Row]) -> str:
    """Device, threads, versions, sizes and dates of the rows."""
    said = {
        name: distinct(rows, name)
        for name in (
            *("device_name", "vector_isa", "threads", "torch"),
            *("dtype", "features", "hidden"),
        )
    }
    return (
        "{device_name} ({vector_isa}), {threads} threads; torch {torch}; "
        "dtype {dtype}; features {features}, hidden {hidden}; ".format_map(said)
        + f"{days(rows)}\n"
        "Baseline: the fastest of torch.compile with and without freezing and "
        "max-autotune. Bars: 95 % intervals. Shaded: slower than dense."
    )


def distinct(rows: Sequence[Row], field: str) -> str:
    """All values of a field."""
    return ", ".join(sorted({str(row.get(field, "unknown")) for row in rows}))


def days(rows: Sequence[Row]) -> str:
    """The day, or the first and the last day, of the rows."""
    dates = sorted({str(row.get("timestamp", "unknown"))[:10] for row in rows})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _check(rows: Sequence[Row]) -> None:
    """Refuse an empty file and the rows of another benchmark."""
    if not rows:
        raise RowFileError("there are no rows to draw")
    for number, row in enumerate(rows, 1):
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise RowFileError(
                f"row {number} has no {', '.join(missing)}: only rows of `bench ffn` "
                "can be drawn"
            )


def figure(width: float, height: float) -> Any:
    """A white figure of that many inches; it needs no display and no pyplot state.

    Raises:
        PlotDependencyError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotDependencyError(
            "drawing needs matplotlib: pip install 'inductor-sparse[bench]'"
        ) from error
    return Figure(figsize=(width, height), facecolor="white")


def _panel(row: Row) -> tuple[str, str]:
    """Which panel a row belongs to: the op, ``gated`` told apart, and the dtype."""
    gated = "gated " if row.get("gated") else ""
    return f"{gated}{row['op']}", row["dtype"]


def _draw_panel(axes: Any, rows: Sequence[Row]) -> None:
    """The lines of one panel, an empty one included."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    mark_losses(axes)
    for index, density in enumerate(sorted({row["density"] for row in rows})):
        line = sorted(
            (row for row in rows if row["density"] == density),
            key=lambda row: row["tokens"],
        )
        draw_line(
            axes,
            line,
            lambda row: row["tokens"],
            label=f"{density:.0%} non-zero",
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
        )
    _style(axes, rows)


def mark_losses(axes: Any) -> None:
    """The line at 1, and a shade below it."""
    axes.axhline(1.0, color="black", linewidth=1)
    axes.axhspan(1e-3, 1.0, color="#d62728", alpha=0.10, linewidth=0)


def draw_line(
    axes: Any, line: Sequence[Row], x: Callable[[Row], float], **style: str
) -> None:
    """Rows in the order of their ``x`` as points with asymmetric error bars."""
    ratios = [row["ratio"] for row in line]
    below = [row["ratio"] - row["ratio_low"] for row in line]
    above = [row["ratio_high"] - row["ratio"] for row in line]
    axes.errorbar(
        [x(row) for row in line],
        ratios,
        yerr=[below, above],
        markersize=4,
        linewidth=1.5,
        capsize=3,
        **style,
    )


def _style(axes: Any, rows: Sequence[Row]) -> None:
    """Ticks at plain ratios."""
    axes.minorticks_off()
    ticks = [0.5, 1, 2, 5, 10, 20]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.grid(True, which="major", alpha=0.3)
    if rows:
        axes.legend(fontsize=7, framealpha=0.9)


def limits(rows: Sequence[Row], least: float = 2.0) -> tuple[float, float]:
    """Vertical limits that hold every interval and always show the line at 1.

    They reach up to ``least`` at least, and below 1 by half of that on the scale.
    """
    low = min((row["ratio_low"] for row in rows), default=1.0)
    high = max((row["ratio_high"] for row in rows), default=1.0)
    return min(least**-0.5, low * 0.9), max(least, high * 1.15)
