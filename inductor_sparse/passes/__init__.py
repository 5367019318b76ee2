"""Graph passes over the aten graph, before it is partitioned and lowered.

:data:`PIPELINE` is the one ordered list.  A new rule is one file with a ``RULE``, one
line here, and one test file.
"""

from __future__ import annotations

import time

from torch import fx

import inductor_sparse.ops  # noqa: F401  (registers the ops that rules emit)
from inductor_sparse._compat import run_observed
from inductor_sparse.errors import SparseError
from inductor_sparse.passes import (
    canonicalize,
    cleanup,
    gated_matmul,
    higher_order,
    observe_density,
    relu_matmul,
    relu_squared_matmul,
)
from inductor_sparse.passes.base import GraphPass, PassContext, Rule

PIPELINE: tuple[GraphPass, ...] = (
    canonicalize.PASS,
    relu_squared_matmul.RULE,
    relu_matmul.RULE,
    gated_matmul.RULE,
    higher_order.PASS,
    observe_density.PASS,
    cleanup.PASS,
)
"""The passes in the order they run."""

__all__ = ["PIPELINE", "PassContext", "Rule", "run"]


def run(graph: fx.Graph | fx.GraphModule, context: PassContext) -> None:
    """Run every pass of :data:`PIPELINE`, recording into ``context.graph``.

    Each runs under Inductor's observer, so that ``disabled_passes`` and the compiler
    bisector can skip it; the sites of a skipped rule are recorded as ``rule-disabled``.
    """
    gm = graph.owning_module if isinstance(graph, fx.Graph) else graph
    if gm is None:
        raise SparseError("the graph has no owner; pass the GraphModule instead")
    before = _text(gm) if context.observers else ""
    for graph_pass in PIPELINE:
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
