"""Rewrites all equivalent expressions of ReLU and ReLU² before a matmul to one form.

- ``clamp(x, min=0)``, ``maximum(x, 0)``, ``threshold(x, 0, 0)``, ... -> ``relu(x)``
- ``r * r``, ``relu(x) * relu(x)``, ``square(r)``, ... -> ``relu(x) ** 2``
- either of them computed between a widening and a narrowing cast -> without the casts

Only what equals the canonical form on every input, NaN and infinities included, and
only what feeds a matmul: the rest of the graph is none of our business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from inductor_sparse.passes.activations import as_relu, as_relu_squared
from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.fx_utils import (
    aten,
    insert_call,
    is_call,
    replace,
    same_layout,
    tensor_of,
    with_dtype,
)
from inductor_sparse.passes.sites import forward_sites

if TYPE_CHECKING:
    from typing import TypeGuard


class Canonicalize:
    """Every exact spelling of relu(x) and relu(x)² before a matmul gets one form."""

    name = "sparse_canonicalize"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Canonicalize the activations that feed a matmul of the forward."""
        for site in forward_sites(graph):
            producer = site.producer
            if producer is None or producer.reason is not None:
                continue
            for node in (producer.node, producer.gate, producer.up):
                if node is not None:
                    _canonicalize(node)


def _canonicalize(node: fx.Node) -> None:
    value = tensor_of(node)
    if value is None:
        return
    z = with_dtype(as_relu_squared(node), value.dtype)
    if _takes_layout(z, value) and not _is_canonical_square(node):
        relu = _relu_of(z, node)
        replace(node, insert_call(node, aten.pow.Tensor_Scalar, (relu, 2)))
        return
    z = with_dtype(as_relu(node), value.dtype)
    if _takes_layout(z, value) and not is_call(node, {aten.relu.default}):
        replace(node, _relu_of(z, node))


def _takes_layout(z: fx.Node | None, value: Tensor) -> TypeGuard[fx.Node]:
    """Whether there is a ``z``, and relu(z) lies in memory as what it would replace."""
    if z is None:
        return False
    return same_layout(torch.empty_like(z.meta["val"]), value)


def _relu_of(z: fx.Node, before: fx.Node) -> fx.Node:
    for user in z.users:
        if is_call(user, {aten.relu.default}) and user < before:
            return user
    return insert_call(before, aten.relu.default, (z,))


def _is_canonical_square(node: fx.Node) -> bool:
    return is_call(node, {aten.pow.Tensor_Scalar}) and is_call(
        node.args[0], {aten.relu.default}
    )


PASS = Canonicalize()
