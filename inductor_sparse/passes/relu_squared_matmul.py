"""ReLU² feeding a matmul: rows of the weight that meet a zero are skipped.

- ``mm(relu(z) ** 2, w) -> activation_spmm(z, w, "relu2")``
- ``mm(chain(relu(z) ** 2), w) -> activation_spmm(chain(relu(z) ** 2), w, "identity")``
  for a chain of casts, scales, dropout or a bias-free RMSNorm
"""

from __future__ import annotations

from torch import fx

from inductor_sparse.passes.base import PassContext, Rule
from inductor_sparse.passes.emit import emit_activation_spmm
from inductor_sparse.passes.producers import Family, Producer
from inductor_sparse.passes.sites import Site


class ReluSquaredMatmul(Rule):
    """mm(relu(z)², w) skips the rows of w that meet a zero: activation_spmm."""

    name = "relu_squared_matmul"
    packs = True

    def match(self, site: Site) -> Producer | None:
        """The producer if it squares something (or raises it to another power)."""
        producer = site.producer
        is_mine = producer is not None and producer.family is Family.SQUARED
        return producer if is_mine else None

    def rewrite(self, site: Site, weight: fx.Node, context: PassContext) -> fx.Node:
        """Insert ``activation_spmm``."""
        return emit_activation_spmm(site, weight)


RULE = ReluSquaredMatmul()
