"""The last pass: counts what is unrelated, and refuses a half-rewritten graph."""

from __future__ import annotations

import torch
from torch import fx

from inductor_sparse.decisions import GraphDecisions
from inductor_sparse.errors import SparseError
from inductor_sparse.passes.base import PassContext
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
        context.graph.other_matmuls = len(forward_sites(graph))
        order = {node.meta.get(SITE_KEY): i for i, node in enumerate(graph.nodes)}
        context.graph.decisions.sort(key=lambda d: order.get(d.site, len(order)))
        check_no_half_rewritten_site(graph, context.graph)


def check_no_half_rewritten_site(graph: fx.Graph, decisions: GraphDecisions) -> None:
    """Check that each applied site is computed by one of our ops.

    Raises:
        SparseError: naming the sites for which this does not hold.
    """
    ops = torch.ops.inductor_sparse
    targets = {ops.activation_spmm.default, ops.glu_spmm.default}
    computed = {
        node.meta.get(SITE_KEY)
        for node in graph.nodes
        if node.op == "call_function" and node.target in targets
    }
    applied = {decision.site for decision in decisions.applied}
    broken = sorted(str(site) for site in applied ^ computed)
    if broken:
        raise SparseError(
            f"internal error: half-rewritten sites {', '.join(broken)}; please report "
            'it, and compile with backend="inductor" meanwhile'
        )


PASS = Cleanup()
