"""Rows of a benchmark and the file they live in: one JSON object per line.

A row is flushed as soon as it is measured, so that an interrupted run keeps what it has
and ``--resume`` can go on from there.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from inductor_sparse.errors import SparseError

Row = dict[str, Any]
COMMIT_VARIABLE = "INDUCTOR_SPARSE_COMMIT"
"""The commit that rows of benchmarks name; unset: what git says of the checkout."""
FEW_TOKENS = 16
"""Up to here calls are short, may read only a part of their weights, and are judged by
rates of memory on a GPU."""
PROTOCOL = 3
"""Raised whenever a change of method makes rows incomparable with older ones.

2: one compilation for all data of a shape; errors from rows all over the result.
3: on a GPU turns in which the clock settles, of 120 instead of 40 ms.
"""
_SAME_ELSEWHERE = 2
"""Where no clock has to settle: on a CPU, and where memory is the limit."""


class RowFileError(SparseError, ValueError):
    """A file of rows is missing or holds a line that is not a JSON object."""


def is_current(row: Row) -> bool:
    """Whether a row was measured as one would be now, so that both compare."""
    few = row.get("tokens", FEW_TOKENS + 1) <= FEW_TOKENS
    settles = row.get("device") == "cuda" and not few
    comparable = {PROTOCOL} if settles else {PROTOCOL, _SAME_ELSEWHERE}
    return row.get("protocol") in comparable


def machine(device: str) -> Row:
    """The fields every row carries about where and from what it was made.

    A GPU adds its compute capability and the versions of what generates code for it.
    """
    return (_gpu() if device == "cuda" else {}) | {
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "vector_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "protocol": PROTOCOL,
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
    }


def _gpu() -> Row:
    """What a row says about the current GPU beside its name."""
    cusparselt = torch.backends.cusparselt
    return {
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton"),
        "cusparselt": cusparselt.version() if cusparselt.is_available() else None,
    }


def device_name(device: str) -> str:
    """Marketing name of the CPU or of the current GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout this package runs from, ``-dirty`` if it was changed.

    Only a change of a tracked file counts: files that git does not know are no part of
    a commit.  The environment variable :data:`COMMIT_VARIABLE` wins, for a copy of a
    checkout.  ``unknown`` for an installed wheel, or where git is missing.
    """
    return os.environ.get(COMMIT_VARIABLE) or _described(Path(__file__).parent)


@functools.cache
def _described(folder: Path) -> str:
    """What git says about the checkout that ``folder`` is tracked in."""
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    # A wheel may be installed somewhere inside the checkout of something else.
    tracked = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        for command in (tracked, ask):
            done = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def write_row(row: Row, stream: TextIO) -> None:
    """Append one row as a line and push it to the disk or pipe at once."""
    stream.write(json.dumps(row, allow_nan=False) + "\n")
    stream.flush()


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a JSONL file.

    Raises:
        RowFileError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RowFileError(f"cannot read rows from {path}: {error}") from error
    return list(_parse(lines, path))


def _parse(lines: Iterable[str], path: str | Path) -> Iterator[Row]:
    """Rows of non-empty lines; errors name the line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowFileError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise RowFileError(f"{path}:{number}: expected a JSON object")
        yield row
