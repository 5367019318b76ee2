"""Symmetric quantization by rows to 8 bits, of dense and of 2:4 selected values.

A row is scaled so that its largest magnitude becomes the largest number of the dtype.
Every step is one correctly rounded float32 operation, so that a kernel on any device
gives the same bits:

    inverse = limit / amax;  stored = round(value * inverse);  scale = amax / limit

``round`` is to nearest, ties to even, and saturates.  A row of zeros has scale 1.  A
row that holds NaN or Inf has the scale NaN or Inf, so that every result computed from
it is NaN; in e4m3 the NaN itself is stored as NaN, int8 stores 0 for it.

Shape legend: as in :mod:`inductor_sparse.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_sparse.reference.domain import (
    ACTIVATIONS,
    QUANTIZED_LIMITS,
    check_quantize_rows,
    check_sparsify24_quantized,
)
from inductor_sparse.reference.selection import select_groups

SMALLEST_AMAX = 2.0**-118
"""Rows below are scaled as if it were their amax: the inverse would be infinite."""


def row_scales(a_MK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(scale [M], inverse [M])`` in float32 of the rows of a floating tensor."""
    limit = QUANTIZED_LIMITS[dtype]
    wide_MK = torch.nn.functional.pad(a_MK.float().abs(), (0, 1))  # K may be 0
    amax_M = wide_MK.amax(dim=1)
    clamped_M = amax_M.clamp(min=SMALLEST_AMAX)
    limits_M = torch.full_like(amax_M, limit)
    one_M = torch.ones_like(amax_M)
    zero_M = amax_M == 0
    scale_M = torch.where(zero_M, one_M, clamped_M / limits_M)
    return scale_M, torch.where(zero_M, one_M, limits_M / clamped_M)


def quantize(values: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """``values * inverse`` rounded to nearest even and saturated; see the module."""
    limit = QUANTIZED_LIMITS[dtype]
    scaled = (values.float() * inverse).clamp(-limit, limit)
    if dtype == torch.int8:
        return torch.nan_to_num(scaled, nan=0.0).round().to(dtype)
    # -0.0 is a zero: a negative value that is rounded away is stored as +0.0.
    stored = scaled.to(dtype).float()
    return torch.where(stored == 0, torch.zeros_like(stored), stored).to(dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize the rows of a dense matrix: ``x ≈ values * scale[:, None]``.

    Args:
        x: ``[M, K]``, one of DTYPES, any strides.
        dtype: ``torch.float8_e4m3fn`` or ``torch.int8``.

    Returns:
        ``values [M, K]`` of ``dtype``, contiguous, and ``scale [M]`` float32.

    Raises:
        SparseShapeError: not 2-D, or a dtype that is not supported.

    Example:
        >>> quantize_rows(torch.tensor([[127.0, -63.5, 1.5]]), torch.int8)
        (tensor([[127, -64,   2]], dtype=torch.int8), tensor([1.]))
    """
    check_quantize_rows(x, dtype)
    scale_M, inverse_M = row_scales(x, dtype)
    return quantize(x, inverse_M[:, None], dtype).contiguous(), scale_M


def sparsify24_quantized(
    x: Tensor, activation: str, select: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep two of every four values of ``act(x)``, then quantize what is kept.

    The selection is that of :func:`sparsify24` on the activation rounded to
    ``x.dtype``; a row's scale is taken from all of ``act(x)``, kept or not.

    Args:
        x: ``[M, K]``, one of DTYPES, any strides.
        activation: a key of ACTIVATIONS.
        select: one of SELECTS.
        dtype: ``torch.float8_e4m3fn`` or ``torch.int8``.

    Returns:
        ``(values [M, S] of dtype, index [M, S] uint8, row_scale [M] float32)``, as
        described there; ``values * row_scale`` approximates the kept values.

    Raises:
        SparseShapeError: not 2-D, a dtype that is not supported, or an unknown name.
    """
    check_sparsify24_quantized(x, activation, select, dtype)
    a_MK = ACTIVATIONS[activation](x)
    values_MS, index_MS = select_groups(a_MK, select)
    scale_M, inverse_M = row_scales(a_MK, dtype)
    return quantize(values_MS, inverse_M[:, None], dtype), index_MS, scale_M
