"""Draw the rows of ``bench ffn``: ratio over tokens, one line per density.

Needs matplotlib, which the optional extra ``inductor-sparse[bench]`` installs.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    _check(rows)
    figure_class = _figure_class()
    panels = sorted({_panel(row) for row in rows})
    dtypes = sorted({dtype for _, dtype in panels}, reverse=True)
    ops = sorted({op for op, _ in panels})
    figure = figure_class(figsize=(4.0 * len(ops), 3.2 * len(dtypes) + 0.5))
    figure.set_facecolor("white")
    grid = figure.subplots(
        len(dtypes), len(ops), squeeze=False, sharex=True, sharey=True
    )
    for dtype, line in zip(dtypes, grid, strict=True):
        for op, axes in zip(ops, line, strict=True):
            _draw_panel(axes, [row for row in rows if _panel(row) == (op, dtype)])
            axes.set_ylim(*_limits(rows))
            axes.set_title(f"{op}, {dtype}", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
    for line in grid:
        line[0].set_ylabel("dense time / sparse time")
    figure.text(0.01, 0.008, caption(rows), fontsize=7, va="bottom")
    figure.tight_layout(rect=(0, 0.055, 1, 1))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    return path


def caption(rows: Sequence[Row]) -> str:
    """Device, threads, versions, sizes and dates of the rows."""

    def distinct(key: str) -> str:
        return ", ".join(sorted({str(row.get(key, "unknown")) for row in rows}))

    dates = sorted({str(row.get("timestamp", "unknown"))[:10] for row in rows})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{distinct('device_name')} ({distinct('vector_isa')}), "
        f"{distinct('threads')} threads; torch {distinct('torch')}; "
        f"dtype {distinct('dtype')}; features {distinct('features')}, "
        f"hidden {distinct('hidden')}; {days}\n"
        "Baseline: the fastest of torch.compile with and without freezing and "
        "max-autotune. Bars: 95 % intervals. Shaded: slower than dense."
    )


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


def _figure_class() -> Any:
    """matplotlib's ``Figure``, which needs no display and no pyplot state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotDependencyError(
            "drawing needs matplotlib: pip install 'inductor-sparse[bench]'"
        ) from error
    return Figure


def _panel(row: Row) -> tuple[str, str]:
    """Which panel a row belongs to: the op, ``gated`` told apart, and the dtype."""
    gated = "gated " if row.get("gated") else ""
    return f"{gated}{row['op']}", row["dtype"]


def _draw_panel(axes: Any, rows: Sequence[Row]) -> None:
    """The lines of one panel, an empty one included."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.axhspan(1e-3, 1.0, color="#d62728", alpha=0.10, linewidth=0)
    for index, density in enumerate(sorted({row["density"] for row in rows})):
        line = sorted(
            (row for row in rows if row["density"] == density),
            key=lambda row: row["tokens"],
        )
        _draw_line(axes, line, f"{density:.0%} non-zero", index)
    _style(axes, rows)


def _draw_line(axes: Any, line: Sequence[Row], label: str, index: int) -> None:
    """One density: points with asymmetric error bars."""
    ratios = [row["ratio"] for row in line]
    below = [row["ratio"] - row["ratio_low"] for row in line]
    above = [row["ratio_high"] - row["ratio"] for row in line]
    axes.errorbar(
        [row["tokens"] for row in line],
        ratios,
        yerr=[below, above],
        label=label,
        color=COLORS[index % len(COLORS)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        linewidth=1.5,
        capsize=3,
    )


def _style(axes: Any, rows: Sequence[Row]) -> None:
    """Ticks at the measured tokens and at plain ratios."""
    tokens = sorted({row["tokens"] for row in rows})
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.minorticks_off()
    ticks = [0.5, 1, 2, 5, 10, 20]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.grid(True, which="major", alpha=0.3)
    if rows:
        axes.legend(fontsize=7, framealpha=0.9)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Vertical limits that hold every interval and always show the line at 1."""
    low = min(row["ratio_low"] for row in rows)
    high = max(row["ratio_high"] for row in rows)
    return min(0.7, low * 0.9), max(2.0, high * 1.15)
