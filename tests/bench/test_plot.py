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
    low, high = plot.limits(grid(ffn_row))
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


def gpu_rows(row: Row) -> list[Row]:
    """Products, FFNs and decoding of a GPU, and a row that no panel shows."""
    gpu = row | {"device": "cuda", "triton": "3.6.0", "device_name": "Some GPU"}
    many = gpu | {"data": "trained", "dtype": "bfloat16"}
    rows = [
        many | {"op": op, "tokens": tokens, "quantize": quantize, "ratio": 1.2}
        for op in ("gemm", "ffn")
        for tokens in (512, 8192)
        for quantize in ("none", "fp8")
    ]
    dense = rows[-1] | {"tokens": 1024, "status": "dense", "ratio": 1.0}
    few = [gpu | {"op": "down", "density": density} for density in (0.1, 0.5)]
    few.append(gpu | {"op": "ffn", "gated": True, "tokens": 4})
    spread = {"ratio_low": 0.95, "ratio_high": 8.2}
    return [one | spread for one in (*rows, dense, *few)] + [{"op": "relu2", "rows": 8}]


def axes_of(
    rows: list[Row], out: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The panels of a GPU's figure by their titles."""
    made: list[Any] = []
    figure = plot.figure
    monkeypatch.setattr(
        plot, "figure", lambda *size: made.append(figure(*size)) or made[0]
    )
    draw([one | {"device": "cuda"} for one in rows], out)
    return {axes.get_title(): axes for axes in made[0].axes}


def test_a_gpu_has_a_panel_for_each_regime(
    tmp_path: Path, ffn_row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    panels = axes_of(gpu_rows(ffn_row), tmp_path / "plot.svg", monkeypatch)
    assert list(panels) == [
        *("2:4 product alone, many tokens", "whole FFN, many tokens"),
        *("second matmul, few tokens", "whole FFN, few tokens"),
    ]
    ticks = {
        name: [label.get_text() for label in axes.get_xticklabels()]
        for name, axes in panels.items()
    }
    assert list(ticks.values()) == [
        *(["512", "8k"], ["512", "1k", "8k"], ["10%", "50%"], ["10%"])
    ]
    legend = panels["whole FFN, many tokens"].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["bf16", "fp8", "16384 to 4096"]
    hollow = [
        list(line.get_ydata())
        for line in panels["whole FFN, many tokens"].lines
        if line.get_markerfacecolor() == "white" and len(line.get_ydata())
    ]
    assert hollow == [[1.0]]
    for axes in panels.values():
        low, high = axes.get_ylim()
        assert low < 0.95 < 8.2 < high


def test_a_size_has_the_same_marker_in_both_panels_of_a_line(
    tmp_path: Path, ffn_row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    rows = gpu_rows(ffn_row)
    smaller = rows[0] | {"hidden": 1024, "features": 1024}
    panels = axes_of([smaller, *rows], tmp_path / "plot.svg", monkeypatch)
    names = "2:4 product alone, many tokens", "whole FFN, many tokens"
    legends = [panels[name].get_legend() for name in names]
    found = [
        {
            text.get_text(): handle.get_marker()
            for text, handle in zip(
                legend.get_texts(), legend.legend_handles, strict=True
            )
        }
        for legend in legends
    ]
    assert found[0]["16384 to 4096"] == found[1]["16384 to 4096"]
    assert found[0]["1024 to 1024"] != found[0]["16384 to 4096"]
    assert "1024 to 1024" not in found[1]


def test_the_same_rows_give_the_same_picture(tmp_path: Path, ffn_row: Row) -> None:
    pytest.importorskip("matplotlib")
    rows = [row | {"device": "cuda"} for row in gpu_rows(ffn_row)]
    first, second = (draw(rows, tmp_path / f"{n}.svg").read_bytes() for n in (1, 2))
    assert first == second


def test_a_gpu_without_a_row_to_draw_is_refused(tmp_path: Path) -> None:
    packing = {"op": "relu2", "rows": 8, "device": "cuda"}
    with pytest.raises(RowFileError, match="no rows of `bench gemm` or `bench ffn`"):
        draw([packing], tmp_path / "plot.png")


def test_every_count_of_tokens_has_a_tick(
    tmp_path: Path, ffn_row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    made: list[Any] = []
    figure = plot.figure
    monkeypatch.setattr(
        plot, "figure", lambda *size: made.append(figure(*size)) or made[0]
    )
    rows = [ffn_row | {"tokens": 512}, ffn_row, ffn_row | {"op": "ffn", "tokens": 16}]
    draw(rows, tmp_path / "plot.png")
    labels = made[0].axes[-1].get_xticklabels()
    assert [label.get_text() for label in labels] == ["1", "16", "512"]
