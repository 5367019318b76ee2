"""The command line: ``python -m inductor_sparse doctor | explain | bench | passes``.

Results go to standard output, as a table or, with ``--json``, as JSON; progress and
errors go to standard error.  Exit codes:

- 0: done;
- 1: done, and the answer is bad news: a ``doctor`` check failed, or ``explain
  --strict`` found no applied site;
- 2: not done: bad arguments, or an error explained on standard error;
- 130: interrupted; rows measured so far are kept.

Torch is imported by the commands that need it, so that ``doctor`` can say what is wrong
with an install in which torch does not import.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from inductor_sparse.bench import commands as bench_commands
from inductor_sparse.bench.display import (
    print_line,
    print_report,
    print_table,
    progress,
)
from inductor_sparse.errors import SparseError, SparseOptionError

if TYPE_CHECKING:
    from inductor_sparse.doctor import Check

OK, BAD_NEWS, ERROR, INTERRUPTED = 0, 1, 2, 130
STYLE_OF_STATUS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
_STATUS_WIDTH, _NAME_WIDTH = 8, 21
"""Of the first columns of ``doctor``: its longest name and a gap."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program's name; ``None`` takes the process's own.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (SparseError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``command`` to the function to run."""
    parser = argparse.ArgumentParser(
        prog="python -m inductor_sparse",
        description="Diagnose, explain and benchmark the sparse torch.compile backend.",
        epilog="Exit codes: 0 success; 1 a doctor check failed, or explain --strict "
        "found no applied site; 2 error; 130 interrupted.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = _command(commands, "doctor", _doctor, "check machine and installation")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    _add_explain(commands)
    bench = commands.add_parser("bench", help="benchmark sparse against dense")
    bench_commands.add_arguments(bench)
    passes = _command(commands, "passes", _passes, "list the passes and their rules")
    form = passes.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser


def _command(
    commands: Any,
    name: str,
    function: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    """A subcommand that runs ``function``."""
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=function)
    return parser


def _add_explain(commands: Any) -> None:
    """The arguments of ``explain``."""
    parser = _command(
        commands, "explain", _explain, "compile a model, run it once, report each site"
    )
    parser.add_argument(
        "target",
        help="package.module:function or path.py:function; the function takes nothing "
        "and returns (model, args) or (model, args, kwargs), args being a tuple",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if no site was applied"
    )


def _doctor(arguments: argparse.Namespace) -> int:
    """``doctor``."""
    from inductor_sparse import doctor

    found = doctor.run_checks()
    if not arguments.json:
        return BAD_NEWS if doctor.has_failure(_printed(found)) else OK
    with progress(None, "checks") as update:
        update("checking", 0)
        checks = list(found)
    failed = doctor.has_failure(checks)
    report = {"ok": not failed, "checks": [check.to_dict() for check in checks]}
    print(json.dumps(report, indent=2))
    return BAD_NEWS if failed else OK


def _printed(checks: Iterable[Check]) -> list[Check]:
    """All of ``checks``, each printed as soon as it is known: some take seconds."""
    print_line(f"{'status':{_STATUS_WIDTH}}{'check':{_NAME_WIDTH}}found")
    done = []
    for check in checks:
        status = check.status.value
        line = f"{status:{_STATUS_WIDTH}}{check.name:{_NAME_WIDTH}}{check.detail}"
        print_line(line, STYLE_OF_STATUS[status])
        if check.remedy:
            print_line(f"{'':{_STATUS_WIDTH}}what to do: {check.remedy}")
        done.append(check)
    return done


def _explain(arguments: argparse.Namespace) -> int:
    """``explain``."""
    from inductor_sparse.report.explain import explain

    model, args, kwargs = load_target(arguments.target)
    with progress(None, "models") as update:
        update("compiling and running once", 0)
        report = explain(model, *args, **kwargs)
    data = report.to_dict()
    if arguments.json:
        print(json.dumps(data, indent=2))
    else:
        print_report(report)
    applied = any(site["status"] == "applied" for site in data["sites"])
    return BAD_NEWS if arguments.strict and not applied else OK


def _passes(arguments: argparse.Namespace) -> int:
    """``passes``."""
    rows = describe_passes()
    if arguments.json:
        print(json.dumps({"passes": rows}, indent=2))
        return OK
    headers = ["pass", "kind", "tier", "what it does"]
    cells = [[r["name"], r["kind"], r["tier"] or "-", r["summary"]] for r in rows]
    if arguments.markdown:
        for line in ([*headers], ["---"] * len(headers), *cells):
            print("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |")
    else:
        print_table(headers, cells)
    return OK


def describe_passes() -> list[dict[str, Any]]:
    """The pipeline in order: ``name``, ``kind``, ``tier`` and ``summary`` of each step.

    ``kind`` is ``rule`` for a step that rewrites matmuls and ``pass`` for one that
    prepares or checks; only a rule has a ``tier``.  ``summary`` is the first line of
    the docstring of the file the step lives in.
    """
    from inductor_sparse.passes import PIPELINE, Rule

    return [
        {
            "name": step.name,
            "kind": "rule" if isinstance(step, Rule) else "pass",
            "tier": step.tier.value if isinstance(step, Rule) else None,
            "summary": _summary(step),
        }
        for step in PIPELINE
    ]


def _summary(step: object) -> str:
    """The first line of the docstring of the file a step lives in."""
    lines = (sys.modules[type(step).__module__].__doc__ or "").strip().splitlines()
    return lines[0].replace("``", "`") if lines else ""


def load_target(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What a target of ``explain`` returns: the model, its ``args`` and ``kwargs``.

    Raises:
        SparseOptionError: the target is not ``place:function``, cannot be imported, or
            returns something else than ``(model, args)`` or ``(model, args, kwargs)``.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise SparseOptionError(
            f"{target!r} is not package.module:function or path.py:function"
        )
    module = _import_file(Path(place)) if place.endswith(".py") else _import(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise SparseOptionError(f"{place} has no function {name!r}")
    made = function()
    if not (
        isinstance(made, tuple)
        and len(made) in (2, 3)
        and callable(made[0])
        and isinstance(made[1], (tuple, list))
    ):
        raise SparseOptionError(
            f"{target} must return (model, args) or (model, args, kwargs), with args a "
            f"tuple; it returned {type(made).__name__}"
        )
    model, args, *rest = made
    return model, tuple(args), dict(rest[0]) if rest else {}


def _import(name: str) -> ModuleType:
    """A module by its dotted name; the current folder counts as importable."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SparseOptionError(f"cannot import {name}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    """A module by its path; its own folder is importable, as for a script."""
    if not path.is_file():
        raise SparseOptionError(f"there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SparseOptionError(f"{path} is not Python source")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look a module up by name while it is being executed.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
