"""Writing the left operand of a rewritten matmul, with or without its activation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from inductor_sparse.passes.activations import as_relu, as_relu_squared
from inductor_sparse.passes.fx_utils import (
    VIEWS,
    aten,
    insert_call,
    is_call,
    is_row_major,
    peel,
    tensor_of,
    with_dtype,
)
from inductor_sparse.passes.sites import Site

_STRICT_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
"""Views that have an error where a copy is needed."""


def direct_input(node: fx.Node) -> tuple[str, fx.Node, list[fx.Node]]:
    """What can be computed inside the kernel: an activation, its input, views between.

    The activation is ``"identity"``, and the input the node itself, where anything but
    views lies between, or where the kernel would round differently: it applies the
    activation in the dtype of its input.
    """
    core, views = peel(node, VIEWS)
    dtype = node.meta["val"].dtype
    for name, recognize in (("relu2", as_relu_squared), ("relu", as_relu)):
        z = with_dtype(recognize(core), dtype)
        if z is not None:
            return name, z, views
    return "identity", node, []


def replay_views(
    views: Iterable[fx.Node],
    on: fx.Node,
    before: fx.Node,
    insert: Callable[..., fx.Node] = insert_call,
) -> fx.Node:
    """Apply the views of a chain, nearest to the matmul first, to another node.

    An activation lies dense in memory, and what it is computed from need not: it may
    have to be copied where that was viewed.
    """
    for view in reversed(list(views)):
        target = view.target
        if is_call(view, _STRICT_VIEWS) and not is_row_major(on.meta["val"]):
            target = aten.reshape.default
        on = insert(before, target, (on, *view.args[1:]), dict(view.kwargs))
    return on


def scaled_and_shifted(site: Site, product: fx.Node) -> fx.Node:
    """``alpha * product + beta * bias`` of a site, before its matmul.

    Scale and bias are separate nodes: Inductor fuses them into the kernel's epilogue.
    """
    if site.alpha != 1:
        product = insert_call(site.matmul, aten.mul.Tensor, (product, site.alpha))
    if site.bias is None or site.beta == 0:
        return product
    bias = site.bias
    if site.beta != 1:
        bias = insert_call(site.matmul, aten.mul.Tensor, (bias, site.beta))
    return insert_call(site.matmul, aten.add.Tensor, (product, bias))


def emit_activation_spmm(
    site: Site, weight: fx.Node, scale: fx.Node | None = None
) -> fx.Node:
    """Insert ``activation_spmm`` for a site, the activation inside it if possible.

    ``scale`` holds one for each row of the weight, if these have 8 bits.
    """
    activation, z, views = direct_input(site.lhs)
    z = replay_views(views, z, site.matmul)
    assert tensor_of(z) is not None
    target = torch.ops.inductor_sparse.activation_spmm.default
    scaled = () if scale is None else (None, scale)
    return insert_call(site.matmul, target, (z, weight, activation, *scaled))


def shared_call(
    before: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """An equal call that exists before a node already, else a new one there."""
    found = _equal_call(before, target, args, kwargs or {})
    return found or insert_call(before, target, args, kwargs)


def shared_items(node: fx.Node, count: int, before: fx.Node) -> tuple[fx.Node, ...]:
    """The first results of a call that has several."""
    getitem = operator.getitem
    return tuple(shared_call(before, getitem, (node, i)) for i in range(count))


def first_equal(node: fx.Node) -> fx.Node:
    """The first view of a tensor that is the same as this one, or the node itself.

    Layers view an input of three dimensions as a matrix, each for itself.
    """
    if not is_call(node, VIEWS):
        return node
    return _equal_call(node, node.target, node.args, node.kwargs) or node


def _equal_call(
    before: fx.Node, target: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node | None:
    """A call of this kind before a node, or None."""
    for user in args[0].users:
        same = is_call(user, {target}) and user.args == args
        if same and user.kwargs == kwargs and user < before:
            return user
    return None
