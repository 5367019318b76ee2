"""Fail when a source file has grown past what can be read in one sitting.

Templates are exempt: a kernel is as long as the kernel is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = {"tests": 400, "examples": 500, "inductor_sparse": 500, "tools": 500}


def oversized(root: Path = ROOT) -> list[str]:
    """One line of text for each tracked Python file that is too long."""
    listing = subprocess.run(
        ["git", "ls-files", "*.py"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    problems = []
    for name in listing.stdout.splitlines():
        limit = MAX_LINES.get(Path(name).parts[0], 500)
        path = root / name
        lines = len(path.read_text().splitlines()) if path.is_file() else 0
        if lines > limit:
            problems.append(f"{name}: {lines} lines, at most {limit}")
    return problems


if __name__ == "__main__":
    sys.exit("\n".join(oversized()) or None)
