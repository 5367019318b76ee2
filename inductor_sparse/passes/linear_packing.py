"""Pack in the matmul that computes what is packed.

- ``sparsify24(mm(x, w1.t()), act, select)`` becomes
  ``linear_sparsify24(x, w1, None, act, select)``
- ``sparsify24(addmm(bias, x, w1.t()), act, select)`` becomes
  ``linear_sparsify24(x, w1, bias, act, select)``

Only where nothing else reads the product, views that keep its rows between the two
included, and where there is a kernel for the device.  Whether that kernel is taken for
the sizes at hand is the lowering's decision: the op is the pair by definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_sparse import profitability
from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.fx_utils import (
    ORDERED_VIEWS,
    aten,
    input_of,
    insert_call,
    is_call,
    peel,
    replace,
    same_shape,
    same_size,
    tensor_of,
)
from inductor_sparse.passes.sites import SITE_KEY

_ops = torch.ops.inductor_sparse
_TRANSPOSES = frozenset({aten.t.default, aten.permute.default, aten.transpose.int})
_NEVER_NEGATIVE = ("relu", "relu2")


class LinearPacking:
    """The pass; see the module."""

    name = "sparse_linear_packing"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Fuse every packing with the matmul before it, if that is all it feeds."""
        for node in graph.find_nodes(
            op="call_function", target=_ops.sparsify24.default
        ):
            product = _product_of(node)
            if product is None or not _has_kernel(node, context):
                continue
            *operands, bias = _operands(product)
            call = (*operands, bias, *node.args[1:])
            fused = insert_call(node, _ops.linear_sparsify24.default, call, node.kwargs)
            # The product may be a site of its own that stayed dense.
            if SITE_KEY in product.meta:
                fused.meta[SITE_KEY] = product.meta[SITE_KEY]
            replace(node, fused)


def _product_of(packing: fx.Node) -> fx.Node | None:
    """The matmul that only feeds ``packing``, row by row, or None."""
    product, views = peel(input_of(packing), ORDERED_VIEWS)
    if not is_call(product, {aten.mm.default, aten.addmm.default}):
        return None
    packed, made = tensor_of(packing.args[0]), tensor_of(product)
    if packed is None or made is None or not same_shape(packed, made):
        return None
    if any(len(node.users) != 1 for node in (product, *views)):
        return None
    return product if product.target == aten.mm.default or _adds_bias(product) else None


def _adds_bias(product: fx.Node) -> bool:
    """Whether an ``addmm`` is a linear layer with a bias, and nothing more."""
    bias, made = tensor_of(product.args[0]), tensor_of(product)
    if bias is None or made is None or product.kwargs:
        return False
    row = bias.ndim == 1 and same_size(bias.shape[0], made.shape[1])
    return row and bias.dtype == made.dtype


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """x, w1 and the bias, or None."""
    arguments: list[Any] = list(product.args)
    bias = arguments.pop(0) if product.target == aten.addmm.default else None
    x, w1_DK = arguments
    if is_call(w1_DK, _TRANSPOSES):  # of a matrix, there is one transposition
        return x, input_of(w1_DK), bias
    return x, insert_call(product, aten.permute.default, (w1_DK, [1, 0])), bias


def _has_kernel(packing: fx.Node, context: PassContext) -> bool:
    value = tensor_of(packing.args[0])
    if value is None or packing.args[1] not in _NEVER_NEGATIVE:
        return False
    dtype = str(value.dtype).removeprefix("torch.")
    arch = context.architecture(value.device)
    return profitability.has_kernel(arch, "linear_sparsify24", dtype)


PASS = LinearPacking()
