"""``python -m inductor_sparse bench``: arguments, files of rows, and tables.

The sizes default to those of the results kept in ``benchmarks/``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
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
    from inductor_sparse.bench.variants import Setting

DTYPE_NAMES = ("float32", "bfloat16", "float16")
GEMM_DTYPE_NAMES = (*DTYPE_NAMES, "float8_e4m3fn", "int8")
OP_NAMES = ("down", "ffn")
SETTING_NAMES = ("default", "freezing", "max-autotune", "freezing+max-autotune")
DATA_NAMES = ("random", "trained")
QUANTIZE_NAMES = ("none", "fp8", "int8")
FORMAT_NAMES = ("auto", "exact", "2:4")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "dtype": ["float32"],
        "tokens": [1, 16, 128, 512],
        "density": [0.05, 0.1, 0.5],
    },
    "cuda": {
        "dtype": ["bfloat16"],
        "tokens": [1, 2, 4, 8, 16, 2048, 8192],
        "density": [0.02, 0.05, 0.1, 0.2, 0.5],
    },
}
"""What a benchmark takes that was not told: where each device has its regimes."""


def add_arguments(bench: argparse.ArgumentParser) -> None:
    """Give ``bench`` its subcommands; each sets ``command`` to the function to run."""
    kinds = bench.add_subparsers(required=True, metavar="BENCHMARK")
    _add_ffn(kinds)
    _add_gemm(kinds)
    pack = _command(kinds, "pack", _bench_pack, "data preparation against a plain copy")
    _add_sizes(pack, DTYPE_NAMES)
    summary = "a first matmul that packs its result against two kernels"
    _add_sizes(_command(kinds, "linear", _bench_linear, summary), DTYPE_NAMES)
    _add_compile(kinds)
    _add_grid(kinds)
    plot = _command(kinds, "plot", _bench_plot, "plot the rows of a results file")
    plot.add_argument(
        "rows", type=Path, help="JSONL file of `bench ffn`, or of `bench grid`"
    )
    plot.add_argument("--out", type=Path, required=True, help="image file to write")


def _add_ffn(kinds: Any) -> None:
    """The arguments of ``bench ffn``."""
    ffn = _command(kinds, "ffn", _bench_ffn, "FFN sites against the best dense variant")
    _add_sizes(ffn, DTYPE_NAMES)
    _add_data(ffn, None)
    ffn.add_argument("--op", type=types.names(OP_NAMES), default=list(OP_NAMES))
    ffn.add_argument("--activation", choices=("relu2", "relu"), default="relu2")
    ffn.add_argument(
        "--gated",
        action=argparse.BooleanOptionalAction,
        help="only the gated FFN, or none of it; both by default",
    )
    ffn.add_argument(
        "--settings",
        type=types.names(SETTING_NAMES),
        help="Inductor settings tried on both sides; on a GPU freezing is left out",
    )
    ffn.add_argument(
        "--quantize",
        choices=QUANTIZE_NAMES,
        default="none",
        help="run both sides in 8 bits, the dense one with torch's own 8-bit matmuls",
    )
    ffn.add_argument(
        "--quantized-model",
        action="store_true",
        help="quantize the model before the sparse side gets it: fp8 only",
    )
    ffn.add_argument(
        "--calibrate",
        action="store_true",
        help="give the sparse side a plan made from the inputs of the row",
    )
    ffn.add_argument("--activation-format", choices=FORMAT_NAMES, default="auto")


def _add_gemm(kinds: Any) -> None:
    """The arguments of ``bench gemm``."""
    summary = "the 2:4 product against other kernels"
    gemm = _command(kinds, "gemm", _bench_gemm, summary)
    _add_sizes(gemm, GEMM_DTYPE_NAMES)
    _add_data(gemm, [0.05, 0.1, 0.15])
    gemm.add_argument(
        "--quick", action="store_true", help="leave out torch.compile (max-autotune)"
    )


def _add_grid(kinds: Any) -> None:
    """The arguments of ``bench grid``."""
    summary = "all rows of the GPU tables, the most important ones first"
    grid = _command(kinds, "grid", _bench_grid, summary)
    grid.add_argument(
        "--minutes",
        type=types.duration,
        default=30.0,
        help="start no new row after this many minutes",
    )
    grid.add_argument(
        "--edges",
        action="store_true",
        help="instead, FFNs of small and odd sizes, other dtypes, gates, in 8 bits",
    )
    grid.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    grid.add_argument(
        "--json", required=True, metavar="FILE", help="results file to create or resume"
    )


def _add_data(parser: argparse.ArgumentParser, densities: list[float] | None) -> None:
    """Arguments on what the data look like; ``None`` is left to the device."""
    parser.add_argument("--density", type=types.densities, default=densities)
    parser.add_argument(
        "--data",
        type=types.names(DATA_NAMES),
        default=["random"],
        help="random numbers, or what the model of examples/ computes, tiled",
    )


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


def _add_sizes(parser: argparse.ArgumentParser, dtypes: Sequence[str]) -> None:
    """Arguments shared by the benchmarks that sweep sizes."""
    parser.add_argument("--dtype", type=types.names(dtypes))
    parser.add_argument("--features", type=types.positive, default=4096)
    parser.add_argument("--hidden", type=types.positive, default=16384)
    parser.add_argument(
        "--size",
        type=types.list_of(types.size),
        metavar="FEATURESxHIDDEN[,...]",
        help="several sizes at once, instead of --features and --hidden",
    )
    parser.add_argument("--tokens", type=types.list_of(types.positive))
    parser.add_argument(
        "--seconds", type=types.duration, default=10.0, help="timing budget of a row"
    )
    parser.add_argument(
        "--minutes",
        type=types.duration,
        default=float("inf"),
        help="start no new row after this many minutes",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="append to the --json file, skipping rows it has of this protocol",
    )
    _add_device_and_json(parser)


def _by_device(arguments: argparse.Namespace) -> None:
    """Fill in what the command line leaves to the device."""
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name, value) is None:
            setattr(arguments, name, value)


def _sizes(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Pairs of features and hidden features."""
    return arguments.size or [(arguments.features, arguments.hidden)]


