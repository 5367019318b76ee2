"""Products that skip zeros, and the copy of a weight they read.

Shape legend: as in :mod:`inductor_sparse.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inductor_sparse.reference.domain import (
    ACTIVATIONS,
    accumulation_dtype,
    check_activation_spmm,
    check_glu_spmm,
    check_shape,
    check_sparse24_mm,
    check_window,
    result_dtype24,
)


def _skipping_matmul(a: Tensor, w: Tensor) -> Tensor:
    """``a @ w`` over the non-zeros of ``a``, in the accumulation dtype.

    A zero that met an Inf or NaN always shows as a NaN of the dense product, so only
    rows that hold one are summed again, over their non-zeros alone.
    """
    wide = accumulation_dtype(a.dtype)
    a, w = a.to(wide), w.to(wide)
    y = a @ w
    for *batch, row in y.isnan().any(-1).nonzero().tolist():
        a_K, w_KN = a[(*batch, row)], w[tuple(batch)]
        active = a_K != 0
        y[(*batch, row)] = a_K[active] @ w_KN[active]
    return y


def activation_spmm(
    z: Tensor, w: Tensor, activation: str, w_scale: Tensor | None = None
) -> Tensor:
    """``act(z) @ w``, skipping the zeros of ``act(z)``.

    With ``w_scale`` the rows of ``w`` are stored in 8 bits, and the product is that
    with ``w * w_scale[:, None]``, in the accumulation dtype of ``z``.

    Args:
        z: ``[M, K]`` or ``[B, M, K]``, one of :data:`DTYPES`, any strides.
        w: ``[K, N]`` or ``[B, K, N]``, same dtype, any strides; with ``w_scale``
            ``[K, N]``, int8 or float8_e4m3fn.
        activation: a key of :data:`ACTIVATIONS`.
        w_scale: ``[K]``, float32, or None: the scale of each row of ``w``, as from
            :func:`quantize_rows`.

    Returns:
        ``[M, N]`` or ``[B, M, N]``, contiguous, ``z.dtype``.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, the activation is unknown, or a
            scale is missing or superfluous.

    Example:
        >>> w = torch.tensor([[float("inf")], [2.0]])
        >>> activation_spmm(torch.tensor([[-1.0, 3.0]]), w, "relu2")
        tensor([[18.]])
    """
    check_activation_spmm(z, w, activation, w_scale)
    a = ACTIVATIONS[activation](z)
    if w_scale is not None:
        wide = accumulation_dtype(z.dtype)
        a, w = a.to(wide), w.to(wide) * w_scale.to(wide)[:, None]
    return _skipping_matmul(a, w).to(z.dtype).contiguous()


def glu_spmm(
    gate: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, activation: str
) -> Tensor:
    """``(act(gate) * (x @ w_upᵀ)) @ w_down`` over the neurons whose gate is open.

    ``x @ w_upᵀ`` is defined only where ``act(gate)`` is not zero: whatever ``w_up``
    holds in the row of a closed neuron is ignored.  A hidden value that becomes zero
    for another reason is skipped in the second product as well.

    Args:
        gate: ``[M, F]``, before the activation, one of :data:`DTYPES`, any strides.
        x: ``[M, D]``, same dtype, any strides.
        w_up: ``[F, D]``, same dtype, any strides.
        w_down: ``[F, N]``, same dtype, any strides.
        activation: a key of :data:`ACTIVATIONS`.

    Returns:
        ``[M, N]``, contiguous, ``gate.dtype``.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, or the activation is unknown.
    """
    check_glu_spmm(gate, x, w_up, w_down, activation)
    wide = accumulation_dtype(gate.dtype)
    a_MF = ACTIVATIONS[activation](gate)
    up_MF = (x.to(wide) @ w_up.to(wide).mT).to(gate.dtype)
    hidden_MF = torch.where(a_MF == 0, torch.zeros_like(a_MF), a_MF * up_MF)
    return _skipping_matmul(hidden_MF, w_down).to(gate.dtype).contiguous()


def row_major_weight(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """A contiguous copy, in ``dtype``, of a strided window into ``weight``.

    The window is ``weight.as_strided(size, stride)`` moved by ``storage_offset``
    elements from the first element of ``weight``.

    Args:
        weight: any shape, strides and dtype.
        size: shape of the window and of the result.
        stride: strides of the window, in elements of ``weight``.
        storage_offset: elements from the first element of ``weight``.
        dtype: dtype of the result.

    Returns:
        A new contiguous tensor of ``size`` and ``dtype``, never an alias of ``weight``.

    Raises:
        SparseShapeError: ``size`` and ``stride`` differ in length, or the window leaves
            the memory between the first and the last element of ``weight``.

    Example:
        >>> weight = torch.arange(6).view(2, 3)
        >>> row_major_weight(weight, [3, 2], [1, 3], 0, torch.float32)
        tensor([[0., 3.],
                [1., 4.],
                [2., 5.]])
    """
    check_window(weight, size, stride, storage_offset)
    window = weight.as_strided(size, stride, weight.storage_offset() + storage_offset)
    return window.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _integer_matmul(a: Tensor, w: Tensor) -> Tensor:
    """The sums of an int8 product, exact, rounded once to float32.

    float64 holds every sum of fewer than 2**38 products exactly, on every device.
    """
    return (a.double() @ w.double()).float()


def sparse24_mm(
    x24: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``row_scale * (x24 @ w) * col_scale``, ``x24`` being the unpacked 2:4 operand.

    Scales are applied in the accumulation dtype (float32 for 8-bit operands; int8
    products are first summed exactly), before the one rounding.  Where ``w`` holds Inf
    or NaN under a *stored* zero the result of a kernel is not specified: tensor cores
    multiply what is stored; this function skips it.

    Args:
        x24: ``[M, K]`` (see :func:`inductor_sparse.formats.unpack`), one of DTYPES,
            float8_e4m3fn or int8.
        w: ``[K, N]``, same dtype, any strides.
        row_scale: ``[M]`` in any of :data:`DTYPES`, or None.
        col_scale: ``[N]`` in any of :data:`DTYPES`, or None.
        out_dtype: dtype of the result, one of DTYPES; None stands for that of ``x24``,
            or bfloat16 if it has 8 bits.

    Returns:
        ``[M, N]``, contiguous.

    Raises:
        SparseShapeError: shapes or dtypes do not fit.
    """
    check_sparse24_mm(x24, w, row_scale, col_scale, out_dtype)
    check_shape("sparse24_mm", "w", w, x24.shape[1], "N")
    matmul = _integer_matmul if x24.dtype == torch.int8 else _skipping_matmul
    y_MN = matmul(x24, w)
    if row_scale is not None:
        y_MN = y_MN * row_scale.to(y_MN.dtype)[:, None]
    if col_scale is not None:
        y_MN = y_MN * col_scale.to(y_MN.dtype)
    return y_MN.to(result_dtype24(x24.dtype, out_dtype)).contiguous()
