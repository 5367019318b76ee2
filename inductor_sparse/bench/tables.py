"""Rows of the benchmarks as text: which columns to show, and how to write a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from inductor_sparse.bench.rows import Row

Column = tuple[str, Callable[[Row], str]]
"""A header and what to write under it."""


def _us(key: str) -> Callable[[Row], str]:
    """Microseconds with as many digits as carry information."""
    return lambda row: f"{row[key]:,.0f}" if row[key] >= 100 else f"{row[key]:.1f}"


def _ratio(row: Row) -> str:
    """``5.21x [5.10, 5.33]``."""
    return f"{row['ratio']:.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


def _op(row: Row) -> str:
    """The op, ``gated`` spelled out."""
    return f"gated {row['op']}" if row["gated"] else row["op"]


def _status(row: Row) -> str:
    """``2 sites``, or why the model was left dense."""
    if row["status"] == "applied":
        return f"{row['sites_applied']} applied"
    return f"dense: {row['reason']}"


FFN: tuple[Column, ...] = (
    ("op", _op),
    ("tokens", lambda row: str(row["tokens"])),
    ("dtype", lambda row: row["dtype"]),
    ("non-zero", lambda row: f"{row['density_measured']:.1%}"),
    ("dense us", _us("dense_us")),
    ("sparse us", _us("sparse_us")),
    ("dense / sparse [95 %]", _ratio),
    ("verdict", lambda row: row["verdict"]),
    ("max rel err", lambda row: f"{row['max_rel_err']:.1e}"),
    ("best dense", lambda row: row["baseline"]),
    ("sites", _status),
)
PACK: tuple[Column, ...] = (
    ("op", lambda row: row["op"]),
    ("size", lambda row: f"{row['rows']}x{row['columns']}"),
    ("dtype", lambda row: row["dtype"]),
    ("us", _us("op_us")),
    ("GB/s", lambda row: f"{row['gb_per_s']:.2f}"),
    ("copy GB/s", lambda row: f"{row['copy_gb_per_s']:.2f}"),
    ("of copy speed [95 %]", _ratio),
)


def _side(name: str) -> Callable[[Row], str]:
    """``1131 TF 1.54x`` of one side of a product, or a dash where it did not run."""

    def write(row: Row) -> str:
        side = row["variants"].get(name)
        if side is None:
            return "-"
        return f"{side['tflop_per_s']:,.0f} TF {side['ratio']:.2f}x"

    return write


def _rate(row: Row) -> str:
    """What the sparse side reaches: of memory with few tokens, else of arithmetic."""
    if "sparse_gb_per_s" in row:
        return f"{row['sparse_gb_per_s']:,.0f} GB/s {row['of_copy']:.0%}"
    return f"{row['dense_tflop_per_s']:,.0f} -> {row['sparse_tflop_per_s']:,.0f} TF"


def _masked_load(row: Row) -> str:
    """Dense time over that of the masked-load kernel."""
    us = row.get("masked_load_us")
    return "-" if us is None else f"{row['dense_us'] / us:.2f}x"


GEMM: tuple[Column, ...] = (
    ("MxKxN", lambda row: f"{row['tokens']}x{row['hidden']}x{row['features']}"),
    ("dtype", lambda row: row["dtype"]),
    ("data", lambda row: f"{row['data']} {row['density_measured']:.0%}"),
    ("sparse us", _us("sparse_us")),
    ("sparse", _side("sparse24_mm")),
    ("dense / sparse [95 %]", _ratio),
    ("best dense", lambda row: row["baseline"]),
    ("torch.mm", _side("torch.mm")),
    ("torch.compile", _side("torch.compile")),
    ("_scaled_mm", _side("_scaled_mm")),
    ("cuSPARSELt", _side("cuSPARSELt")),
    ("max rel err", lambda row: f"{row['variants']['sparse24_mm']['max_rel_err']:.1e}"),
    ("kernel", lambda row: row["variants"]["sparse24_mm"]["note"]),
)
FFN_CUDA: tuple[Column, ...] = (
    ("op", _op),
    ("size", lambda row: f"{row['features']}x{row['hidden']}"),
    *FFN[1:3],
    ("data", lambda row: f"{row['data']} {row['density_measured']:.1%}"),
    *FFN[4:8],
    ("sparse rate", _rate),
    ("masked load", _masked_load),
    ("rms rel err", lambda row: f"{row['rms_rel_err']:.1e}"),
    ("dropped", lambda row: f"{row['dropped_energy']:.1e}"),
    *FFN[9:],
)
PACK_CUDA: tuple[Column, ...] = (
    *PACK,
    ("of the ceiling", lambda row: f"{row['of_copy']:.0%}"),
)
LINEAR: tuple[Column, ...] = (
    ("MxDxK", lambda row: f"{row['tokens']}x{row['features']}x{row['hidden']}"),
    ("dtype", lambda row: row["dtype"]),
    ("one kernel us", _us("fused_us")),
    ("two kernels us", _us("apart_us")),
    ("two / one [95 %]", _ratio),
    ("one / plain matmul", lambda row: f"{row['of_matmul']:.3f}"),
    ("rms rel err", lambda row: f"{row['rms_rel_err']:.1e}"),
    ("kernel", lambda row: row["note"]),
)
COMPILE: tuple[Column, ...] = (
    ("layers", lambda row: str(row["layers"])),
    ("sites", lambda row: str(row["sites_applied"])),
    ("inductor s", lambda row: f"{row['inductor_s']:.2f}"),
    ("sparse s", lambda row: f"{row['sparse_s']:.2f}"),
    ("sparse / inductor [95 %]", _ratio),
    ("verdict", lambda row: row["verdict"]),
)


def cells(columns: Sequence[Column], rows: Sequence[Row]) -> list[list[str]]:
    """The text of ``rows`` under ``columns``."""
    return [[write(row) for _, write in columns] for row in rows]


def headers(columns: Sequence[Column]) -> list[str]:
    """The headers of ``columns``."""
    return [header for header, _ in columns]
