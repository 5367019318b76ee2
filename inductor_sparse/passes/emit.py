"""Writing the left operand of a rewritten matmul, with or without its activation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from inductor_sparse.passes.activations import as_relu, as_relu_squared
from inductor_sparse.passes.fx_utils import (
    ORDERED_VIEWS,
    VIEWS,
    aten,
    input_of,
    insert_call,
    is_call,
    is_row_major,
    is_transposition,
    peel,
    same_shape,
    same_size,
    tensor_of,
    with_dtype,
)
from inductor_sparse.passes.sites import Site, read_site

_LINEAR = frozenset({aten.mm.default, aten.addmm.default})
_STRICT_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
"""Views that have an error where a copy is needed."""
_ops = torch.ops.inductor_sparse


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


def emit_sparse24(site: Site, *, fuse: bool) -> fx.Node:
    """Insert the packing of the left operand and the product; the weight as it lies.

    Two matmuls of one activation share what is packed.  With ``fuse`` a linear layer
    before the activation is computed and packed in one, if nothing else needs it.
    """
    z, activation, select = packable_input(site, emit=False)
    linear = _linear_before(z, site) if fuse else None
    if linear is not None:
        target, first = _ops.linear_sparsify24.default, linear
    else:
        z, _, _ = packable_input(site)
        target, first = _ops.sparsify24.default, (z,)
    packed = shared_call(site.matmul, target, (*first, activation, select))
    values, metadata = (
        shared_call(site.matmul, operator.getitem, (packed, i)) for i in range(2)
    )
    return insert_call(
        site.matmul, _ops.sparse24_mm.default, (values, metadata, site.rhs)
    )


READ_ELSEWHERE = "something else reads the activation"


def fusable_linear(z: fx.Node, site: Site) -> Site | str:
    """The layer that computes ``z`` for this site alone, or why it cannot be fused."""
    core, _ = peel(z, ORDERED_VIEWS)
    linear, lhs, value = read_site(core), tensor_of(site.lhs), tensor_of(core)
    if linear is None or not is_call(core, _LINEAR) or lhs is None or value is None:
        return "the activation is not that of a linear layer"
    if linear.alpha != 1 or linear.beta != 1 or not has_bias_by_feature(linear):
        return "its bias is scaled, or is not a vector with one value per feature"
    node = core
    while len(node.users) == 1 and node is not site.matmul:
        (node,) = node.users
    if node is not site.matmul:
        return READ_ELSEWHERE
    if not same_shape(lhs, value) or lhs.dtype != value.dtype:
        return "something lies between the layer and its activation"
    # A permutation may keep the shape, and never keeps the order.
    if not all(is_call(view, ORDERED_VIEWS) for view in direct_input(site.lhs)[2]):
        return "the activation is rearranged before its matmul"
    return linear


def has_bias_by_feature(linear: Site) -> bool:
    """Whether a layer has no bias, or one of ``[N]``; ``[1]`` would be broadcast."""
    bias = tensor_of(linear.bias)
    if bias is None:
        return True
    return bias.ndim == 1 and same_size(bias.shape[0], linear.sizes[2])


def _linear_before(z: fx.Node, site: Site) -> tuple[Any, ...] | None:
    """``(x [M, D], w1 [K, D], bias or None)`` of a layer that only this site reads."""
    linear = fusable_linear(z, site)
    if isinstance(linear, str):
        return None
    w_DK = linear.rhs
    if is_transposition(w_DK):
        return linear.lhs, input_of(w_DK), linear.bias
    w_KD = shared_call(site.matmul, aten.permute.default, (w_DK, [1, 0]))
    return linear.lhs, w_KD, linear.bias


def packable_input(site: Site, *, emit: bool = True) -> tuple[fx.Node, str, str]:
    """``(z, activation, select)`` for packing the left operand of a site.

    What went through ReLU is not negative, so that its largest values are known without
    looking at signs; anything else may be.  Without ``emit`` nothing is inserted, and
    ``z`` is what the views between it and the matmul start from.
    """
    activation, z, views = direct_input(site.lhs)
    if emit:
        z = replay_views(views, z, site.matmul, shared_call)
    return z, activation, "largest_abs" if activation == "identity" else "largest"


def shared_call(
    before: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """An equal call that exists before a node already, else a new one there."""
    for user in args[0].users:
        same = is_call(user, {target}) and user.args == args
        if same and user.kwargs == (kwargs or {}) and user < before:
            return user
    return insert_call(before, target, args, kwargs)
