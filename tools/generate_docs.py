"""Write the documents that are made from code; ``--check`` only says if they are stale.

``docs/api.md`` comes from the docstrings of what is public (:mod:`tools.api_page`),
``docs/options.md`` comes from :mod:`inductor_sparse.config` and from the environment
variables that the package names, ``docs/passes.md`` from the ``passes`` command, the
tables of ``docs/performance.md`` from the rows in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from inductor_sparse import config
from inductor_sparse.bench import page
from tools import api_page

ROOT = Path(__file__).resolve().parent.parent

OPTIONS_HEAD = """\
# Options

<!-- Made by `make docs` from inductor_sparse/config.py: edit that file instead. -->

Give them to one compilation, next to Inductor's own options:

```python
import torch

model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU())
torch.compile(model, backend="sparse", options={"sparse.strict": True})
```

or to every compilation of the process:

```python
import inductor_sparse

inductor_sparse.config.max_density = 0.5
```

An environment variable sets the default of the process; `options=` overrides
everything else. In `options=` a value of the wrong type is an error, and so is an
unknown name, for which the nearest known option is suggested. Every value is part of
the keys of Inductor's caches, so a cached graph is never reused with other values;
models that are already compiled keep the values that they were compiled with.

`torch.compile` accepts either `mode=` or `options=`, not both. To combine a mode with
`sparse.*` options, add the options that the mode stands for, which
`torch._inductor.list_mode_options()` lists: `{"triton.cudagraphs": True}` for
`mode="reduce-overhead"`.

| option | type | default | environment variable | meaning |
|---|---|---|---|---|
"""


class Option(NamedTuple):
    """One option as it is written in the config module."""

    name: str
    kind: str
    default: object
    variable: str


def declared_options() -> list[Option]:
    """Every option, read off the source of the config module.

    Its entries at run time know neither the name of their environment variable nor a
    default that such a variable has not yet changed.
    """
    options = []
    for node in ast.parse(inspect.getsource(config)).body:
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            continue
        name, value = ast.unparse(node.target), node.value
        if name.isupper():
            continue
        given: dict[str | None, ast.expr] = {"default": value}
        if isinstance(value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in value.keywords}
        default = ast.literal_eval(given["default"])
        variable = ast.literal_eval(given.get("env_name_default", ast.Constant("")))
        options.append(Option(name, ast.unparse(node.annotation), default, variable))
    return options


VARIABLES_HEAD = """
## Environment variables

All that belong to this package. Those of options are read when `inductor_sparse.config`
is imported; write a `bool` as `1` or `0`, because any other text counts as true.

| variable | default | meaning |
|---|---|---|
"""
VARIABLE_PREFIX = "INDUCTOR_SPARSE_"


def other_variables() -> dict[str, str]:
    """The environment variables that belong to no option -> their meaning.

    They are module-level constants, and what they mean is the string below them.
    """
    found = {}
    for path in sorted((ROOT / "inductor_sparse").rglob("*.py")):
        statements = ast.parse(path.read_text()).body
        for statement, below in pairwise(statements):
            match statement, below:
                case (
                    ast.Assign(value=ast.Constant(value=str(name))),
                    ast.Expr(value=ast.Constant(value=str(meaning))),
                ) if name.startswith(VARIABLE_PREFIX):
                    found[name] = " ".join(meaning.split())
    return found


def variables_section() -> str:
    """The part of ``docs/options.md`` about environment variables."""
    rows = {
        option.variable: (code(option.default), f"The option `sparse.{option.name}`.")
        for option in declared_options()
        if option.variable
    } | {name: ("unset", meaning) for name, meaning in other_variables().items()}
    lines = (f"| `{name}` | {' | '.join(rows[name])} |\n" for name in sorted(rows))
    return VARIABLES_HEAD + "".join(lines)


def code(value: object) -> str:
    """``value`` as Python, marked as code."""
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def options_page() -> str:
    """The text of ``docs/options.md``."""
    rows = []
    for option in declared_options():
        choices = " or ".join(code(c) for c in config.CHOICES.get(option.name, ()))
        variable = f"`{option.variable}`" if option.variable else ""
        cells = (
            f"`sparse.{option.name}`",
            choices or f"`{option.kind}`",
            code(option.default),
            variable,
            config.HELP[option.name],
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    return OPTIONS_HEAD + "".join(rows) + variables_section()


PASSES_HEAD = """\
# Passes

<!-- Made by `make docs` from `python -m inductor_sparse passes`. -->

These passes run over each graph, in this order, before Inductor lowers it. A *rule*
decides how its sites are computed; `options={"sparse.disabled_rules": "name"}` turns it
off, and its sites stay dense with the reason `rule-disabled`. The
[tier](decisions.md#tiers) is that of skipping zeros; a site that the same rule packs
2:4 is approximate.

"""


def passes_page() -> str:
    """The text of ``docs/passes.md``."""
    command = [sys.executable, "-m", "inductor_sparse", "passes", "--markdown"]
    listing = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return PASSES_HEAD + listing.stdout


def stale() -> dict[Path, str]:
    """The generated files whose content is not what the code says -> right content."""
    performance = ROOT / "docs" / "performance.md"
    pages = {
        ROOT / "docs" / "api.md": api_page.text(),
        performance: page.filled(performance.read_text(), ROOT),
        ROOT / "docs" / "options.md": options_page(),
        ROOT / "docs" / "passes.md": passes_page(),
    }
    return {
        path: text
        for path, text in pages.items()
        if not path.is_file() or path.read_text() != text
    }


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    for path, text in stale().items():
        if options.check:
            sys.exit(f"{path.relative_to(ROOT)} is stale: run `make docs`")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
