"""``bench grid``: the rows behind the tables of a GPU, the most telling ones first.

First what single figures need, then all shapes with one kind of data, then all data.
What takes longest comes last: autotuned sides of everything.

A list of ordinary ``bench`` commands, run in one process: importing torch, starting the
device and measuring its ceilings take longer than many rows.  Rows that are in the file
are skipped, so that the same command again goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from inductor_sparse.errors import SparseError

SIZES = ("4096x16384", "8192x28672", "5120x21504")
PREFILL_TOKENS = (8192, 2048, 4096, 16384, 1024, 512, 32768)
DECODE_TOKENS = (1, 4, 2, 8, 16)
ALL_DATA = "--data trained,random --density 0.05,0.1,0.15"
ONE_DATA = "--data trained --density 0.1"
LINEAR_TOKENS = "8192,4096,2048,1024,512"
DECODE_DENSITIES = "0.02,0.05,0.1,0.2,0.5"
GEMM_DTYPES = ("bfloat16", "float8_e4m3fn", "int8")
QUANTIZE = ("none", "fp8")
BOTH_SETTINGS = "default,max-autotune"
SECONDS = 0.35
"""Timing budget of a row: on a GPU the least number of rounds takes longer."""


def commands() -> Iterator[str]:
    """Every ``bench`` command of the grid, without device and file, in order."""
    yield from _gemm("8192x8192", "8192")
    yield from _ffn(SIZES[0], str(PREFILL_TOKENS[0]), BOTH_SETTINGS, ONE_DATA)
    yield from _decode_ops(1, BOTH_SETTINGS, "0.1")
    yield _decode("down", SIZES[0], 4)
    yield _decode("down", SIZES[1], 1)
    yield f"pack --dtype bfloat16 --size {SIZES[0]} --tokens 8192"
    yield f"linear --dtype bfloat16 --size {SIZES[0]} --tokens {LINEAR_TOKENS}"
    every = ",".join(map(str, PREFILL_TOKENS))
    for size in SIZES:
        yield from _ffn(size, every, "default", ONE_DATA)
        yield from _gemm(size, every, f"{ONE_DATA} --quick")
    for tokens in DECODE_TOKENS:
        yield from _decode_ops(tokens, "default")
    for tokens in PREFILL_TOKENS:
        for size in SIZES:
            yield from _gemm(size, str(tokens), f"{ALL_DATA} --quick")
            yield from _ffn(size, str(tokens), "default")
    for tokens in DECODE_TOKENS:
        yield from _decode_ops(tokens, BOTH_SETTINGS)
    for tokens in PREFILL_TOKENS:
        for size in SIZES:
            yield from _gemm(size, str(tokens))
            yield from _ffn(size, str(tokens), BOTH_SETTINGS)


def run(
    lines: Iterable[str],
    arguments: argparse.Namespace,
    parse: Callable[..., argparse.Namespace],
) -> int:
    """Run the commands until they or the minutes are at an end.

    A command that fails is reported and left, for the others' sake.

    Args:
        lines: the commands, from :func:`commands` or
            :func:`inductor_sparse.bench.edges.commands`.
        arguments: of ``bench grid``.
        parse: turns the arguments of a ``bench`` command into a namespace.

    Returns:
        0, or 2 if a command failed.
    """
    end = time.monotonic() + 60 * arguments.minutes
    failed = 0
    for line in lines:
        minutes = (end - time.monotonic()) / 60
        if minutes <= 0:
            break
        one = parse(line.split() + _common(arguments))
        one.minutes = minutes
        try:
            one.command(one)
        except (SparseError, RuntimeError) as error:
            failed = 2
            print(f"error: bench {line}: {error}", file=sys.stderr)
    return failed


def _common(arguments: argparse.Namespace) -> list[str]:
    """What every command is given besides."""
    where = ("--device", arguments.device, "--json", arguments.json, "--resume")
    return [*where, "--seconds", str(SECONDS)]


def _gemm(size: str, tokens: str, data: str = ALL_DATA) -> Iterator[str]:
    """Products; what is compiled for a shape serves all of its data."""
    for dtype in GEMM_DTYPES:
        yield f"gemm --dtype {dtype} --size {size} --tokens {tokens} {data}"


def _ffn(size: str, tokens: str, settings: str, data: str = ALL_DATA) -> Iterator[str]:
    """Whole FFNs; a model serves all of its tokens."""
    what = f"--size {size} --tokens {tokens} --settings {settings} {data}"
    for quantize in QUANTIZE:
        yield f"ffn --op ffn --no-gated --dtype bfloat16 --quantize {quantize} {what}"


def _decode_ops(
    tokens: int, settings: str, densities: str = DECODE_DENSITIES
) -> Iterator[str]:
    """Every op for a few tokens."""
    for op, gated in (
        ("down", "--no-gated"),
        ("ffn", "--no-gated"),
        ("ffn", "--gated"),
    ):
        yield _decode(op, SIZES[0], tokens, gated, settings, densities)


def _decode(
    op: str,
    size: str,
    tokens: int,
    gated: str = "--no-gated",
    settings: str = "default",
    densities: str = DECODE_DENSITIES,
) -> str:
    """One op for few tokens, decided by plans as a calibrated user has them."""
    return (
        f"ffn --op {op} {gated} --dtype bfloat16 --size {size} --tokens {tokens} "
        f"--settings {settings} --calibrate --density {densities}"
    )
