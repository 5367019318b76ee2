"""Counts the other matmuls, and checks that every applied site was rewritten."""

from __future__ import annotations

import torch
from torch import fx

from inductor_sparse.decisions import GraphDecisions
from inductor_sparse.errors import SparseError
from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.fx_utils import is_call
from inductor_sparse.passes.sites import SITE_KEY, forward_sites


class Cleanup:
    """Counts the other matmuls and refuses a half-rewritten graph."""

    name = "sparse_cleanup"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Lint the graph, put the decisions in its order, check the postcondition.

        Raises:
            SparseError: a site is neither rewritten nor untouched; an internal error.
        """
        graph.lint()
        context.graph.other_matmuls = sum(1 for _ in forward_sites(graph))
        order = {node.meta.get(SITE_KEY): i for i, node in enumerate(graph.nodes)}
        context.graph.decisions.sort(key=lambda d: order.get(d.site, len(order)))
        check_no_half_rewritten_site(graph, context.graph)


def check_no_half_rewritten_site(graph: fx.Graph, decisions: GraphDecisions) -> None:
    """Check that each applied site is computed by one of our ops.

    Raises:
        SparseError: naming the sites for which this does not hold.
    """
    ops = torch.ops.inductor_sparse
    targets = {
        ops.activation_spmm.default,
        ops.glu_spmm.default,
        ops.sparse24_mm.default,
    }
    ours = [node for node in graph.nodes if is_call(node, targets)]
    computed = {node.meta.get(SITE_KEY, node.name) for node in ours}
    unknown = {node.name for node in ours if SITE_KEY not in node.meta}
    applied = {decision.site for decision in decisions.applied}
    broken = sorted((applied - computed) | unknown)
    if broken:
        raise SparseError(
            f"internal error: half-rewritten sites {', '.join(broken)}; please report "
            'it, and compile with backend="inductor" meanwhile'
        )


PASS = Cleanup()
