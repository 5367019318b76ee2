"""``python -m inductor_sparse bench``: arguments, files of rows, and tables.

The sizes default to those of the results kept in ``benchmarks/``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from inductor_sparse.bench import arguments as types
from inductor_sparse.bench.display import print_table, progress
from inductor_sparse.errors import SparseOptionError

if TYPE_CHECKING:
    from inductor_sparse.bench.models import ModelCase
    from inductor_sparse.bench.rows import Row
    from inductor_sparse.bench.tables import Column

DTYPE_NAMES = ("float32", "bfloat16", "float16")
OP_NAMES = ("down", "ffn")


def add_arguments(bench: argparse.ArgumentParser) -> None:
    """Give ``bench`` its subcommands; each sets ``command`` to the function to run."""
    kinds = bench.add_subparsers(required=True, metavar="BENCHMARK")
    ffn = _command(kinds, "ffn", _bench_ffn, "FFN sites against the best dense variant")
    _add_sizes(ffn)
    ffn.add_argument("--op", type=types.names(OP_NAMES), default=list(OP_NAMES))
    ffn.add_argument("--density", type=types.densities, default=[0.05, 0.1, 0.5])
    ffn.add_argument("--activation", choices=("relu2", "relu"), default="relu2")
    ffn.add_argument(
        "--gated",
        action=argparse.BooleanOptionalAction,
        help="only the gated FFN, or none of it; both by default",
    )
    ffn.add_argument(
        "--resume", action="store_true", help="skip rows already in the --json file"
    )
    pack = _command(kinds, "pack", _bench_pack, "data preparation against a plain copy")
    _add_sizes(pack)
    _add_compile(kinds)
    plot = _command(kinds, "plot", _bench_plot, "draw the rows of `bench ffn`")
    plot.add_argument("rows", type=Path, help="JSONL file written by `bench ffn`")
    plot.add_argument("--out", type=Path, required=True, help="picture to write")


def _add_compile(kinds: Any) -> None:
    """The arguments of ``bench compile``."""
    parser = _command(
        kinds, "compile", _bench_compile, "compile time added to inductor"
    )
    for name, default in (
        ("layers", 24),
        ("features", 512),
        ("hidden", 2048),
        ("heads", 8),
        ("tokens", 128),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=types.positive, default=default)
    _add_device_and_json(parser)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    """Arguments shared by the benchmarks that sweep sizes."""
    parser.add_argument("--dtype", type=types.names(DTYPE_NAMES), default=["float32"])
    parser.add_argument("--features", type=types.positive, default=4096)
    parser.add_argument("--hidden", type=types.positive, default=16384)
    parser.add_argument(
        "--tokens", type=types.list_of(types.positive), default=[1, 16, 128, 512]
    )
    parser.add_argument(
        "--seconds", type=types.seconds, default=10.0, help="timing budget of a row"
    )
    _add_device_and_json(parser)


def _add_device_and_json(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--json [FILE]``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write one JSON object per row to FILE, or print them without FILE",
    )


def _command(
    kinds: Any,
    name: str,
    function: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    """A subcommand that runs ``function``."""
    parser = kinds.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=function)
    return parser


def _bench_ffn(arguments: argparse.Namespace) -> int:
    """``bench ffn``."""
    from inductor_sparse.bench import ffn, tables

    done = frozenset(ffn.row_key(row) for row in _kept_rows(arguments))
    sweep = ffn.Sweep(
        cases=tuple(_model_cases(arguments)),
        tokens=tuple(arguments.tokens),
        densities=tuple(arguments.density),
        seconds=arguments.seconds,
        done=done,
    )
    return _run_bench(
        arguments,
        tables.FFN,
        sweep.size(),
        lambda report: ffn.run(sweep, report),
        append=arguments.resume,
    )


def _bench_pack(arguments: argparse.Namespace) -> int:
    """``bench pack``."""
    from inductor_sparse.bench import pack, tables

    todo = pack.cases(
        tokens=arguments.tokens,
        features=arguments.features,
        hidden=arguments.hidden,
        dtypes=arguments.dtype,
        device=arguments.device,
    )
    return _run_bench(
        arguments,
        tables.PACK,
        len(todo),
        lambda report: pack.run(todo, arguments.seconds, report),
    )


def _bench_compile(arguments: argparse.Namespace) -> int:
    """``bench compile``."""
    # The module shadows a builtin only under its short name.
    from inductor_sparse.bench import compile as compile_bench
    from inductor_sparse.bench import tables

    names = ("layers", "features", "hidden", "heads", "tokens", "rounds", "device")
    case = compile_bench.CompileCase(**{n: getattr(arguments, n) for n in names})
    return _run_bench(
        arguments,
        tables.COMPILE,
        1,
        lambda report: iter([compile_bench.run(case, report)]),
    )


def _bench_plot(arguments: argparse.Namespace) -> int:
    """``bench plot``."""
    from inductor_sparse.bench import plot
    from inductor_sparse.bench.rows import read_rows

    print(plot.draw(read_rows(arguments.rows), arguments.out))
    return 0


def _run_bench(
    arguments: argparse.Namespace,
    columns: Sequence[Column],
    total: int,
    start: Callable[[Callable[[str], object]], Iterable[Row]],
    append: bool = False,
) -> int:
    """Run a benchmark, keep each row as it comes, and print the table at the end."""
    import torch

    from inductor_sparse.bench import tables
    from inductor_sparse.bench.rows import write_row

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SparseOptionError("--device cuda: torch sees no CUDA device here")
    rows: list[Row] = []
    try:
        with (
            _row_stream(arguments.json, append) as stream,
            progress(total, "rows") as update,
        ):
            for row in start(lambda message: update(message, len(rows))):
                rows.append(row)
                if stream is not None:
                    write_row(row, stream)
                update("measured", len(rows))
    finally:
        # An interrupted run still shows what it has.
        if arguments.json != "-" and rows:
            print_table(tables.headers(columns), tables.cells(columns, rows))
    return 0


@contextlib.contextmanager
def _row_stream(path: str | None, append: bool) -> Iterator[TextIO | None]:
    """Where rows are written: nowhere, standard output for ``-``, or a file."""
    if path is None:
        yield None
    elif path == "-":
        yield sys.stdout
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a" if append else "w", encoding="utf-8") as stream:
            yield stream


def _kept_rows(arguments: argparse.Namespace) -> list[Row]:
    """The rows that ``--resume`` need not measure again."""
    from inductor_sparse.bench.rows import read_rows

    if not arguments.resume:
        return []
    if arguments.json in (None, "-"):
        raise SparseOptionError("--resume needs --json FILE, the file to go on with")
    return read_rows(arguments.json) if Path(arguments.json).exists() else []


def _model_cases(arguments: argparse.Namespace) -> Iterator[ModelCase]:
    """One case per op, gating and dtype asked for."""
    from inductor_sparse.bench.models import ModelCase

    kinds = [
        (op, gated)
        for op in arguments.op
        for gated in (False, True)
        if not (op == "down" and gated) and arguments.gated in (None, gated)
    ]
    if not kinds:
        raise SparseOptionError(
            "--gated leaves nothing to measure: `down` is never gated"
        )
    for dtype in arguments.dtype:
        for op, gated in kinds:
            yield ModelCase(
                op=op,
                gated=gated,
                activation=arguments.activation,
                dtype=dtype,
                features=arguments.features,
                hidden=arguments.hidden,
                device=arguments.device,
            )
