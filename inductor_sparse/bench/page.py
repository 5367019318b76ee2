"""Tables of a Markdown page, written from the rows that a file of results has now.

In the page a table stands between two comments, the first of which names its kind and
its file::

    <!-- table gemm from benchmarks/results/NAME.jsonl -->
    <!-- end of table -->

Of several rows of one measurement the last in the file counts.  A value from rows of an
earlier protocol carries a :data:`MARK`; a gain for few tokens that autotuned sides took
part in carries a :data:`TUNED`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from inductor_sparse.bench.rows import FEW_TOKENS, Row, is_current, read_rows

AXES = (
    *("op", "gated", "activation", "dtype", "quantize", "device", "features", "hidden"),
    *("rows", "columns", "tokens", "data", "density", "quantized_model"),
)
"""What tells two measurements apart, in any benchmark; most rows lack some of them."""
MARK = "°"
TUNED = "*"

_TABLE = re.compile(
    r"(<!-- table (\w+) from (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL
)
_TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8",
    "int8": "int8",
    "float32": "fp32",
}
_PACKING = {
    "sparsify24": "2:4 in bf16",
    "sparsify24_energy": "the same, counting the energy",
    "sparsify24_largest_abs": "of either sign, after a gate",
    "sparsify24_fp8": "2:4 in fp8, with row scales",
    "sparsify24_int8": "2:4 in int8, with row scales",
    "quantize_rows_fp8": "dense fp8, with row scales",
    "quantize_rows_int8": "dense int8, with row scales",
    "relu2": "dense `relu(z)²`",
}

Kind = tuple[object, object]
"""Data and density."""
Lines = Mapping[tuple[object, ...], Mapping[Kind, Row]]
Column = tuple[str, Callable[[Mapping[Kind, Row]], str]]
"""A header, and what to write under it of a line's rows."""
TRAINED: Kind = ("trained", 0.1)


def filled(text: str, root: Path) -> str:
    """``text`` with every table made anew; paths in it are relative to ``root``.

    Raises:
        RowFileError: a file of rows cannot be read.
        KeyError: there is no such kind of table.
    """

    def make(found: re.Match[str]) -> str:
        begin, kind, path, end = found.groups()
        rows = latest(read_rows(root / path))
        return f"{begin}\n{TABLES[kind](rows)}\n\n{end}"

    return _TABLE.sub(make, text)


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every measurement."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        # A row may be older than an axis, of which it has the default then.
        found[tuple(row.get(axis) or None for axis in AXES)] = row
    return list(found.values())


def gemm_table(rows: Sequence[Row]) -> str:
    """Products: one line per shape and type, data side by side."""
    chosen = [row for row in rows if row["op"] == "gemm"]
    order = list(_TYPES)
    lines = _lines(
        chosen,
        lambda r: (order.index(r["dtype"]), *_size(r), r["tokens"], r["dtype"]),
    )
    return _table(
        lines,
        (
            ("M x K x N", _of_any(_product)),
            ("type", _of_any(lambda r: _TYPES[r["dtype"]])),
            ("sparse", _at(TRAINED, lambda r: _rate(r, "sparse24_mm"))),
            ("dense", _at(TRAINED, lambda r: _rate(r, r["baseline"]))),
            *((f"{d:.0%}", _at(("trained", d), _gain)) for d in (0.05, 0.1, 0.15)),
            ("random", _at(("random", 1.0), _gain)),
            *(
                (f"over {side}, {name}", _at(kind, _over(side)))
                for side in ("cuSPARSELt", "torchao")
                for name, kind in (("10%", TRAINED), ("random", ("random", 1.0)))
            ),
        ),
        text=2,
    )


