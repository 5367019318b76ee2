"""What did each pass do?  Compile with a dump folder and read what is in it.

``python examples/read_a_dump.py [FOLDER]``; without a folder a temporary one is used.
``INDUCTOR_SPARSE_DUMP_DIR=FOLDER`` dumps any program without changing it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn


def compile_with_dump(folder: Path) -> None:
    """Compile one ReLU FFN and a look-alike that stays dense, dumping to ``folder``."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64),
        nn.Linear(64, 256), nn.ReLU6(), nn.Linear(256, 64),
    ).eval().requires_grad_(False)  # fmt: skip
    options = {"sparse.dump_dir": str(folder)}
    torch.compile(model, backend="sparse", options=options)(torch.randn(4, 64))


def read_dump(folder: Path) -> None:
    """Walk through a dump, from the question asked most often to the details."""
    (graph,) = (path for path in folder.iterdir() if path.is_dir())
    print(f"# Start at {graph.name}/index.md: passes, decisions, generated code\n")
    print((graph / "index.md").read_text())

    print("# decisions.json has every field of every site\n")
    for site in json.loads((graph / "decisions.json").read_text())["sites"]:
        print(f"{site['site']}: {site['status']}", site["reason"] or site["op"])

    diff = next(graph.glob("*relu_matmul*.diff"))
    print(f"\n# {diff.name}: what one pass changed\n")
    changed = (line for line in diff.read_text().splitlines() if line[:1] in "+-")
    print("\n".join(line for line in changed if "=" in line))

    print("\n# The files, in the order they were written\n")
    print("\n".join(path.name for path in sorted(graph.iterdir())))


def main() -> None:
    """Dump into the folder named on the command line, or into a temporary one."""
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        compile_with_dump(folder)
        read_dump(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        compile_with_dump(Path(temporary))
        read_dump(Path(temporary))


if __name__ == "__main__":
    main()
