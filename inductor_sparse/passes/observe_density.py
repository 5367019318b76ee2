"""Makes the kernels of a graph count how dense their activations are.

- ``activation_spmm(z, w, act)`` becomes
  ``activation_spmm(z, w, act, site_counters(input, site))``, and so does ``glu_spmm``
- ``sparsify24(z, act, select)`` becomes
  ``sparsify24(z, act, select, site_energy(input, site))``, and so do its kin

At run time a site that is mostly too dense to win is compiled again, dense
(:mod:`inductor_sparse.runtime.adaptation`), and one that loses more than it should in
the 2:4 format is named.  On a CPU so few rows that they win at any density are not
observed, and pay nothing.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_sparse import profitability
from inductor_sparse._compat import size_hint
from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.fx_utils import (
    changing_input,
    input_of,
    insert_call,
    is_call,
    tensor_of,
)
from inductor_sparse.passes.sites import SITE_KEY

_ops = torch.ops.inductor_sparse
_COUNTERS_ARGUMENT = {_ops.activation_spmm.default: 3, _ops.glu_spmm.default: 5}
"""The position of the counters among the arguments of the ops that skip."""

ON_CPU = ("cpu",)
"""Types of devices whose kernels judge each call by themselves."""

_ENERGY_ARGUMENT = {
    _ops.sparsify24.default: 3,
    _ops.sparsify24_quantized.default: 4,
    _ops.linear_sparsify24.default: 5,
    _ops.linear_sparsify24_quantized.default: 8,
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
        for op, position in _COUNTERS_ARGUMENT.items():
            for node in graph.find_nodes(op="call_function", target=op):
                _observe_density(node, position, context)


def _observe_density(kernel: fx.Node, position: int, context: PassContext) -> None:
    anchor, limits = _anchor(kernel, context), _limits(kernel, context)
    if anchor is None or limits is None:
        return
    site = str(kernel.meta.get(SITE_KEY, kernel.name))
    target = _ops.site_counters.default
    counters = insert_call(kernel, target, (anchor, site, *limits))
    before, after = kernel.args[:position], kernel.args[position + 1 :]
    kernel.args = (*before, counters, *after)


def _limits(
    kernel: fx.Node, context: PassContext
) -> tuple[float, int] | tuple[()] | None:
    """What ``site_counters`` has to know about a kernel, None if that cannot lose."""
    z = tensor_of(kernel.args[0])
    gated = is_call(kernel, {_ops.glu_spmm.default})
    w = tensor_of(kernel.args[3 if gated else 1])
    assert z is not None and w is not None
    dtype = str(z.dtype).removeprefix("torch.")
    if z.device.type in ON_CPU:
        most = profitability.ALWAYS_WINS_TOKENS
        if gated:
            most = int(profitability.glu_reads(dtype))
        return None if statically_known_true(z.shape[-2] <= most) else ()
    if not context.can_demote(context.architecture(z.device), dtype):
        return None
    M, K, N = (size_hint(size) or 0 for size in (z.shape[-2], *w.shape[-2:]))
    break_even = profitability.cuda.break_even_union(
        *(M, K, N, dtype),
        gated=gated,
        graphs=context.cuda_graphs,
        read_dtype=str(w.dtype).removeprefix("torch."),
    )
    return (round(break_even, 3), M) if break_even < 1 else None


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


def _anchor(kernel: fx.Node, context: PassContext) -> fx.Node | None:
    operand = tensor_of(kernel.args[0])
    assert operand is not None
    return changing_input(kernel.graph, operand.device, context.static_inputs)


PASS = ObserveDensity()
