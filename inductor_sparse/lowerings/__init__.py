"""Lowerings: one file per op, from the op to Inductor IR by device."""

from __future__ import annotations

# First: the modules of Inductor's C++ templates import one another in a circle that
# only closes when it is entered here.
import torch._inductor.lowering  # noqa: F401

from inductor_sparse.lowerings import (
    activation_spmm,
    glu_spmm,
    kept_tensors,
    linear_sparsify24,
    quantize_rows,
    sparse24_mm,
    sparsify24,
)


def register_all() -> None:
    """Register every lowering with Inductor; calling it again changes nothing."""
    for lowering in (
        activation_spmm,
        glu_spmm,
        kept_tensors,
        linear_sparsify24,
        quantize_rows,
        sparse24_mm,
        sparsify24,
    ):
        lowering.register()
