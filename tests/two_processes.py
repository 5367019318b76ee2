"""Two processes that do the same at the same time."""

from __future__ import annotations

import os
import subprocess
import sys

WAIT = """
import sys
print("ready", flush=True)
sys.stdin.readline()
"""
"""In the middle of a script: what is above is done by both before what is below."""


def at_once(script: str, **environment: str) -> list[str]:
    """What each of the two prints behind :data:`WAIT`, which ``script`` must hold."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return printed
