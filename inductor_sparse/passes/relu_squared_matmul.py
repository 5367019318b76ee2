"""ReLU² feeding a matmul: rows of the weight that meet a zero are skipped.

- ``mm(relu(z) ** 2, w) -> activation_spmm(z, w, "relu2")``
- ``mm(chain(relu(z) ** 2), w) -> activation_spmm(chain(relu(z) ** 2), w, "identity")``
  for a chain of casts, scales, dropout or a bias-free RMSNorm
"""

from __future__ import annotations

from inductor_sparse.passes.base import FamilyRule
from inductor_sparse.passes.producers import Family


class ReluSquaredMatmul(FamilyRule):
    """mm(relu(z)², w) skips the rows of w that meet a zero: activation_spmm."""

    family = Family.SQUARED
    name = family.value
    packs = True


RULE = ReluSquaredMatmul()
