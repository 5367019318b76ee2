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
    check_linear_sparsify24_quantized,
    check_quantize_rows,
    check_sparsify24_quantized,
)
from inductor_sparse.reference.selection import activated, select_groups

SMALLEST_AMAX = 2.0**-118
"""Rows below are scaled as if it were their amax: the inverse would be infinite."""

SMALLEST_SCALE = 2.0**-118
"""Of those that are predicted; a subnormal one might be taken for 0 somewhere."""


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
    x: Tensor,
    activation: str,
    select: str,
    dtype: torch.dtype,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep two of every four values of ``act(x)``, then quantize what is kept.

    The selection is that of :func:`sparsify24` on the activation rounded to
    ``x.dtype``; a row's scale is taken from all of ``act(x)``, kept or not.

    Args:
        x: ``[M, K]``, one of DTYPES, any strides.
        activation: a key of ACTIVATIONS.
        select: one of SELECTS.
        dtype: ``torch.float8_e4m3fn`` or ``torch.int8``.
        up: as for :func:`sparsify24`.

    Returns:
        ``(values [M, S] of dtype, index [M, S] uint8, row_scale [M] float32)``, as
        described there; ``values * row_scale`` approximates the kept values.

    Raises:
        SparseShapeError: not 2-D, a dtype that is not supported, or an unknown name.
    """
    check_sparsify24_quantized(x, activation, select, dtype, up)
    a_MK = activated(x, activation, up)
    values_MS, index_MS = select_groups(a_MK, select)
    scale_M, inverse_M = row_scales(a_MK, dtype)
    return quantize(values_MS, inverse_M[:, None], dtype), index_MS, scale_M


def predicted_scale(
    x: Tensor,
    x_scale: Tensor,
    largest_norm: Tensor,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """A scale for each row of ``act(linear(x))``, from norms alone.

    By the inequality of Cauchy and Schwarz no sum exceeds the norm of the row of ``x``
    times the largest norm of a row of the weight.  The scale maps that bound to the
    largest number of e4m3: what comes out lies below it, by a factor that the exponent
    of e4m3 has room for.  What rounding adds is less than half a step up there.

    A row that holds NaN or Inf has the scale NaN or Inf, and so has every row if the
    weight does, or a row whose bound overflows.  No scale is below
    :data:`SMALLEST_SCALE`.

    Args:
        x: ``[M, D]`` in e4m3.
        x_scale: ``[M]`` float32, of ``x``.
        largest_norm: scalar, float32, from :func:`quantized_weight`.
        bias: ``[K]``, or None.
        activation: ``relu`` or ``relu2``.

    Returns:
        ``[M]`` float32.
    """
    bound_M = x.float().square().sum(dim=1).sqrt() * x_scale * largest_norm
    if bias is not None:
        # Below zero a bias only lowers the bound: ReLU leaves nothing there.
        bound_M = (bound_M + bias.float().amax()).clamp(min=0.0)
    if activation == "relu2":
        bound_M = bound_M.square()
    limit = QUANTIZED_LIMITS[torch.float8_e4m3fn]
    return (bound_M / limit).clamp(min=SMALLEST_SCALE)


def scaled_linear(
    x: Tensor, x_scale: Tensor, w1: Tensor, w1_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """``(x @ w1.T) * x_scale[:, None] * w1_scale + bias``, rounded to bfloat16."""
    z_MK = (x.float() @ w1.float().t()) * x_scale[:, None] * w1_scale
    return (z_MK if bias is None else z_MK + bias.float()).bfloat16()


def linear_sparsify24_quantized(
    x: Tensor,
    x_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    activation: str,
    select: str,
) -> tuple[Tensor, Tensor]:
    """Keep two of every four values of ``act`` of an 8-bit linear layer, in 8 bits.

    The layer is :func:`scaled_linear`; activation and selection are those of
    :func:`sparsify24` on it; what is kept is multiplied by ``1 / row_scale``, rounded
    to e4m3 and saturated.

    Args:
        x: ``[M, D]`` in e4m3, any strides.
        x_scale: ``[M]`` float32.
        w1: ``[K, D]`` in e4m3, any strides.
        w1_scale: ``[K]`` float32.
        bias: ``[K]`` bfloat16, or None.
        row_scale: ``[M]`` float32, e.g. from :func:`predicted_scale`.
        activation: a key of ACTIVATIONS.
        select: one of SELECTS.

    Returns:
        ``(values [M, S] in e4m3, index [M, S] uint8)``, as of :func:`sparsify24`.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, or an unknown name.
    """
    check_linear_sparsify24_quantized(
        x, x_scale, w1, w1_scale, bias, row_scale, activation, select
    )
    a_MK = ACTIVATIONS[activation](scaled_linear(x, x_scale, w1, w1_scale, bias))
    values_MS, index_MS = select_groups(a_MK, select)
    inverse_M1 = (torch.ones_like(row_scale) / row_scale)[:, None]
    return quantize(values_MS, inverse_M1, x.dtype), index_MS
