"""A gated product feeding a matmul: zeros of the gate are skipped in up and down.

- ``mm(act(g) * mm(x, w_up.T), w) -> glu_spmm(g, x, w_up, w, act)`` for a few tokens:
  only the active neurons of the up projection are computed
- ``mm(act(g) * up, w) -> activation_spmm(act(g) * up, w, "identity")`` otherwise, and
  on a GPU from the number of tokens on at which that saves more

with ``act`` ReLU or ReLU²; a gate whose zeros have another origin is computed before,
and ``act`` is the identity.

Shape legend: M tokens, D model, F hidden, N output features.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
from torch import fx

from inductor_sparse.passes.base import FamilyRule, PassContext
from inductor_sparse.passes.emit import direct_input, replay_views
from inductor_sparse.passes.fx_utils import (
    ORDERED_VIEWS,
    aten,
    input_of,
    insert_call,
    is_call,
    peel,
    same_shape,
    tensor_of,
)
from inductor_sparse.passes.gpu_obstacles import kernel_obstacle
from inductor_sparse.passes.producers import Family
from inductor_sparse.passes.sites import Rejection, Site
from inductor_sparse.passes.weights import Weight, emit_weight, resolve_weight


@dataclasses.dataclass(frozen=True)
class _Glu:
    """The parts of a gated FFN that ``glu_spmm`` computes in one go."""

    activation: str
    gate: fx.Node
    gate_views: list[fx.Node]
    x_MD: fx.Node
    w_up_FD: Weight


class GatedMatmul(FamilyRule):
    """mm(relu(g) * up, w), also with relu(g)²: glu_spmm or activation_spmm."""

    family = Family.GATED
    name = family.value
    packs = True

    def forms(self, site: Site, context: PassContext) -> tuple[str, ...]:
        """``activation_spmm``, and ``glu_spmm`` where all of its parts are at hand."""
        if _read_glu(site, context) is None:
            return (self.op,)
        return ("glu_spmm", self.op)

    def rewrite_as(
        self, op: str, site: Site, weight: fx.Node, context: PassContext
    ) -> fx.Node:
        """Insert ``glu_spmm``, or :meth:`rewrite`."""
        if op != "glu_spmm":
            return self.rewrite(site, weight, context)
        glu = _read_glu(site, context)
        assert glu is not None
        gate = replay_views(glu.gate_views, glu.gate, site.matmul)
        w_up = emit_weight(glu.w_up_FD, site.matmul)
        target = torch.ops.inductor_sparse.glu_spmm.default
        return insert_call(
            site.matmul, target, (gate, glu.x_MD, w_up, weight, glu.activation)
        )


def _read_glu(site: Site, context: PassContext) -> _Glu | None:
    producer = site.producer
    product, views = peel(site.lhs, ORDERED_VIEWS)
    device = site.matmul.meta["val"].device
    if (
        producer is None
        or producer.gate is None
        or producer.up is None
        or site.matmul.target not in (aten.mm.default, aten.addmm.default)
        or kernel_obstacle(
            ("glu_spmm",), site.dtype, context.architecture(device), context
        )
    ):
        return None
    activation, gate, gate_views = direct_input(producer.gate)
    ordered = all(is_call(view, ORDERED_VIEWS) for view in gate_views)
    up = _up_projection(producer.up, product, site)
    fits = _fits(gate, activation, product, site.lhs.meta["val"].dtype)
    if not ordered or up is None or not fits:
        return None
    x_MD, w_up = up
    w_up_FD = _stored_weight(w_up, context)
    if w_up_FD is None:
        return None
    return _Glu(activation, gate, [*views, *gate_views], x_MD, w_up_FD)


def _fits(gate: fx.Node, activation: str, product: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the op takes the gate: in the dtype, and of the shape of the product."""
    value, whole = tensor_of(gate), tensor_of(product)
    if value is None or whole is None or value.dtype != dtype:
        return False
    # An activation is found behind views, which are replayed.
    return activation != "identity" or same_shape(value, whole)


def _up_projection(
    up: fx.Node, product: fx.Node, site: Site
) -> tuple[fx.Node, fx.Node] | None:
    """``(x [M, D], w [D, F])`` of an up projection that only this product uses."""
    matmul, views = peel(up, ORDERED_VIEWS)
    value, lhs = tensor_of(matmul), tensor_of(site.lhs)
    if not is_call(matmul, {aten.mm.default}) or value is None or lhs is None:
        return None
    chain = [product, *views, matmul]
    only = all(set(inner.users) == {outer} for outer, inner in pairwise(chain))
    if not only or not same_shape(value, lhs) or value.dtype != lhs.dtype:
        return None
    return input_of(matmul), input_of(matmul, 1)


def _stored_weight(w_DF: fx.Node, context: PassContext) -> Weight | None:
    """The ``[F, D]`` weight behind its transpose, if it needs no copy but a cast."""
    if not is_call(w_DF, {aten.permute.default, aten.t.default}):
        return None
    weight = resolve_weight(input_of(w_DF), context)
    return None if isinstance(weight, Rejection) else weight


RULE = GatedMatmul()
