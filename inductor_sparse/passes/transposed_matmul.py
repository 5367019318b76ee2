"""A matmul whose right operand is sparse is transposed while the rules run.

The rules know ``a @ w``, a token in each row.  Written with tokens in columns, or for a
single vector, a layer is ``w @ a``, which equals ``(a.T @ w.T).T``: but for views only
the order of the result in memory differs, and it is copied back, or with what follows.
So is ``(w * a).sum(1)``, into which Inductor decomposes the product of a matrix and a
vector.

What no rule has rewritten is spelled as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.fx_utils import (
    COMPOSED_KEY,
    aten,
    input_of,
    insert_call,
    is_call,
    replace,
    same_size,
    tensor_of,
)
from inductor_sparse.passes.matrix_vector import DECOMPOSED, cast, without_widening
from inductor_sparse.passes.producers import find_producer
from inductor_sparse.passes.sites import OPERAND_KEY, SITE_KEY, forward_nodes

_VECTOR, _TRANSPOSED, _TRANSPOSED_SUM = "mv", "transposed", "transposed sum"
"""Under ``COMPOSED_KEY``: what a matmul was spelled like."""

_SWAPPED: dict[Any, list[int]] = {aten.mm.default: [1, 0], aten.bmm.default: [0, 2, 1]}
"""Matmuls, and the permutation that transposes their matrices."""


class Transpose:
    """Every ``w @ a`` with a sparse ``a`` becomes ``(a.T @ w.T).T``."""

    name = "sparse_transpose_matmul"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Replace matmuls, and sums that are products of a matrix and a vector."""
        # Only the forward has sites; the gradient of a weight has such a form, too.
        for node in forward_nodes(graph):
            if is_call(node, {aten.sum.dim_IntList}):
                _as_matmul(node)
            elif is_call(node, _SWAPPED):
                w, a = input_of(node), input_of(node, 1)
                if _is_sparse(a) and not _is_sparse(w):
                    _transpose(node)


class Restore:
    """What is left of them is spelled as it was."""

    name = "sparse_restore_transposed"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Undo the transposition of matmuls that were not rewritten."""
        for target in _SWAPPED:
            for matmul in graph.find_nodes(op="call_function", target=target):
                form = matmul.meta.get(COMPOSED_KEY)
                if form in (_VECTOR, _TRANSPOSED, _TRANSPOSED_SUM):
                    _restore(matmul, form)


def _is_sparse(node: fx.Node) -> bool:
    producer = find_producer(node)
    return producer is not None and producer.reason is None


def _transpose(matmul: fx.Node) -> None:
    transpose, swapped = aten.permute.default, _SWAPPED[matmul.target]
    a_T = insert_call(matmul, transpose, (matmul.args[1], swapped))
    w_T = insert_call(matmul, transpose, (matmul.args[0], swapped))
    assert callable(matmul.target)
    product = insert_call(matmul, matmul.target, (a_T, w_T))
    was_sum = matmul.meta.get(COMPOSED_KEY) == DECOMPOSED
    product.meta[COMPOSED_KEY] = _TRANSPOSED_SUM if was_sum else _TRANSPOSED
    replace(matmul, _transposed_result(product, matmul, swapped))


def _transposed_result(
    product: fx.Node, matmul: fx.Node, swapped: list[int]
) -> fx.Node:
    """The transpose of a product, row-major as the result of ``matmul``."""
    shape = matmul.meta["val"].shape
    if same_size(shape[-1], 1) and all(isinstance(size, int) for size in shape):
        return insert_call(matmul, aten.view.default, (product, list(shape)))
    permuted = insert_call(matmul, aten.permute.default, (product, swapped))
    row_major = {"memory_format": torch.contiguous_format}
    return insert_call(matmul, aten.clone.default, (permuted,), row_major)


def _as_matmul(total: fx.Node) -> None:
    """Replace the sum, if it is one, of the products of a matrix and a vector."""
    value, products = tensor_of(total), input_of(total)
    if value is None or list(total.args[1:]) != [[1]]:
        return
    if not is_call(products, {aten.mul.Tensor}):
        return
    if {value.dtype, products.meta["val"].dtype} != {torch.float32}:
        return
    w, a = products.args
    if not isinstance(w, fx.Node) or not isinstance(a, fx.Node):
        return
    matrix, vector = tensor_of(w), tensor_of(a)
    if matrix is None or vector is None or (matrix.ndim, vector.ndim) != (2, 1):
        return
    if not same_size(matrix.shape[1], vector.shape[0]):
        return  # one of them is broadcast
    found = without_widening(total, w, a)
    if found is None or not _is_sparse(found[2]):
        return
    product, w, a = found
    row = insert_call(product, aten.unsqueeze.default, (a, 0))
    w_T = insert_call(product, aten.permute.default, (w, [1, 0]))
    matmul = insert_call(product, aten.mm.default, (row, w_T))
    matmul.meta[COMPOSED_KEY] = _VECTOR
    replace(product, insert_call(product, aten.squeeze.dim, (matmul, 0)))


def _restore(matmul: fx.Node, form: str) -> None:
    """Spell the result of a matmul as it was, of the operands in their order."""
    (outer,) = matmul.users
    if is_call(outer, {aten.permute.default}):
        (outer,) = outer.users
    a, w = (input_of(input_of(matmul, position)) for position in range(2))
    if form == _VECTOR:
        wide = (cast(outer, node, torch.float32) for node in (w, a))
        products = insert_call(outer, aten.mul.Tensor, tuple(wide))
        marked = insert_call(outer, aten.sum.dim_IntList, (products, [1]))
        before = cast(outer, marked, outer.meta["val"].dtype)
    else:
        assert callable(matmul.target)
        before = marked = insert_call(outer, matmul.target, (w, a))
        if form == _TRANSPOSED_SUM:
            marked.meta[COMPOSED_KEY] = DECOMPOSED
    if SITE_KEY in matmul.meta:
        marked.meta[SITE_KEY] = matmul.meta[SITE_KEY]
        marked.meta[OPERAND_KEY] = a.name, form != _VECTOR
    replace(outer, before)


TRANSPOSE = Transpose()
RESTORE = Restore()
