"""Write the documents that are made from code; ``--check`` only says if they are stale.

``docs/options.md`` comes from :mod:`inductor_sparse.config`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from pathlib import Path

from inductor_sparse import config

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

An environment variable sets the default of a process; `options=` wins over everything.
An option that does not exist, or a value of the wrong type, is an error that names the
nearest known option. Every value is part of Inductor's cache keys, so changing one
recompiles.

| option | type | default | environment variable | meaning |
|---|---|---|---|---|
"""


def environment_variables() -> dict[str, str]:
    """Option name -> environment variable, read off the source of the config module.

    A torch config entry keeps the value it read but not where it read it from.
    """
    names = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            for keyword in node.value.keywords:
                if keyword.arg == "env_name_default":
                    names[ast.unparse(node.target)] = ast.literal_eval(keyword.value)
    return names


def options_page() -> str:
    """The text of ``docs/options.md``."""
    variables = environment_variables()
    rows = []
    for name, entry in config._config.items():
        variable = f"`{variables[name]}`" if name in variables else ""
        accepts = " or ".join(
            f'`"{choice}"`' for choice in config.CHOICES.get(name, ())
        )
        kind = accepts or f"`{config.get_type(name).__name__}`"
        default = (
            f'`"{entry.default}"`'
            if isinstance(entry.default, str)
            else (f"`{entry.default}`")
        )
        meaning = config.HELP[name]
        rows.append(
            f"| `sparse.{name}` | {kind} | {default} | {variable} | {meaning} |"
        )
    return OPTIONS_HEAD + "\n".join(rows) + "\n"


def stale() -> dict[Path, str]:
    """The generated files whose content is not what the code says -> right content."""
    pages = {ROOT / "docs" / "options.md": options_page()}
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
