"""Matrix-vector products that Inductor decomposes are matmuls while the rules run.

``coordinate_descent_tuning``, which ``mode="max-autotune"`` turns on, makes Inductor
decompose ``mm`` of a single row on a GPU into ``(a[:, :, None] * b[None]).sum(1)``, and
``bmm`` likewise: as a reduction it reads a weight faster than cuBLAS does.  As that
happens while the graph is traced, no rule would find a matmul in it.

What no rule has rewritten is taken apart again.  A model may spell its products like
that too: those come back as they were, not as a call of cuBLAS, which may round float32
to TF32.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.fx_utils import (
    COMPOSED_KEY,
    aten,
    input_of,
    insert_call,
    is_call,
    is_cast,
    is_widening,
    prims,
    replace,
    same_size,
    tensor_of,
)
from inductor_sparse.passes.sites import OPERAND_KEY, SITE_KEY

_MATMULS = {3: aten.mm.default, 4: aten.bmm.default}
"""By the dimensions of the products that are summed."""
DECOMPOSED = "decomposed"
"""Under ``COMPOSED_KEY``: the matmul was a sum of products."""


class Compose:
    """Every decomposed matrix-vector product becomes one ``mm`` or ``bmm``."""

    name = "sparse_compose_matrix_vector"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Replace the nodes that spell a product by the product."""
        for total in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
            operands = _operands(total)
            if operands is None:
                continue
            product, a, b = operands
            value = product.meta["val"]
            matmul = insert_call(product, _MATMULS[1 + value.ndim], (a, b))
            matmul.meta[COMPOSED_KEY] = DECOMPOSED
            replace(product, matmul)


class Decompose:
    """What is left of them is spelled as it was."""

    name = "sparse_decompose_matrix_vector"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Decompose the products that were composed and not rewritten."""
        for target in _MATMULS.values():
            for matmul in graph.find_nodes(op="call_function", target=target):
                if matmul.meta.get(COMPOSED_KEY) == DECOMPOSED:
                    replace(matmul, _sum_of_products(matmul))


def _sum_of_products(matmul: fx.Node) -> fx.Node:
    """The nodes that a matmul was composed of, inserted before it."""
    value = matmul.meta["val"]
    axis = value.ndim - 1
    wide = [cast(matmul, input_of(matmul, i), torch.float32) for i in (0, 1)]
    a, b = (
        insert_call(matmul, aten.unsqueeze.default, (factor, at))
        for factor, at in zip(wide, (axis + 1, axis - 1), strict=True)
    )
    products = insert_call(matmul, aten.mul.Tensor, (a, b))
    total = insert_call(matmul, aten.sum.dim_IntList, (products, [axis]))
    if SITE_KEY in matmul.meta:
        # Where the site is measured: like a matmul, it is given the left operand.
        marked = total if OPERAND_KEY in matmul.meta else a
        keys = {SITE_KEY, OPERAND_KEY} & matmul.meta.keys()
        marked.meta |= {key: matmul.meta[key] for key in keys}
    return cast(matmul, total, value.dtype)


def cast(before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``node`` in another dtype, or itself if that is its own."""
    if node.meta["val"].dtype == dtype:
        return node
    return insert_call(before, prims.convert_element_type.default, (node, dtype))


def _operands(total: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """``(product, a, b)`` if a sum is that of ``a @ b``, computed in float32.

    ``product`` is the cast of the sum to the dtype of operands that were widened for
    it, else the sum itself, of float32 operands.
    """
    value, products = tensor_of(total), input_of(total)
    if value is None or not is_call(products, {aten.mul.Tensor}):
        return None
    axis = value.ndim - 1
    if axis + 2 not in _MATMULS or list(total.args[1:]) != [[axis]]:
        return None
    if {value.dtype, products.meta["val"].dtype} != {torch.float32}:
        return None
    a, b = (
        _without_axis(factor, at)
        for factor, at in zip(products.args, (axis + 1, axis - 1), strict=True)
    )
    if a is None or b is None or not _match(a.meta["val"], b.meta["val"]):
        return None
    return without_widening(total, a, b)


def without_widening(
    total: fx.Node, a: fx.Node, b: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """``(product, a, b)`` of a float32 sum of products of ``a`` and ``b``.

    ``product`` is the cast of the sum to the dtype of operands that were widened for
    it, else the sum itself, of float32 operands.
    """
    narrow, users = (_narrow(a), _narrow(b)), list(total.users)
    dtypes = {node.meta["val"].dtype for node in narrow}
    if len(users) == 1 and is_cast(users[0]) and {users[0].meta["val"].dtype} == dtypes:
        return users[0], *narrow
    wide = {node.meta["val"].dtype for node in (a, b)}
    return (total, a, b) if wide == {torch.float32} else None


def _match(a: Tensor, b: Tensor) -> bool:
    """Whether these are the shapes of a matmul, not of a product that broadcasts.

    Sizes that are not known to be equal are not equal.
    """
    inner_last = (*a.shape[:-2], a.shape[-1])
    return a.ndim == b.ndim and all(map(same_size, inner_last, b.shape[:-1]))


def _without_axis(node: object, axis: int) -> fx.Node | None:
    """The input of ``unsqueeze(axis)``, or None."""
    value = tensor_of(node)
    if value is None or not is_call(node, {aten.unsqueeze.default}):
        return None
    at = node.args[1]
    assert isinstance(at, int)
    return input_of(node) if at % value.ndim == axis else None


def _narrow(node: fx.Node) -> fx.Node:
    """What a cast has widened, or the node itself."""
    return input_of(node) if is_widening(node) else node


COMPOSE = Compose()
DECOMPOSE = Decompose()
