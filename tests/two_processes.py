"""Two processes that do the same at the same time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO

WAIT = """
import sys
print("ready", flush=True)
sys.stdin.readline()
"""
"""In the middle of a script: what is above is done by both before what is below."""


def at_once(script: str, seconds: float = 60, **environment: str) -> list[str]:
    """What each of the two prints behind :data:`WAIT`, which ``script`` must hold.

    They have so many seconds for it.  The environment variable ``RANK`` is 0 in the one
    and 1 in the other.
    """
    with contextlib.ExitStack() as both:
        pair = [
            both.enter_context(_running(script, {"RANK": rank, **environment}))
            for rank in "01"
        ]
        for process, complaints in pair:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", _text(complaints)
        for process, _ in pair:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        printed = [process.communicate(timeout=seconds)[0] for process, _ in pair]
        for process, complaints in pair:
            assert process.returncode == 0, _text(complaints)
    return printed


@contextlib.contextmanager
def _running(
    script: str, environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A process and its stderr; it is gone behind the block, however that ends."""
    # Complaints go to a file: nobody reads them meanwhile, and a pipe would fill up.
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env={**os.environ, **environment},
        ) as process,
    ):
        try:
            yield process, complaints
        finally:
            process.kill()


def _text(complaints: IO[str]) -> str:
    """All that was written so far."""
    complaints.seek(0)
    return complaints.read()
