"""Have the kernels of a graph count how dense their activations are.

- ``activation_spmm(z, w, act)`` of many rows on a CPU becomes
  ``activation_spmm(z, w, act, site_counters(input, site))``
- ``sparsify24(z, act, select)`` becomes
  ``sparsify24(z, act, select, site_energy(input, site))``, and so do its kin

At run time a site that is mostly too dense to win is compiled again, dense
(:mod:`inductor_sparse.runtime.adaptation`), and one that loses more than it should in
the 2:4 format is named.  A few rows win at any density, so a graph that decodes is not
observed and pays nothing.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_sparse import profitability
from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.fx_utils import input_of, insert_call, is_call, tensor_of
from inductor_sparse.passes.sites import SITE_KEY

_ops = torch.ops.inductor_sparse
_OP = _ops.activation_spmm.default
_ENERGY_ARGUMENT = {
    _ops.sparsify24.default: 3,
    _ops.sparsify24_quantized.default: 4,
    _ops.linear_sparsify24.default: 5,
}
"""The position of the energy among the arguments of the ops that select 2:4."""


class ObserveDensity:
    """The pass; see the module."""

    name = "observe_density"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Give every kernel that can lose something what it counts in.

        The site is named in the call of the op, not in the kernel: one kernel serves
        all layers of a model.
        """
        if not context.option("adaptive"):
            return
        for node in graph.find_nodes(
            op="call_function", target=_ops.sparse24_mm.default
        ):
            _observe_energy(node, context)
        for node in graph.find_nodes(op="call_function", target=_OP):
            anchor = _anchor(node, context)
            if anchor is not None and _can_lose(node):
                site = str(node.meta.get(SITE_KEY, node.name))
                target = _ops.site_counters.default
                counters = insert_call(node, target, (anchor, site))
                node.args = (*node.args[:3], counters)


def _observe_energy(product: fx.Node, context: PassContext) -> None:
    values = input_of(product)
    packed = input_of(values) if is_call(values, {operator.getitem}) else None
    if packed is None or packed.target not in _ENERGY_ARGUMENT:
        return
    position = _ENERGY_ARGUMENT[packed.target]
    anchor = _anchor(packed, context)
    if anchor is None or len(packed.args) > position:
        return
    site = str(product.meta.get(SITE_KEY, product.name))
    energy = insert_call(packed, _ops.site_energy.default, (anchor, site))
    packed.args = (*packed.args, energy)


def _can_lose(node: fx.Node) -> bool:
    # On a GPU there are only sites of a few tokens, and nothing is counted.
    z = tensor_of(node.args[0])
    return (
        z is not None
        and z.device.type == "cpu"
        and not statically_known_true(z.shape[-2] <= profitability.ALWAYS_WINS_TOKENS)
    )


def _anchor(kernel: fx.Node, context: PassContext) -> fx.Node | None:
    """An input that freezing does not fold: a tensor of the device, not a parameter."""
    operand = tensor_of(kernel.args[0])
    for node in kernel.graph.find_nodes(op="placeholder"):
        value = tensor_of(node)
        if (
            node.name not in context.static_inputs
            and value is not None
            and operand is not None
            and value.device == operand.device
        ):
            return node
    return None


PASS = ObserveDensity()
