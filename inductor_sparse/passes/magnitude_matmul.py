"""A threshold on magnitudes feeding a matmul, of either sign, gated or not.

- ``mm(where(|x| > t, x, 0), w) -> activation_spmm(where(...), w, "identity")``
- ``mm(where(|g| > t, g, 0) * mm(x, w_up.T), w) -> glu_spmm(where(...), x, w_up, w,
  "identity")`` for a few tokens

as training-free sparsity has them: TEAL (Liu et al., 2024), CATS (Lee et al., 2024).
Such thresholds are chosen to zero about a half, of which 2:4 would drop too much: these
sites are never packed.
"""

from __future__ import annotations

from inductor_sparse.passes.gated_matmul import GatedMatmul
from inductor_sparse.passes.producers import Family


class MagnitudeMatmul(GatedMatmul):
    """mm(where(|x| > t, x, 0), w) skips rows of w that meet a zero, also as a gate."""

    family = Family.MAGNITUDE
    name = family.value
    packs = False


RULE = MagnitudeMatmul()