def ffn_table(rows: Sequence[Row]) -> str:
    """Whole FFNs with many tokens: one line per shape and type."""
    chosen = [r for r in rows if r["op"] == "ffn" and r["tokens"] > FEW_TOKENS]
    lines = _lines(
        [row for row in chosen if not row["gated"]],
        lambda r: (r["quantize"] != "none", *_size(r), r["tokens"], r["quantize"]),
    )
    return _table(
        lines,
        (
            ("features, hidden", _of_any(lambda r: f"{r['features']}, {r['hidden']}")),
            ("type", _of_any(_ffn_type)),
            ("tokens", _of_any(lambda r: str(r["tokens"]))),
            ("dense us", _at(TRAINED, lambda r: _us(r["dense_us"]))),
            ("sparse us", _at(TRAINED, lambda r: _us(r["sparse_us"]))),
            ("5%", _at(("trained", 0.05), _gain)),
            ("10% [95 %]", _at(TRAINED, _interval)),
            ("15%", _at(("trained", 0.15), _gain)),
            ("10%, random", _at(("random", 0.1), _gain)),
            ("torchao us", _at(TRAINED, _torchao)),
            ("error (dense)", _at(TRAINED, _error)),
        ),
        text=2,
    )


def edges_table(rows: Sequence[Row]) -> str:
    """The cases of `bench grid --edges`: one line for each."""
    lines = _lines(
        rows,
        lambda r: (_op(r), _ffn_type(r), _kind(r), *_size(r), r["tokens"]),
    )
    return _table(
        lines,
        (
            ("op", _of_any(_kind)),
            ("type", _of_any(_ffn_type)),
            ("features, hidden", _of_any(lambda r: f"{r['features']}, {r['hidden']}")),
            ("tokens", _of_any(lambda r: str(r["tokens"]))),
            ("dense us", _at(TRAINED, lambda r: _us(r["dense_us"]))),
            ("sparse us", _at(TRAINED, lambda r: _us(r["sparse_us"]))),
            ("gain [95 %]", _at(TRAINED, _interval)),
            ("error (dense)", _at(TRAINED, _error)),
        ),
        text=3,
    )


def decode_table(rows: Sequence[Row]) -> str:
    """FFN sites with few tokens: one line per op, size and number of tokens."""
    chosen = [
        row
        for row in rows
        if row["op"] in ("down", "ffn") and row["tokens"] <= FEW_TOKENS
    ]
    lines = _lines(chosen, lambda r: (r["op"], r["gated"], *_size(r), r["tokens"]))
    tenth: Kind = ("random", 0.1)
    densities = (0.02, 0.05, 0.1, 0.2, 0.5)
    return _table(
        lines,
        (
            ("op", _of_any(_op)),
            ("features, hidden", _of_any(lambda r: f"{r['features']}, {r['hidden']}")),
            ("tokens", _of_any(lambda r: str(r["tokens"]))),
            ("dense us", _at(tenth, lambda r: _us(r["dense_us"]))),
            ("sparse us", _at(tenth, lambda r: _us(r["sparse_us"]))),
            *((f"{d:.0%}", _at(("random", d), _decode_gain)) for d in densities),
            ("masked load", _at(tenth, _masked)),
            ("needed", _at(tenth, _needed)),
        ),
        text=2,
    )


def pack_table(rows: Sequence[Row]) -> str:
    """Packing on a GPU: one line per op, in the order they were measured."""
    chosen = [row for row in rows if row["op"] in _PACKING and "rows" in row]
    lines: Lines = {(row["op"],): {("", None): row} for row in chosen}
    return _table(
        lines,
        (
            ("op", _of_any(lambda r: _PACKING[r["op"]] + _mark(r))),
            ("us", _of_any(lambda r: _us(r["op_us"]))),
            ("GB/s", _of_any(lambda r: f"{r['gb_per_s']:,.0f}")),
            ("of the ceiling", _of_any(lambda r: f"{r['of_copy']:.0%}")),
        ),
        text=1,
    )


def cpu_table(rows: Sequence[Row]) -> str:
    """FFN sites on a CPU: one line per op and number of tokens."""
    lines: dict[tuple[object, ...], dict[Kind, Row]] = {}
    for row in sorted(rows, key=lambda r: (r["op"], r["gated"], r["tokens"])):
        line = lines.setdefault((row["op"], row["gated"], row["tokens"]), {})
        line[row["dtype"], row["density"]] = row
    kinds = [
        (dtype, density)
        for dtype in ("float32", "bfloat16")
        for density in (0.05, 0.1, 0.5)
    ]
    return _table(
        lines,
        (
            ("op", _of_any(_op)),
            ("tokens", _of_any(lambda r: str(r["tokens"]))),
            *((f"{_TYPES[t]}, {d:.0%}", _at((t, d), _plain_gain)) for t, d in kinds),
        ),
        text=1,
    )


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "gemm": gemm_table,
    "ffn": ffn_table,
    "edges": edges_table,
    "decode": decode_table,
    "pack": pack_table,
    "cpu": cpu_table,
}


