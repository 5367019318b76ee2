"""When a rewrite is expected to win: every threshold and cost model lives here.

- :mod:`~inductor_sparse.profitability.kernels`: which op runs where, by whose kernel,
  and whether that was ever tried
- :mod:`~inductor_sparse.profitability.common`: what holds on every device
- :mod:`~inductor_sparse.profitability.cpu`: skipping zeros on a CPU
- :mod:`~inductor_sparse.profitability.cuda`: skipping zeros for a few tokens and the
  2:4 format for many on a GPU

Shape legend: M tokens (rows of the activation), K reduction, N output features.
"""

from __future__ import annotations

from inductor_sparse.profitability import cuda
from inductor_sparse.profitability.common import (
    ASSUMED_DENSITY,
    DTYPES,
    GLU_MAX_TOKENS,
    MIN_SIZE,
    TRAINING_COPY_MIN_TOKENS,
    training_copy_pays,
)
from inductor_sparse.profitability.cpu import (
    ALWAYS_WINS_TOKENS,
    FEW_TOKENS,
    break_even_density,
    dense_call_density,
    expected_gain,
    glu_pays,
    glu_reads,
    stream_reads,
)
from inductor_sparse.profitability.kernels import (
    KERNELS,
    ROUTES,
    UNVERIFIED_KERNELS,
    architecture,
    has_kernel,
    knows,
)

__all__ = [
    "ALWAYS_WINS_TOKENS",
    "ASSUMED_DENSITY",
    "DTYPES",
    "FEW_TOKENS",
    "GLU_MAX_TOKENS",
    "KERNELS",
    "MIN_SIZE",
    "ROUTES",
    "TRAINING_COPY_MIN_TOKENS",
    "UNVERIFIED_KERNELS",
    "architecture",
    "break_even_density",
    "cuda",
    "dense_call_density",
    "expected_gain",
    "glu_pays",
    "glu_reads",
    "has_kernel",
    "knows",
    "stream_reads",
    "training_copy_pays",
]
