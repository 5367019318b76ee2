"""What a compiled graph depends on through a rule that is not part of this package."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

from inductor_sparse.passes.base import Rule


def rule_identity(rule: Rule) -> str | None:
    """A key that changes with the source files and the attributes of a rule.

    None if the source cannot be read, for a rule typed at a prompt: a graph compiled
    with it must not be cached, since an edited rule could not be told from this one.
    Attributes count by their ``repr``.
    """
    digest = hashlib.sha256(repr(sorted(vars(rule).items())).encode())
    for kind in type(rule).__mro__:
        if kind.__module__ in ("abc", "builtins") or kind is Rule:
            continue
        try:
            source = Path(inspect.getfile(kind)).read_bytes()
        except (OSError, TypeError):
            return None
        digest.update(kind.__qualname__.encode() + b"\0" + source + b"\0")
    return digest.hexdigest()
