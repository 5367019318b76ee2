"""Triton kernels from the package's templates, without Inductor.

The same text that Inductor compiles for a graph serves the eager ops on a GPU.
"""

from __future__ import annotations

import functools
import linecache
import types
from importlib import resources
from importlib.util import find_spec

_HEADER = "import triton\nimport triton.language as tl\n"


@functools.cache
def available() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None


def text(*names: str) -> str:
    """The text of templates of ``templates/triton``, one after the other.

    Raises:
        FileNotFoundError: no such template in the package.
    """
    folder = resources.files("inductor_sparse") / "templates" / "triton"
    parts = [
        (folder / f"{name}.py.jinja").read_text(encoding="utf-8") for name in names
    ]
    return "\n\n".join([_HEADER, *parts])


@functools.cache
def load(*names: str) -> types.ModuleType:
    """A module with the kernels of these templates, which must hold no jinja.

    Raises:
        ImportError: triton is not installed.
    """
    source = text(*names)
    filename = f"<inductor_sparse {' '.join(names)}>"
    # Triton asks inspect for the source; an entry without a time is never dropped.
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    module = types.ModuleType(f"inductor_sparse_triton_{names[-1]}")
    exec(compile(source, filename, "exec"), module.__dict__)
    return module
