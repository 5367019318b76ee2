from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from inductor_sparse.bench import plot
from inductor_sparse.bench.plot import PlotDependencyError, caption, draw
from inductor_sparse.bench.rows import RowFileError

Row = dict[str, Any]


def grid(row: Row) -> list[Row]:
    """Rows of two ops, two dtypes, three densities and three token counts."""
    return [
        row
        | {"op": op, "gated": gated, "dtype": dtype, "density": density}
        | {"tokens": tokens, "ratio": ratio}
        | {"ratio_low": ratio * 0.95, "ratio_high": ratio * 1.05}
        for op, gated in (("down", False), ("ffn", True))
        for dtype in ("float32", "bfloat16")
        for density in (0.05, 0.1, 0.5)
        for tokens in (1, 16, 512)
        for ratio in (0.4 / density,)
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_draws_every_panel(tmp_path: Path, ffn_row: Row, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    out = draw(grid(ffn_row), tmp_path / "new" / f"plot.{suffix}")
    assert out.stat().st_size > 10_000


def test_draws_a_single_row(tmp_path: Path, ffn_row: Row) -> None:
    pytest.importorskip("matplotlib")
    assert draw([ffn_row], tmp_path / "plot.png").exists()


def test_limits_hold_the_intervals_and_the_line_at_one(ffn_row: Row) -> None:
    low, high = plot._limits(grid(ffn_row))
    assert low < 0.4 / 0.5 * 0.95
    assert low < 1.0 < high
    assert high > 0.4 / 0.05 * 1.05


def test_caption_names_machine_versions_and_dates(ffn_row: Row) -> None:
    later = ffn_row | {"timestamp": "2026-02-03T00:00:00+00:00", "dtype": "bfloat16"}
    text = caption([later, ffn_row])
    for part in ("Some CPU", "2 threads", "torch 2.13.0", "bfloat16, float32"):
        assert part in text
    assert "2026-01-02 to 2026-02-03" in text


def test_rejects_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(RowFileError, match="no rows to draw"):
        draw([], tmp_path / "plot.png")


def test_rejects_rows_of_another_benchmark(tmp_path: Path, ffn_row: Row) -> None:
    with pytest.raises(RowFileError, match=r"row 2 has no tokens, .*density"):
        draw([ffn_row, {"op": "compile"}], tmp_path / "plot.png")


def test_says_what_to_install_without_matplotlib(
    tmp_path: Path, ffn_row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotDependencyError, match=r"inductor-sparse\[bench\]"):
        draw([ffn_row], tmp_path / "plot.png")
