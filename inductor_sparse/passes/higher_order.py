"""Sites in bodies of ``torch.cond`` and similar operators: recorded, left dense."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from inductor_sparse.decisions import Reason, Tier
from inductor_sparse.passes.base import (
    PassContext,
    close_dense,
    open_decision,
)
from inductor_sparse.passes.sites import Rejection, Site, forward_sites


def record_dense(site: Site, context: PassContext, why: Rejection) -> None:
    """Record a matmul that no rule can rewrite, if a sparse activation feeds it."""
    producer = site.producer
    if producer is None or producer.reason is not None:
        return
    rule = producer.family.value
    decision = open_decision(site, producer, context, rule, Tier.EXACT)
    close_dense(decision, why, site.matmul)


class HigherOrder:
    """Records the sites inside of torch.cond and its kin, and leaves them dense."""

    name = "sparse_higher_order"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Record each sparse site of each subgraph."""
        for operator, subgraph in _subgraphs(graph):
            detail = f"inside the body of {operator}, which is not rewritten"
            why = Rejection(Reason.HIGHER_ORDER_OP, detail)
            for site in forward_sites(subgraph):
                record_dense(site, context, why)


def _subgraphs(graph: fx.Graph) -> Iterator[tuple[str, fx.Graph]]:
    """The forward subgraphs of a graph, nested ones too, with their operator's name."""
    owner = graph.owning_module
    for node in graph.find_nodes(op="get_attr"):
        inner = getattr(owner, str(node.target), None)
        users = [user for user in node.users if user.op == "call_function"]
        if isinstance(inner, fx.GraphModule) and users:
            operator = users[0].target
            yield getattr(operator, "__name__", str(operator)), inner.graph
            yield from _subgraphs(inner.graph)


PASS = HigherOrder()
