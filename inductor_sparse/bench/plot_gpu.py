"""Draw the rows of a GPU: gains by tokens if there are many, by density if few."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inductor_sparse.bench import plot
from inductor_sparse.bench.page import latest
from inductor_sparse.bench.rows import FEW_TOKENS, Row, RowFileError

TRAINED_DENSITY = 0.1
"""Of the data in the panels for many tokens."""
FINE_TICKS = (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.5, 3)
COARSE_TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12)
FINE_RANGE = 3.5
"""Of the highest over the lowest gain: up to here fine ticks do not collide."""
APART = 0.25
"""How far points that would hide one another are set apart, in octaves."""
LEGEND = 0.25
"""Of the height of a panel: room for its legend."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Some rows, and what tells them apart: a colour, a marker, a place on the x axis.

    ``color`` and ``marker`` are numbers and the words of the legend, ``x`` a number and
    its label.
    """

    title: str
    x_title: str
    shown: Callable[[Row], bool]
    color: Callable[[Row], tuple[object, str]]
    marker: Callable[[Row], tuple[object, str]]
    x: Callable[[Row], float]
    tick: Callable[[float], str]


def draw(rows: Sequence[Row], out: Path) -> Path:
    """Write the figure of ``rows`` to ``out`` (format by suffix) and return its path.

    Panels of one line share their vertical axis and their markers.

    Raises:
        PlotDependencyError: matplotlib is missing.
        RowFileError: no row belongs into any panel.
    """
    rows = latest(rows)
    lines = [[(one, list(filter(one.shown, rows))) for one in line] for line in PANELS]
    drawn = [row for line in lines for _, shown in line for row in shown]
    if not drawn:
        raise RowFileError("there are no rows of `bench gemm` or `bench ffn` to draw")
    made = plot.figure(9.0, 7.6)
    grid = made.subplots(len(lines), len(lines[0]), sharey="row")
    for line, axes_of_line in zip(lines, grid, strict=True):
        of_line = [row for _, shown in line for row in shown]
        low, high = plot.limits(of_line, least=1.35)
        limits = (low, high * (high / low) ** (LEGEND / (1 - LEGEND)))
        for (panel, shown), axes in zip(line, axes_of_line, strict=True):
            markers = _styles(of_line, panel.marker, plot.MARKERS)
            _draw_panel(axes, panel, shown, limits, markers)
        axes_of_line[0].set_ylabel("dense time / sparse time")
    return plot.save(made, out, caption(drawn))


def caption(rows: Sequence[Row]) -> str:
    """Device, versions and dates; what lines, bars and symbols mean."""
    return (
        f"{plot.distinct(rows, 'device_name')}; torch {plot.distinct(rows, 'torch')}; "
        f"triton {plot.distinct(rows, 'triton')}; {plot.days(rows)}. Both sides in "
        "CUDA graphs, against the fastest dense side measured.\n"
        f"Many tokens: trained activations, {TRAINED_DENSITY:.0%} non-zero. Few tokens:"
        " random data in bf16, cold weights. Points are set apart a little.\n"
        "Bars: 95 % intervals. Hollow: left dense by the backend. Shaded: slower than "
        "dense."
    )


def _draw_panel(
    axes: Any,
    panel: Panel,
    rows: Sequence[Row],
    limits: tuple[float, float],
    markers: dict[tuple[Any, str], str],
) -> None:
    """Lines, hollow points where nothing was rewritten, axes and legend.

    ``markers`` may be more than those of this panel: neighbors mean the same by one.
    """
    colors = _styles(rows, panel.color, plot.COLORS)
    present = {panel.marker(row) for row in rows}
    markers = {value: style for value, style in markers.items() if value in present}
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plot.mark_losses(axes)
    for at, (color, marker) in enumerate(itertools.product(colors, markers)):
        line = [r for r in rows if (panel.color(r), panel.marker(r)) == (color, marker)]
        line.sort(key=panel.x)
        shift = 2 ** (APART * ((at + 0.5) / (len(colors) * len(markers)) - 0.5))
        style = {"color": colors[color], "marker": markers[marker]}
        plot.draw_line(axes, line, lambda row, by=shift: panel.x(row) * by, **style)
        dense = [row for row in line if row.get("status", "applied") != "applied"]
        points = [panel.x(row) * shift for row in dense], [r["ratio"] for r in dense]
        axes.plot(*points, **style, mfc="white", ls="none", ms=5, zorder=5)
    ticks = sorted({panel.x(row) for row in rows})
    axes.set_xticks(ticks, list(map(panel.tick, ticks)))
    if ticks:
        axes.set_xlim(ticks[0] * 2**-0.5, ticks[-1] * 2**0.5)
    axes.set_ylim(*limits)
    _gain_ticks(axes)
    _legend(axes, colors, markers)


def _styles(
    rows: Sequence[Row], of: Callable[[Row], tuple[object, str]], styles: Sequence[str]
) -> dict[tuple[Any, str], str]:
    """A style for every value there is, in the order of the values."""
    values: list[Any] = sorted({of(row) for row in rows})
    return {value: styles[at % len(styles)] for at, value in enumerate(values)}


def _gain_ticks(axes: Any) -> None:
    """Plain numbers, no more than can be read."""
    low, high = axes.get_ylim()
    every = FINE_TICKS if high / low < FINE_RANGE else COARSE_TICKS
    ticks = [tick for tick in every if low <= tick <= high]
    axes.minorticks_off()
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.tick_params(labelleft=True)
    axes.grid(True, which="major", alpha=0.3)


def _legend(
    axes: Any, colors: dict[tuple[Any, str], str], markers: dict[tuple[Any, str], str]
) -> None:
    """What colours mean, then what markers mean."""
    from matplotlib.lines import Line2D

    made: list[Any] = [
        Line2D([], [], color=color, linewidth=3, label=name)
        for (_, name), color in colors.items()
    ]
    made += [
        Line2D([], [], color="#444444", marker=marker, ms=5, ls="none", label=name)
        for (_, name), marker in markers.items()
    ]
    if made:
        axes.legend(
            handles=made, fontsize=7, framealpha=0.9, loc="upper right", ncols=2
        )


def _is_many(row: Row) -> bool:
    """Whether a row is in the panels for many tokens."""
    tenth = (row.get("data"), row.get("density")) == ("trained", TRAINED_DENSITY)
    return tenth and row["tokens"] > FEW_TOKENS and not row.get("gated")


def _is_few(row: Row) -> bool:
    """Whether a row is in the panels for few tokens."""
    return row.get("data") == "random" and row["tokens"] <= FEW_TOKENS


def _type(row: Row) -> tuple[object, str]:
    """bf16 before 8 bits."""
    if row.get("quantize", "none") != "none":
        return 1, row["quantize"]
    names = {"bfloat16": (0, "bf16"), "float8_e4m3fn": (1, "fp8")}
    return names.get(row["dtype"], (2, row["dtype"]))


def _size(row: Row) -> tuple[object, str]:
    """Of the weight of the second matmul."""
    return row["hidden"], f"{row['hidden']} to {row['features']}"


def _count(row: Row) -> tuple[object, str]:
    return row["tokens"], f"{row['tokens']} token{'s' * (row['tokens'] > 1)}"


def _tokens(row: Row) -> float:
    return row["tokens"]


def _density(row: Row) -> float:
    return row["density"]


def _thousands(count: float) -> str:
    """``8k`` for 8192."""
    return f"{count // 1024:g}k" if count % 1024 == 0 else f"{count:g}"


def _many_panel(op: str, title: str) -> Panel:
    """Gains of an op by tokens."""
    return Panel(
        f"{title}, many tokens",
        "tokens",
        lambda row: row["op"] == op and _is_many(row),
        _type,
        _size,
        _tokens,
        _thousands,
    )


def _few_panel(
    op: str, title: str, marker: Callable[[Row], tuple[object, str]]
) -> Panel:
    """Gains of an op by density."""
    return Panel(
        f"{title}, few tokens",
        "non-zero activations",
        lambda row: row["op"] == op and _is_few(row),
        _count,
        marker,
        _density,
        lambda density: f"{density:.0%}",
    )


PANELS = (
    (
        _many_panel("gemm", "2:4 product alone"),
        _many_panel("ffn", "whole FFN"),
    ),
    (
        _few_panel("down", "second matmul", _size),
        _few_panel(
            "ffn",
            "whole FFN",
            lambda row: (row["gated"], "gated" if row["gated"] else "not gated"),
        ),
    ),
)
