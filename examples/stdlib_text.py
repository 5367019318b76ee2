"""Text every machine has: the Python standard library's own source files.

The corpus is a sequence of bytes (one byte is one token), files in sorted order with a
zero byte after each.  About 3 % of the files, chosen by a hash of their names, are held
out, so the same files are held out on every machine and Python version.
"""

from __future__ import annotations

import functools
import sysconfig
import zlib
from pathlib import Path

# Tests, tables of numbers and other people's code teach little about writing Python.
SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload",
    "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
HELDOUT_ONE_IN = 32


def _is_heldout(name: str) -> bool:
    return zlib.crc32(name.encode()) % HELDOUT_ONE_IN == 0


@functools.cache
def corpus() -> tuple[bytes, bytes]:
    """Return ``(training, held-out)`` text.

    Raises:
        FileNotFoundError: This Python ships its library without source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(name.parts) or "_sysconfigdata" in path.name:
            continue
        parts[_is_heldout(name.as_posix())].append(path.read_bytes() + b"\0")
    if not (parts[0] and parts[1]):
        raise FileNotFoundError(
            f"no Python source files under {root}: this Python ships without its "
            "library's sources; use another Python to run the example"
        )
    return b"".join(parts[0]), b"".join(parts[1])


def heldout_bytes() -> bytes:
    """Return the text no checkpoint was trained on."""
    return corpus()[1]
