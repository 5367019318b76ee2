"""Graph passes over the aten graph, before it is partitioned and lowered.

:data:`PIPELINE` is the one ordered list.  A new rule is one file with a ``RULE``, one
line here, and one test file.  A rule that lives in another project is one class and one
call of :func:`register`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import fx

import inductor_sparse.ops  # noqa: F401  (registers the ops that rules emit)
from inductor_sparse._compat import run_observed
from inductor_sparse.errors import SparseError
from inductor_sparse.passes import (
    canonicalize,
    cleanup,
    encoder_layer,
    gated_matmul,
    grouped_matmul,
    higher_order,
    magnitude_matmul,
    matrix_vector,
    observe_density,
    relu_matmul,
    relu_squared_matmul,
    scaled_matmul,
    transposed_matmul,
)
from inductor_sparse.passes.base import GraphPass, PassContext, Rule
from inductor_sparse.passes.emit import emit_activation_spmm
from inductor_sparse.passes.producers import Family, Producer
from inductor_sparse.passes.sites import Rejection, Site

PIPELINE: tuple[GraphPass, ...] = (
    matrix_vector.COMPOSE,
    transposed_matmul.TRANSPOSE,
    canonicalize.PASS,
    relu_squared_matmul.RULE,
    relu_matmul.RULE,
    gated_matmul.RULE,
    magnitude_matmul.RULE,
    scaled_matmul.RULE,
    grouped_matmul.PASS,
    encoder_layer.PASS,
    higher_order.PASS,
    observe_density.PASS,
    cleanup.PASS,
    transposed_matmul.RESTORE,
    matrix_vector.DECOMPOSE,
)
"""The passes in the order they run."""

_registered: tuple[Rule, ...] = ()

__all__ = [
    "PIPELINE",
    "Family",
    "PassContext",
    "Producer",
    "Rejection",
    "Rule",
    "Site",
    "emit_activation_spmm",
    "pipeline",
    "register",
    "registered",
    "run",
    "unregister",
]


def register(rule: Rule) -> None:
    """Let ``rule`` decide the sites it matches in every graph compiled from now on.

    It runs after ``canonicalize`` and before the rules of this package, so that it can
    take a site from them; of several the one registered first does.  Its source file
    and its attributes become part of Inductor's cache keys.

    Raises:
        SparseError: it has no name, or a pass of that name exists.
    """
    global _registered
    name = getattr(rule, "name", "")
    if not name:
        raise SparseError(f"{type(rule).__name__} needs a name to be registered")
    if name in {step.name for step in pipeline()}:
        raise SparseError(f"a pass called {name!r} exists; give the rule another name")
    _registered = (*_registered, rule)


def unregister(name: str) -> None:
    """Forget a registered rule; graphs it has rewritten stay as they are.

    Raises:
        SparseError: no rule of this name is registered.
    """
    global _registered
    if name not in {rule.name for rule in _registered}:
        known = ", ".join(rule.name for rule in _registered) or "none"
        raise SparseError(f"no registered rule is called {name!r}; registered: {known}")
    _registered = tuple(rule for rule in _registered if rule.name != name)


def registered() -> tuple[Rule, ...]:
    """The rules of other projects, in the order they run."""
    return _registered


def pipeline() -> tuple[GraphPass, ...]:
    """:data:`PIPELINE` with the registered rules ahead of its own."""
    rules = (at for at, step in enumerate(PIPELINE) if isinstance(step, Rule))
    first = next(rules, 0)
    return (*PIPELINE[:first], *_registered, *PIPELINE[first:])


def run(
    graph: fx.Graph | fx.GraphModule,
    context: PassContext,
    steps: Sequence[GraphPass] | None = None,
) -> None:
    """Run every pass of :func:`pipeline`, recording into ``context.graph``.

    ``steps`` are the passes to run instead, if the pipeline was looked up before.
    Each runs under Inductor's observer, so that ``disabled_passes`` and the compiler
    bisector can skip it; the sites of a skipped rule are recorded as ``rule-disabled``.
    """
    gm = graph.owning_module if isinstance(graph, fx.Graph) else graph
    if gm is None:
        raise SparseError("the graph has no owner; pass the GraphModule instead")
    before = _text(gm) if context.observers else ""
    for graph_pass in pipeline() if steps is None else steps:
        start = time.perf_counter()
        _run_one(gm, graph_pass, context)
        seconds = time.perf_counter() - start
        after = _text(gm) if context.observers else ""
        for observer in context.observers:
            observer(graph_pass.name, before, after, seconds)
        before = after
    gm.recompile()


def _run_one(gm: fx.GraphModule, graph_pass: GraphPass, context: PassContext) -> None:
    def bound(graph: fx.Graph) -> None:
        graph_pass(graph, context)

    ran = run_observed(gm, graph_pass.name, bound)
    if not ran and isinstance(graph_pass, Rule):
        graph_pass.decide_all(gm.graph, context, disabled=True)


def _text(gm: fx.GraphModule) -> str:
    return str(
        gm.print_readable(print_output=False, include_stride=True, include_device=True)
    )
