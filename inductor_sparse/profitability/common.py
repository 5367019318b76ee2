"""What holds on every device.

Shape legend: M tokens (rows of the activation), K reduction, N output features.
"""

from __future__ import annotations

GLU_MAX_TOKENS = 8
"""Above this many tokens the union of active neurons is nearly all of them, so
computing the up projection for active neurons only saves nothing over a dense GEMM."""

MIN_SIZE = 2
"""A K or N of 0 or 1 is a copy or a scaling, not a matmul worth a kernel."""

TRAINING_COPY_MIN_TOKENS = 64
"""A weight copy costs about K*N reads and writes; 64 tokens do 64*K*N multiply-adds,
enough to hide it even if the optimizer changes the weight before every call."""

DTYPES = frozenset({"float32", "bfloat16", "float16"})
"""Dtypes the ops define at all, on any device."""

ASSUMED_DENSITY = 0.1
"""Fraction of non-zeros assumed for a site that no plan has measured: trained ReLU²
FFNs have 2-10 %."""


def training_copy_pays(M: int | None) -> bool:
    """Whether a row-contiguous weight copy pays in a graph that also has a backward.

    Two kinds of graph look the same here.  In a training step the weight changes every
    call, so the copy is made every call and needs many tokens to pay.  An ``eval()``
    model called without ``no_grad`` never runs its backward, keeps its weights, and
    decodes a few tokens at a time.  Between the two nothing can be told, and the site
    stays dense; so does a site whose number of tokens is unknown.
    """
    return M is not None and (M <= GLU_MAX_TOKENS or M >= TRAINING_COPY_MIN_TOKENS)
