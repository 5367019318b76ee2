"""Have the kernels of a graph count how dense their activations are.

- ``activation_spmm(z, w, act)`` of many rows becomes
  ``activation_spmm(z, w, act, site_counters(input, site))``

At run time a site that is mostly too dense to win is compiled again, dense
(:mod:`inductor_sparse.runtime.adaptation`).  A few rows win at any density, so a graph
that decodes is not observed and pays nothing.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_sparse import profitability
from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.fx_utils import insert_call, tensor_of
from inductor_sparse.passes.sites import SITE_KEY

_OP = torch.ops.inductor_sparse.activation_spmm.default


class ObserveDensity:
    """The pass; see the module."""

    name = "observe_density"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Give every ``activation_spmm`` that can lose its counters.

        The site is named in the call of the op, not in the kernel: one kernel serves
        all layers of a model.
        """
        if not context.option("adaptive"):
            return
        anchor = _anchor(graph, context)
        if anchor is None:
            return
        target = torch.ops.inductor_sparse.site_counters.default
        for node in graph.find_nodes(op="call_function", target=_OP):
            if _can_lose(node):
                site = str(node.meta.get(SITE_KEY, node.name))
                counters = insert_call(node, target, (anchor, site))
                node.args = (*node.args[:3], counters)


def _can_lose(node: fx.Node) -> bool:
    z = tensor_of(node.args[0])
    return z is not None and not statically_known_true(
        z.shape[-2] <= profitability.ALWAYS_WINS_TOKENS
    )


def _anchor(graph: fx.Graph, context: PassContext) -> fx.Node | None:
    """An input that freezing does not fold: not a parameter, and a tensor."""
    for node in graph.find_nodes(op="placeholder"):
        value = tensor_of(node)
        if node.name not in context.static_inputs and value is not None:
            return node
    return None


PASS = ObserveDensity()
