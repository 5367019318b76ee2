"""Writing a site that is packed 2:4: what is packed, and the product of it.

A kernel that packs reads what an activation is computed from and computes that itself,
as it does a gated product ``act(z) * up``.

Shape legend: M tokens, D model, K hidden.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from inductor_sparse.passes.emit import (
    direct_input,
    first_equal,
    replay_views,
    shared_call,
    shared_items,
)
from inductor_sparse.passes.fx_utils import (
    ORDERED_VIEWS,
    VIEWS,
    aten,
    input_of,
    insert_call,
    is_call,
    is_transposition,
    peel,
    same_shape,
    same_size,
    tensor_of,
)
from inductor_sparse.passes.sites import MATMULS, Site, read_site

_LINEAR = frozenset({aten.mm.default, aten.addmm.default})
_STORED = MATMULS | {aten._scaled_mm.default}
"""What leaves its result in memory, whoever reads it."""
WINDOWS = VIEWS | frozenset(
    {operator.getitem, aten.split.Tensor, aten.split_with_sizes.default}
)
"""Views, also as a gate and its factor are taken from one matmul for both."""
_ops = torch.ops.inductor_sparse


@dataclasses.dataclass(frozen=True)
class Packable:
    """``act(z)``, or ``act(z) * up``, with the views between that and a matmul.

    The views of either operand come nearest to the matmul first.
    """

    z: fx.Node
    activation: str
    views: Sequence[fx.Node] = ()
    up: fx.Node | None = None
    up_views: Sequence[fx.Node] = ()

    @property
    def select(self) -> str:
        """How two of four are chosen.

        What went through ReLU is not negative, so that its largest values are known
        without looking at signs; anything else may be.
        """
        signed = self.activation == "identity" or self.up is not None
        return "largest_abs" if signed else "largest"

    def behind(self, views: Sequence[fx.Node]) -> Packable:
        """The same with more views between it and the matmul."""
        return dataclasses.replace(
            self,
            views=(*views, *self.views),
            up_views=() if self.up is None else (*views, *self.up_views),
        )

    def emit(self, target: Any, before: fx.Node, *arguments: object) -> fx.Node:
        """A call of a packing op; two sites of one activation share it."""
        z = first_equal(replay_views(self.views, self.z, before, shared_call))
        gate = {}
        if self.up is not None:
            gate["up"] = replay_views(self.up_views, self.up, before, shared_call)
        args = (z, self.activation, self.select, *arguments)
        return shared_call(before, target, args, gate)


def read_packable(site: Site, *, replaced: bool | None = None) -> Packable:
    """What is packed for the left operand of a site.

    Args:
        site: the last matmul of an FFN.
        replaced: whether the activation is read by nothing that stays; None to look,
            as :func:`replaces_activation` does.  A product that is written for others
            anyway is packed from there.
    """
    if replaced is None:
        replaced = replaces_activation(site)
    gated = _read_gated(site) if replaced else None
    if gated is not None:
        return gated
    activation, z, views = direct_input(site.lhs)
    return Packable(z, activation, views)


def _read_gated(site: Site) -> Packable | None:
    """The factors of a gated product that lie in memory already, or None.

    Otherwise a kernel would have to write them first, which is what multiplying them
    there spares.
    """
    factors = read_factors(site)
    if factors is None or not _lie_in_memory(factors.z, factors.up):
        return None
    return factors


def read_factors(site: Site) -> Packable | None:
    """The gate and its factor behind the left operand of a site, or None."""
    producer = site.producer
    if producer is None or producer.gate is None or producer.up is None:
        return None
    product, views = peel(site.lhs, ORDERED_VIEWS)
    gate, up = producer.gate, producer.up
    if not is_call(product, {aten.mul.Tensor}) or product is not producer.node:
        return None
    activation, z, gate_views = direct_input(gate)
    values = [tensor_of(node) for node in (product, z, up)]
    fits = len({value.dtype for value in values if value is not None}) == 1
    if activation == "identity" or not fits:
        return None
    return Packable(z, activation, (*views, *gate_views), up, views)


def _lie_in_memory(*nodes: fx.Node | None) -> bool:
    sources = [peel(node, WINDOWS)[0] for node in nodes if node is not None]
    return all(one.op == "placeholder" or is_call(one, _STORED) for one in sources)


def replaces_activation(site: Site) -> bool:
    """Whether a pack takes the place of the kernel that writes the activation.

    It does not if something besides matmuls reads the dense activation as well.
    """
    producer = site.producer
    if producer is None or (producer.z is None and _read_gated(site) is None):
        return False
    return is_only_read_by(producer.node, MATMULS)


def is_only_read_by(activation: fx.Node, targets: frozenset[Any]) -> bool:
    """Whether nothing but calls of these reads an activation, however it is viewed."""
    readers = set(activation.users)
    while readers:
        node = readers.pop()
        if is_call(node, VIEWS):
            readers |= set(node.users)
        elif not is_call(node, targets):
            return False
    return True


def emit_sparse24(site: Site, *, fuse: bool) -> fx.Node:
    """Insert the packing of the left operand and the product; the weight as it lies.

    Two matmuls of one activation share what is packed.  With ``fuse`` a linear layer
    before the activation is computed and packed in one, if nothing else needs it.
    """
    packable = read_packable(site)
    linear = _linear_before(packable, site) if fuse else None
    if linear is not None:
        target = _ops.linear_sparsify24.default
        arguments = (*linear, packable.activation, packable.select)
        packed = shared_call(site.matmul, target, arguments)
    else:
        packed = packable.emit(_ops.sparsify24.default, site.matmul)
    values, metadata = shared_items(packed, 2, site.matmul)
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


def _linear_before(packable: Packable, site: Site) -> tuple[Any, ...] | None:
    """``(x [M, D], w1 [K, D], bias or None)`` of a layer that only this site reads."""
    linear = fusable_linear(packable.z, site)
    if packable.up is not None or isinstance(linear, str):
        return None
    w_DK = linear.rhs
    if is_transposition(w_DK):
        return linear.lhs, input_of(w_DK), linear.bias
    w_KD = shared_call(site.matmul, aten.permute.default, (w_DK, [1, 0]))
    return linear.lhs, w_KD, linear.bias
