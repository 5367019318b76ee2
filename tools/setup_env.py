"""Make the virtual environment behind ``make demo``, ``make test`` and ``make lint``.

Needs nothing but Python and pip.  Running it again is free: what was installed is
written to a stamp file, and nothing happens while the stamp still fits.

Which torch is installed, in this order: the one asked for (``--torch``, anything that
``pip install`` understands: a version, a path, a URL, options included), the one that
is already there, the one pinned in ``constraints.txt``.  Nothing installed afterwards
may replace it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__).resolve())


def pinned_torch(constraints: str) -> str:
    """The requirement on torch in the text of a constraints file."""
    return re.findall(r"^torch==\S+", constraints, flags=re.MULTILINE)[0]


def constraints_for(constraints: str, installed: Mapping[str, str]) -> str:
    """The same constraints, with torch and what came with it held as ``installed``.

    Every torch wants a Triton of its own: another torch takes the pin away.  One that
    is built for a GPU wants versions of NVIDIA's packages as well.
    """
    pinned = pinned_torch(constraints).removeprefix("torch==")
    fits = installed["torch"].partition("+")[0] == pinned
    dropped = {"torch"} if fits else {"torch", "triton"}
    held = [
        name
        for name in sorted(installed)
        if name in ("torch", "triton") or name.startswith(("cuda-", "nvidia-"))
    ]
    others = [
        line
        for line in constraints.splitlines()
        if line.partition("==")[0] not in dropped.union(held)
    ]
    return "\n".join([*others, *(f"{name}=={installed[name]}" for name in held), ""])


def stamp_for(torch: str, extras: list[str]) -> dict[str, Any]:
    """What an environment depends on: equal stamps mean nothing to do."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()
    return {"inputs": digest, "torch": torch, "extras": sorted(extras)}


def run(*command: str | Path) -> None:
    """Run a command and stop with its exit status if it fails."""
    status = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if status != 0:
        sys.exit(status)


def pip_install(python: Path, *arguments: str | Path) -> None:
    """``pip install`` into the environment of ``python``."""
    run(python, "-m", "pip", "install", "--disable-pip-version-check", *arguments)


def installed_packages(python: Path) -> dict[str, str]:
    """Name and version of every package that ``python`` would import."""
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps([(d.name, d.version) for d in m.distributions() if d.name]))"
    )
    found = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    )
    # Of two with one name the first is imported.
    packages = reversed(json.loads(found.stdout))
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in packages}


def create(venv: Path, share_torch: bool) -> None:
    """Create an environment with pip in it, also where ``ensurepip`` is not packaged.

    ``share_torch`` lets it see the packages of the interpreter it is made with.
    """
    print(f"creating {venv}", flush=True)
    options = ["--system-site-packages"] if share_torch else []
    if importlib.util.find_spec("ensurepip") is not None:
        run(sys.executable, "-m", "venv", *options, venv)
        return
    run(sys.executable, "-m", "venv", "--without-pip", *options, venv)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "pip")


def install(venv: Path, torch: str, extras: list[str]) -> None:
    """Install torch if it was asked for or is missing, then the package and extras."""
    python = venv / "bin" / "python"
    if torch or "torch" not in installed_packages(python):
        requirement = torch or pinned_torch(CONSTRAINTS.read_text())
        print(f"installing {requirement}", flush=True)
        pip_install(python, *shlex.split(requirement))
    packages = installed_packages(python)
    if "torch" not in packages:
        sys.exit(f"torch cannot be found in {venv} after installing {torch!r}")
    held = venv / "constraints.txt"
    held.write_text(constraints_for(CONSTRAINTS.read_text(), packages))
    package = f".[{','.join(extras)}]" if extras else "."
    print(f"installing {package} beside torch {packages['torch']}", flush=True)
    # The build backend comes first: pip would otherwise build in an environment of its
    # own, which it has to fill again on every machine.
    pip_install(python, "--quiet", "--constraint", held, "hatchling")
    pip_install(
        python, "--quiet", "--constraint", held, "--no-build-isolation", "-e", package
    )


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", default="", help="argument of `pip install`")
    parser.add_argument("--extras", default="", help="comma-separated extras")
    options = parser.parse_args()
    venv = options.venv.absolute()
    stamp_file = venv / "installed.json"
    old = json.loads(stamp_file.read_text()) if stamp_file.is_file() else {}
    wanted = {extra for extra in options.extras.split(",") if extra}
    torch = options.torch or old.get("torch", "")
    stamp = stamp_for(torch, sorted(wanted | set(old.get("extras", []))))
    if stamp == old:
        return
    if not (venv / "bin" / "python").exists():
        in_venv = sys.prefix != sys.base_prefix
        has_torch = importlib.util.find_spec("torch") is not None
        create(venv, share_torch=has_torch and not torch and not in_venv)
    install(venv, "" if torch == old.get("torch") else torch, stamp["extras"])
    stamp_file.write_text(json.dumps(stamp, indent=2))


if __name__ == "__main__":
    main()