def _add_device_and_json(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--json [FILE]``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write one JSON object per row, to FILE or else to standard output",
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

    _by_device(arguments)
    settings = _settings(arguments)
    kept = (row for row in _kept_rows(arguments) if ffn.tried(row, settings))
    sweep = ffn.Sweep(
        cases=tuple(_model_cases(arguments)),
        tokens=tuple(arguments.tokens),
        densities=tuple(arguments.density),
        seconds=arguments.seconds,
        settings=settings,
        options={"sparse.activation_format": arguments.activation_format},
        done=frozenset(map(ffn.row_key, kept)),
    )
    return _run_bench(
        arguments,
        tables.FFN_CUDA if arguments.device == "cuda" else tables.FFN,
        sweep.size(),
        lambda report: ffn.run(sweep, report),
        append=arguments.resume,
    )


def _settings(arguments: argparse.Namespace) -> tuple[Setting, ...]:
    """The settings asked for; without a wish all, on a GPU those without freezing."""
    from inductor_sparse.bench.variants import SETTINGS

    if arguments.settings is None:
        gpu = arguments.device == "cuda"
        return tuple(one for one in SETTINGS if not (gpu and one.freezing))
    return tuple(one for one in SETTINGS if one.name in arguments.settings)


def _bench_gemm(arguments: argparse.Namespace) -> int:
    """``bench gemm``."""
    from inductor_sparse.bench import gemm, tables

    _by_device(arguments)
    done = {
        gemm.row_key(row)
        for row in _kept_rows(arguments)
        if arguments.quick or not gemm.was_quick(row)
    }
    todo = gemm.cases(
        tokens=arguments.tokens,
        sizes=_sizes(arguments),
        dtypes=arguments.dtype,
        data=arguments.data,
        densities=arguments.density,
        device=arguments.device,
    )
    todo = [case for case in todo if case.key not in done]
    return _run_bench(
        arguments,
        tables.GEMM,
        len(todo),
        lambda report: gemm.run(todo, arguments.seconds, arguments.quick, report),
        append=arguments.resume,
    )


def _bench_pack(arguments: argparse.Namespace) -> int:
    """``bench pack``."""
    from inductor_sparse.bench import pack, tables

    _by_device(arguments)
    on_gpu = arguments.device == "cuda"
    return _bench_sizes(arguments, pack, tables.PACK_CUDA if on_gpu else tables.PACK)


def _bench_linear(arguments: argparse.Namespace) -> int:
    """``bench linear``."""
    from inductor_sparse.bench import linear, tables

    _by_device(arguments)
    return _bench_sizes(arguments, linear, tables.LINEAR)


def _bench_sizes(
    arguments: argparse.Namespace, bench: Any, columns: Sequence[Column]
) -> int:
    """Run a benchmark whose cases are tokens, sizes and dtypes alone."""
    done = {bench.row_key(row) for row in _kept_rows(arguments)}
    todo = bench.cases(
        tokens=arguments.tokens,
        sizes=_sizes(arguments),
        dtypes=arguments.dtype,
        device=arguments.device,
    )
    todo = [case for case in todo if case.key not in done]
    return _run_bench(
        arguments,
        columns,
        len(todo),
        lambda report: bench.run(todo, arguments.seconds, report),
        append=arguments.resume,
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


def _bench_grid(arguments: argparse.Namespace) -> int:
    """``bench grid``."""
    from inductor_sparse.bench import edges, grid

    lines = edges.commands() if arguments.edges else grid.commands()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return grid.run(lines, arguments, parser.parse_args)


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
    end = time.monotonic() + 60 * getattr(arguments, "minutes", float("inf"))
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
                if time.monotonic() > end:
                    break
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
    """The rows that ``--resume`` need not measure again: those of the same method."""
    from inductor_sparse.bench.rows import is_current, read_rows

    if not arguments.resume:
        return []
    if arguments.json in (None, "-"):
        raise SparseOptionError("--resume needs --json FILE, the file to go on with")
    if not Path(arguments.json).exists():
        return []
    return list(filter(is_current, read_rows(arguments.json)))


def _model_cases(arguments: argparse.Namespace) -> Iterator[ModelCase]:
    """One case per dtype, size, data, op and gating asked for."""
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
    if arguments.quantized_model and arguments.quantize != "fp8":
        raise SparseOptionError("--quantized-model needs --quantize fp8")
    axes = (arguments.dtype, _sizes(arguments), arguments.data, kinds)
    for dtype, (features, hidden), data, (op, gated) in itertools.product(*axes):
        yield ModelCase(
            op=op,
            gated=gated,
            activation=arguments.activation,
            dtype=dtype,
            features=features,
            hidden=hidden,
            device=arguments.device,
            data=data,
            quantize=arguments.quantize,
            calibrated=arguments.calibrate,
            quantized_model=arguments.quantized_model,
        )
