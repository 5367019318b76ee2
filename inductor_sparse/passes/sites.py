"""The matmuls of a graph, read into one shape whichever aten op spells them.

Shape legend: M tokens, K reduction, N output features; a batch B for ``bmm``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import fx

from inductor_sparse.decisions import Reason
from inductor_sparse.passes.fx_utils import aten, input_of, is_call, tensor_of
from inductor_sparse.passes.producers import Producer, find_producer

MATMULS = frozenset(
    {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
)
_WITH_BIAS = frozenset({aten.addmm.default, aten.baddbmm.default})

SITE_KEY = "inductor_sparse_site"
"""``node.meta`` key naming the site a node computes; see ``Decision.site``."""

OPERAND_KEY = "inductor_sparse_operand"
"""``node.meta`` key of a dense site that is not spelled ``a @ w``: the name of the node
``a``, and whether its matrices are transposed."""


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Why a site stays dense: a stable reason and a sentence for the reader."""

    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True)
class Site:
    """One matmul ``beta * bias + alpha * (lhs @ rhs)``; ``bias`` may be None."""

    matmul: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    bias: fx.Node | None = None
    beta: object = 1
    alpha: object = 1

    @cached_property
    def producer(self) -> Producer | None:
        """The activation that feeds ``lhs``, if there is one."""
        return find_producer(self.lhs)

    @property
    def sizes(self) -> tuple[int | torch.SymInt, ...]:
        """``(M, K, N)``; a batched matmul has the M of one matrix."""
        lhs, rhs = tensor_of(self.lhs), tensor_of(self.rhs)
        assert lhs is not None and rhs is not None
        return lhs.shape[-2], lhs.shape[-1], rhs.shape[-1]

    @property
    def dtype(self) -> str:
        """The dtype of the product, as in ``"bfloat16"``."""
        return str(self.matmul.meta["val"].dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """The device type, as in ``"cpu"``."""
        return str(self.matmul.meta["val"].device.type)


def read_site(node: fx.Node) -> Site | None:
    """The site a matmul node is, or None for any other node."""
    if not is_call(node, MATMULS) or tensor_of(node) is None:
        return None
    first = 1 if node.target in _WITH_BIAS else 0
    lhs, rhs = input_of(node, first), input_of(node, first + 1)
    if tensor_of(lhs) is None or tensor_of(rhs) is None:
        return None
    bias = input_of(node) if first else None
    scales = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    return Site(node, lhs, rhs, bias, *scales)


def forward_sites(graph: fx.Graph) -> Iterator[Site]:
    """The matmuls of the forward that no rule has decided yet, in graph order.

    Each is read when its turn comes: what was done for one of them may have given the
    next another operand.
    """
    for node in forward_nodes(graph):
        site = None if SITE_KEY in node.meta else read_site(node)
        if site is not None:
            yield site


def forward_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of the forward, in graph order.

    In a joint graph the backward is what depends on a tangent; it stays as traced.
    """
    backward: set[fx.Node] = set()
    forward = []
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and is_tangent_name(node.name)
        if is_tangent or any(source in backward for source in node.all_input_nodes):
            backward.add(node)
        else:
            forward.append(node)
    return forward


def is_tangent_name(name: str) -> bool:
    """Whether AOTAutograd gives this name to the gradient of an output."""
    return name.startswith("tangents_")
