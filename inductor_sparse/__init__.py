"""A ``torch.compile`` backend that finds the zeros of ReLU² FFNs and skips them.

``torch.compile(model, backend="sparse")`` needs no import of this package.  What is
here is for looking at what it did and for helping it:

- :func:`explain` compiles a model, runs it once, and says how each site ended;
- :func:`calibrate` measures a model on batches and writes a plan for ``sparse.plan``;
- :func:`report` says what the sites of this process dropped while they ran;
- :func:`prepare` stores weights so that no second copy of them is needed;
- :func:`inductor_configs` gives the same passes to AOTInductor;
- :mod:`config`, :mod:`decisions` and :mod:`errors` are the options, the reasons and the
  exceptions.

Importing the package imports nothing else, torch included: torch imports it in the
middle of its own start when ``TORCH_LOGS`` names it, and the entry point must stay
cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inductor_sparse import config, decisions, errors, report
    from inductor_sparse.backend import inductor_configs
    from inductor_sparse.report.calibrate import calibrate
    from inductor_sparse.report.explain import explain
    from inductor_sparse.runtime.prepare import prepare

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "calibrate",
    "config",
    "decisions",
    "errors",
    "explain",
    "inductor_configs",
    "prepare",
    "report",
]

_SUBMODULES = ("config", "decisions", "errors", "report")
_HOME_OF = {
    "calibrate": "inductor_sparse.report.calibrate",
    "explain": "inductor_sparse.report.explain",
    "inductor_configs": "inductor_sparse.backend",
    "prepare": "inductor_sparse.runtime.prepare",
}


def __getattr__(name: str) -> Any:
    """Import the module behind a public name when the name is first used (PEP 562)."""
    if name in _SUBMODULES:
        return importlib.import_module(f"inductor_sparse.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'inductor_sparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(set(globals()) | set(__all__))
