"""Kernels as text: one template per file, loaded only by lowerings."""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def load(path: str) -> str:
    """The text of a template, e.g. ``load("cpp/activation_spmm.cpp.jinja")``.

    Raises:
        FileNotFoundError: no such template in the package.
    """
    return resources.files(__name__).joinpath(path).read_text(encoding="utf-8")
