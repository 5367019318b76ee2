"""A threshold on magnitudes feeding a matmul, of either sign, gated or not.

- ``mm(where(|x| > t, x, 0), w) -> activation_spmm(where(...), w, "identity")``
- ``mm(where(|g| > t, g, 0) * mm(x, w_up.T), w) -> glu_spmm(where(...), x, w_up, w,
  "identity")`` for a few tokens

as training-free sparsity has them: TEAL (Liu et al., 2024), CATS (Lee et al., 2024).
Such thresholds are chosen to zero about a half, of which 2:4 would drop too much: these
sites are never packed.
"""

from __future__ import annotations

from torch import fx

from inductor_sparse.passes.base import PassContext, Rule
from inductor_sparse.passes.emit import emit_activation_spmm
from inductor_sparse.passes.gated_matmul import emit_glu_spmm, gated_forms
from inductor_sparse.passes.producers import Family, Producer
from inductor_sparse.passes.sites import Site


class MagnitudeMatmul(Rule):
    """mm(where(|x| > t, x, 0), w) skips rows of w that meet a zero, also as a gate."""

    name = "magnitude_matmul"

    def match(self, site: Site) -> Producer | None:
        """The producer if it is a threshold on magnitudes."""
        producer = site.producer
        is_mine = producer is not None and producer.family is Family.MAGNITUDE
        return producer if is_mine else None

    def forms(self, site: Site, context: PassContext) -> tuple[str, ...]:
        """``activation_spmm``, and ``glu_spmm`` where all of its parts are at hand."""
        return gated_forms(self.op, site, context)

    def rewrite(self, site: Site, weight: fx.Node, context: PassContext) -> fx.Node:
        """Insert ``activation_spmm``."""
        return emit_activation_spmm(site, weight)

    def rewrite_as(
        self, op: str, site: Site, weight: fx.Node, context: PassContext
    ) -> fx.Node:
        """Insert ``glu_spmm``, or :meth:`rewrite`."""
        if op != "glu_spmm":
            return self.rewrite(site, weight, context)
        return emit_glu_spmm(site, weight, context)


RULE = MagnitudeMatmul()
