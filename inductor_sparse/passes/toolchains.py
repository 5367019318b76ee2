"""What the kernels of an op need besides torch, and what of that is missing here."""

from __future__ import annotations

import torch

from inductor_sparse.profitability import ROUTES
from inductor_sparse.runtime import nvrtc, triton_text


def missing_package(op: str, arch: str) -> str:
    """What the kernel of ``op`` for ``arch`` lacks; empty if nothing.

    A CPU needs a C++ compiler: torch itself says so if there is none.
    """
    if arch == "cpu":
        return ""
    if op in ("sparse24_mm", "linear_sparsify24_quantized"):
        return _missing_for_products(ROUTES.get(arch, ""))
    return (
        "" if triton_text.available() else "triton is missing; run: pip install triton"
    )


def _missing_for_products(route: str) -> str:
    if route == "own":
        return nvrtc.unavailable_reason() or ""
    if route == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "torch has no cuSPARSELt; its official builds for GPUs do"
    return ""
