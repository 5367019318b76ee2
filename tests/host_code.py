"""Text of a CUDA kernel run by this processor: compiled as ordinary C++."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path


def host_library(text: str, folder: Path, *options: str) -> ctypes.CDLL:
    """``text`` as a loaded library, made in ``folder`` with further options of g++."""
    # A library that was loaded stays loaded under its name.
    path = folder / f"kernel_{len(list(folder.iterdir()))}.cpp"
    path.write_text(text, encoding="utf-8")
    library = path.with_suffix(".so")
    command = ["g++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-pthread"]
    subprocess.run([*command, *options, "-o", str(library), str(path)], check=True)
    return ctypes.CDLL(str(library))