def _lines(rows: Iterable[Row], key: Callable[[Row], tuple[object, ...]]) -> Lines:
    """Rows that share a line of a table, by their data; lines in the order of keys."""
    lines: dict[tuple[object, ...], dict[Kind, Row]] = {}
    for row in rows:
        lines.setdefault(key(row), {})[row["data"], row["density"]] = row
    return dict(sorted(lines.items()))


def _table(lines: Lines, columns: Sequence[Column], text: int) -> str:
    """Markdown; the first ``text`` columns are words, the others numbers.

    Columns of which no line has anything are left out.
    """
    cells = [[write(rows) for _, write in columns] for rows in lines.values()]
    rules = ["---"] * text + ["--:"] * (len(columns) - text)
    every = [[header for header, _ in columns], rules, *cells]
    kept = [at for at in range(len(columns)) if any(line[at] for line in cells)]
    return "\n".join(f"| {' | '.join(line[at] for at in kept)} |" for line in every)


def _of_any(write: Callable[[Row], str]) -> Callable[[Mapping[Kind, Row]], str]:
    """What all rows of a line have in common."""
    return lambda rows: write(next(iter(rows.values())))


def _at(kind: Kind, write: Callable[[Row], str]) -> Callable[[Mapping[Kind, Row]], str]:
    """What the row of one kind of data says, or nothing."""
    return lambda rows: write(rows[kind]) if kind in rows else ""


def _size(row: Row) -> tuple[object, ...]:
    """Sizes that sort a square product first."""
    return (row["features"] != row["hidden"], row["features"], row["hidden"])


def _product(row: Row) -> str:
    return f"{row['tokens']} x {row['hidden']} x {row['features']}"


def _op(row: Row) -> str:
    return f"gated {row['op']}" if row["gated"] else row["op"]


def _kind(row: Row) -> str:
    """``gated ffn, ReLU, an fp8 model``: what is not as usual."""
    rectified = ", ReLU" if row["activation"] == "relu" else ""
    narrow = f", an {row['quantize']} model" if row.get("quantized_model") else ""
    return f"{_op(row)}{rectified}{narrow}"


def _ffn_type(row: Row) -> str:
    return _TYPES[row["dtype"]] if row["quantize"] == "none" else row["quantize"]


def _mark(row: Row) -> str:
    return "" if is_current(row) else MARK


def _us(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def _rate(row: Row, side: str) -> str:
    return f"{row['variants'][side]['tflop_per_s']:,.0f}"


def _over(side: str) -> Callable[[Row], str]:
    """The gain over one side of a product, or nothing."""

    def write(row: Row) -> str:
        found = row["variants"].get(side)
        return "" if found is None else f"{found['ratio']:.2f}x{_mark(row)}"

    return write


def _torchao(row: Row) -> str:
    """The fastest of torchao's dense candidates, or nothing."""
    candidates = row["dense_candidates_us"].items()
    found = [us for name, us in candidates if name.startswith("torchao")]
    return _us(min(found)) if found else ""


def _plain_gain(row: Row) -> str:
    dense = " (dense)" if row.get("status", "applied") != "applied" else ""
    return f"{row['ratio']:.2f}x{dense}"


def _gain(row: Row) -> str:
    return _plain_gain(row) + _mark(row)


def _decode_gain(row: Row) -> str:
    tuned = "max-autotune" in row["dense_candidates_us"]
    return _gain(row) + (TUNED if tuned else "")


def _interval(row: Row) -> str:
    return f"{_gain(row)} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


def _error(row: Row) -> str:
    return f"{row['rms_rel_err']:.1%} ({row['dense_rms_rel_err']:.1%})"


def _masked(row: Row) -> str:
    us = row.get("masked_load_us")
    return "" if us is None else f"{row['dense_us'] / us:.2f}x"


def _needed(row: Row) -> str:
    return f"{row['sparse_gb_per_s'] / 1e3:.2f} TB/s, {row['of_copy']:.0%}"
