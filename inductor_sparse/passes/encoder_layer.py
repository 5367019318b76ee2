"""FFNs inside the fast path of ``nn.TransformerEncoderLayer``: recorded, left dense.

In inference without masks that it does not know, the module calls one op that computes
attention and FFN, and no pass sees a matmul in it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from inductor_sparse.decisions import Reason, Tier
from inductor_sparse.passes.base import PassContext, open_decision
from inductor_sparse.passes.fx_utils import aten, input_of, is_call
from inductor_sparse.passes.producers import Family, Producer
from inductor_sparse.passes.sites import Site, forward_nodes

_USE_GELU, _W2 = 7, 16
"""Positions among the arguments of the op."""
_WHY = (
    "the fast path of nn.TransformerEncoderLayer computes it inside one op; "
    "torch.backends.mha.set_fastpath_enabled(False) before compiling turns that off"
)


@dataclasses.dataclass(frozen=True)
class _InsideOp(Site):
    """The second matmul of the FFN; ``lhs`` is the input of the layer."""

    @property
    def sizes(self) -> tuple[int | torch.SymInt, ...]:
        """``(M, K, N)``, with the tokens of one sequence."""
        tokens, weight = self.lhs.meta["val"].shape[-2], self.rhs.meta["val"]
        return tokens, weight.shape[1], weight.shape[0]


class EncoderLayer:
    """Records the FFNs with ReLU that are hidden in an op."""

    name = "sparse_encoder_layer"

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Record each of them as a site without a kernel."""
        for node in forward_nodes(graph):
            if not is_call(node, {aten._transformer_encoder_layer_fwd.default}):
                continue
            if node.args[_USE_GELU]:
                continue
            site = _InsideOp(node, input_of(node), input_of(node, _W2))
            producer = Producer(Family.PLAIN, "relu", node)
            decision = open_decision(site, producer, context, "relu_matmul", Tier.EXACT)
            # Not marked in the graph: its operand is nowhere to be measured.
            decision.reason, decision.detail = Reason.NO_KERNEL_YET, _WHY


PASS = EncoderLayer()
