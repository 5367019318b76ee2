"""Grouped matmuls of a sparse activation, those of experts: recorded, left dense.

Tokens are sorted by their expert, and each group is multiplied by a weight of its own.
"""

from __future__ import annotations

import torch
from torch import fx

from inductor_sparse.decisions import Reason
from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.fx_utils import input_of, op_name
from inductor_sparse.passes.higher_order import record_dense
from inductor_sparse.passes.sites import Rejection, Site, forward_nodes

_NAMES = frozenset({"_grouped_mm", "grouped_mm_fallback"})
"""Of the ops of aten and of transformers ``(a [M, K], w [E, K, N], ends [E], ...)``."""

_WHY = Rejection(
    Reason.NO_KERNEL_YET, "a grouped matmul, one weight for each group of tokens"
)


class GroupedMatmul:
    """Records the experts of a mixture that read a sparse activation."""

    name = "sparse_grouped_matmul"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Record each of them as a site without a kernel."""
        for node in forward_nodes(graph):
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            if op_name(node) not in _NAMES:
                continue
            site = Site(node, input_of(node), input_of(node, 1))
            record_dense(site, context, _WHY)


PASS = GroupedMatmul()
