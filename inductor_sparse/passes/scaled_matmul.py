"""ReLU or ReLU², quantized per row, feeding an fp8 matmul: packed 2:4 at once.

``_scaled_mm(to_fp8(h / s), w8, s, sw)`` with ``h = act(z)`` and ``s`` taken from the
largest value of each row of ``h``, as quantization libraries write it, becomes

- ``values, metadata, s = sparsify24_quantized(z, act)``
- ``sparse24_mm(values, metadata, w8, s, sw)``

Shape legend: M tokens, K reduction, N output features.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import fx

from inductor_sparse.decisions import Reason, Tier
from inductor_sparse.passes.base import (
    PassContext,
    Rule,
    close_applied,
    close_dense,
    open_decision,
    unsupported_size,
)
from inductor_sparse.passes.choice import Regime
from inductor_sparse.passes.emit import shared_items
from inductor_sparse.passes.fx_utils import (
    aten,
    input_of,
    insert_call,
    is_call,
    tensor_of,
)
from inductor_sparse.passes.gpu_obstacles import (
    data_obstacle,
    graph_obstacle,
    kernel_obstacle,
    layout_obstacle,
)
from inductor_sparse.passes.gpu_regimes import Packing, choose
from inductor_sparse.passes.packing import Packable, read_packable
from inductor_sparse.passes.producers import Producer, find_producer
from inductor_sparse.passes.quantized_operand import (
    QuantizedOperand,
    read_quantized,
    scale_obstacle,
)
from inductor_sparse.passes.regimes import ON_GPU, too_dense
from inductor_sparse.passes.sites import SITE_KEY, Rejection, Site, is_tangent_name

if TYPE_CHECKING:
    from inductor_sparse.decisions import Decision

_ops = torch.ops.inductor_sparse
_TARGET = aten._scaled_mm.default
_FP8 = torch.float8_e4m3fn


class ScaledMatmul(Rule):
    """_scaled_mm(to_fp8(relu(z)² / s), w, s, t): sparsify24_quantized, sparse24_mm."""

    name = "scaled_matmul"
    tier = Tier.APPROXIMATE
    op = "sparse24_mm"
    packs = True

    def match(self, site: Site) -> Producer | None:
        """The producer of any 8-bit product that has one."""
        return find_producer(site.lhs)

    def rewrite(self, site: Site, weight: fx.Node, context: PassContext) -> fx.Node:
        """Insert the packing and the product; ``weight`` is taken as it lies."""
        quantized = read_quantized(site.lhs)
        assert isinstance(quantized, QuantizedOperand)
        packed = (
            _packable(site)
            .behind(quantized.views)
            .emit(_ops.sparsify24_quantized.default, site.matmul, _FP8)
        )
        values, metadata, row_scale = shared_items(packed, 3, site.matmul)
        return insert_call(
            site.matmul,
            _ops.sparse24_mm.default,
            (values, metadata, weight, row_scale, _column_scale(site)),
            {"out_dtype": site.matmul.meta["val"].dtype},
        )

    def decide_all(
        self, graph: fx.Graph, context: PassContext, *, disabled: bool
    ) -> None:
        """Decide every 8-bit product on a GPU whose left operand has a producer."""
        for site in _sites(graph):
            producer = self.match(site)
            if producer is None:
                continue
            decision = open_decision(site, producer, context, self.name, self.tier)
            found = self._refusal(site, producer, decision, context, disabled)
            if found is not None:
                close_dense(decision, found, site.matmul)
                continue
            product = self.rewrite(site, site.rhs, context)
            close_applied(decision, site, product)

    def _refusal(
        self,
        site: Site,
        producer: Producer,
        decision: Decision,
        context: PassContext,
        disabled: bool,
    ) -> Rejection | None:
        if producer.reason is not None:
            return Rejection(producer.reason, producer.detail)
        if disabled:
            return Rejection(Reason.RULE_DISABLED, f"{self.name} is turned off")
        if context.option("activation_format") == "exact":
            why = 'sparse.activation_format is "exact", and there is no exact 8-bit op'
            return Rejection(Reason.NO_KERNEL_YET, why)
        found = (
            too_dense(decision, context)
            or data_obstacle(site)
            or unsupported_size(site)
            or _look_alike(site)
            or graph_obstacle(context)
            or layout_obstacle(site)
        )
        if found is not None:
            return found
        ops = ("sparsify24_quantized", "sparse24_mm")
        dtype = str(_FP8).removeprefix("torch.")
        obstacle = kernel_obstacle(ops, dtype, decision.arch, context)
        replaces, gated = _replaces_activation(site), _packable(site).up is not None
        packing = Packing(dtype, dtype, replaces, context.cuda_graphs, gated)
        choice = choose(site, decision, {Regime.PACK: obstacle}, packing, context)
        if isinstance(choice, Rejection):
            return choice
        decision.expected_gain, decision.detail = choice.expected_gain, choice.note
        return None


def _sites(graph: fx.Graph) -> list[Site]:
    """The undecided 8-bit products of the forward on GPUs, in graph order."""
    if any(is_tangent_name(n.name) for n in graph.find_nodes(op="placeholder")):
        return []
    sites = []
    for node in graph.find_nodes(op="call_function", target=_TARGET):
        value = tensor_of(node)
        if value is None or value.device.type not in ON_GPU or SITE_KEY in node.meta:
            continue
        bias = _argument(node, 4, "bias")
        sites.append(
            Site(
                node,
                input_of(node),
                input_of(node, 1),
                bias if isinstance(bias, fx.Node) else None,
            )
        )
    return sites


def _argument(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _look_alike(site: Site) -> Rejection | None:
    """Why an 8-bit product is not the one that the packed form computes, or None."""
    lhs, rhs, out = (tensor_of(n) for n in (site.lhs, site.rhs, site.matmul))
    assert lhs is not None and rhs is not None and out is not None
    if lhs.dtype != _FP8 or rhs.dtype != _FP8 or out.dtype != torch.bfloat16:
        why = f"{lhs.dtype} by {rhs.dtype} to {out.dtype}; e4m3 to bfloat16 is known"
        return Rejection(Reason.UNSUPPORTED_DTYPE, why.replace("torch.", ""))
    if _argument(site.matmul, 5, "scale_result") is not None:
        return Rejection(Reason.NO_KERNEL_YET, "the result has a scale of its own")
    quantized = read_quantized(site.lhs)
    if isinstance(quantized, str):
        return Rejection(Reason.NO_KERNEL_YET, quantized)
    return _wrong_scales(site, quantized)


def _wrong_scales(site: Site, quantized: QuantizedOperand) -> Rejection | None:
    row, column = (tensor_of(_argument(site.matmul, i, "")) for i in (2, 3))
    M, _, N = site.sizes
    if row is None or column is None or row.numel() == 1 != M:
        why = "the activation has one scale for the whole tensor; ours are per row"
        return Rejection(Reason.NO_KERNEL_YET, why)
    # By shape: there may be as many blocks as rows or columns.
    if row.numel() != M:
        return Rejection(Reason.NO_KERNEL_YET, "the activation is scaled in blocks")
    if column.numel() != 1 and column.shape[-1] != N:
        return Rejection(Reason.NO_KERNEL_YET, "the weight is scaled in blocks")
    wrong = scale_obstacle(input_of(site.matmul, 2), quantized)
    return None if wrong is None else Rejection(Reason.NO_KERNEL_YET, wrong)


def _packable(site: Site) -> Packable:
    """What is packed for a site whose operand is quantized."""
    quantized = read_quantized(site.lhs)
    assert isinstance(quantized, QuantizedOperand)
    inner = dataclasses.replace(site, lhs=quantized.h)
    return read_packable(inner, replaced=_replaces_activation(site))


def _replaces_activation(site: Site) -> bool:
    """Whether packing takes the place of all that computes the quantized operand.

    It does not if something besides 8-bit products reads the activation, its scales, or
    what it is quantized to.
    """
    quantized = read_quantized(site.lhs)
    assert isinstance(quantized, QuantizedOperand)
    operands = {site.lhs, input_of(site.matmul, 2)}
    inside, todo = {quantized.h, *operands}, list(operands)
    while todo:
        new = set(todo.pop().all_input_nodes) - inside
        inside |= new
        todo += new
    reached, todo = {quantized.h}, [quantized.h]
    while todo:
        readers = {user for user in todo.pop().users if not is_call(user, {_TARGET})}
        if not readers <= inside:
            return False
        todo += readers - reached
        reached |= readers
    return True


def _column_scale(site: Site) -> fx.Node:
    """The scale of the weight as one number per output feature, ``[N]``."""
    scale = input_of(site.matmul, 3)
    value, N = tensor_of(scale), site.sizes[2]
    assert value is not None
    flat = insert_call(site.matmul, aten.view.default, (scale, [-1]))
    if value.numel() == N:
        return flat
    return insert_call(site.matmul, aten.expand.default, (flat, [N]))


RULE = ScaledMatmul()
