"""ReLU feeding a matmul: rows of the weight that meet a zero are skipped.

- ``mm(relu(z), w) -> activation_spmm(z, w, "relu")``
- ``mm(chain(relu(z)), w) -> activation_spmm(chain(relu(z)), w, "identity")`` for a
  chain of casts, scales, dropout or a bias-free RMSNorm
"""

from __future__ import annotations

from inductor_sparse.passes.base import FamilyRule
from inductor_sparse.passes.producers import Family


class ReluMatmul(FamilyRule):
    """mm(relu(z), w) skips the rows of w that meet a zero: activation_spmm."""

    family = Family.PLAIN
    name = family.value
    packs = True


RULE = ReluMatmul()
