"""The ops of the 2:4 format: schemas, eager definitions, fakes.

:mod:`inductor_sparse.ops` registers them.

Shape legend: as in :mod:`inductor_sparse.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_sparse import formats, reference
from inductor_sparse.errors import SparseShapeError

SCHEMAS: dict[str, str] = {
    "sparsify24": (
        "(Tensor x, str activation, str select, Tensor? energy=None, "
        "Tensor? up=None) -> (Tensor, Tensor)"
    ),
    "sparsify24_quantized": (
        "(Tensor x, str activation, str select, ScalarType dtype, "
        "Tensor? energy=None, Tensor? up=None) -> (Tensor, Tensor, Tensor)"
    ),
    "linear_sparsify24": (
        "(Tensor x, Tensor w1, Tensor? bias, str activation, str select, "
        "Tensor? energy=None) -> (Tensor, Tensor)"
    ),
    "linear_sparsify24_quantized": (
        "(Tensor x, Tensor x_scale, Tensor w1, Tensor w1_scale, Tensor? bias, "
        "Tensor row_scale, str activation, str select, Tensor? energy=None) "
        "-> (Tensor, Tensor)"
    ),
    "sparse24_mm": (
        "(Tensor values, Tensor metadata, Tensor w, Tensor? row_scale=None, "
        "Tensor? col_scale=None, *, ScalarType? out_dtype=None) -> Tensor"
    ),
}
"""The schema of each op, without its name."""

ENERGY = ("kept", "total")
"""What a kernel that selects 2:4 sums of its site, in float64: the squares of the kept
and of all activated values.  Their ratio is the share of the energy that survives."""

ENERGY_SLOTS = 256
"""Rows of a tensor of energies.  Program ``i`` of a kernel adds to row ``i %`` this
number, so that its atomics rarely meet; the sum over the rows is what counts.  Of a
large matrix a kernel may take a fixed part of the tiles for both sums."""


def check_energy(op: str, energy: Tensor | None) -> None:
    """Raise :class:`SparseShapeError` unless it is None or fit to be added to."""
    if energy is None:
        return
    reference.check_shape(op, "energy", energy, ENERGY_SLOTS, len(ENERGY))
    remedy = "take it from torch.ops.inductor_sparse.site_energy"
    if energy.dtype != torch.float64:
        raise SparseShapeError(
            f"{op}: energy is {energy.dtype}, expected torch.float64; {remedy}"
        )
    if not energy.is_contiguous():  # kernels add at 2 * slot, whatever the strides
        raise SparseShapeError(
            f"{op}: energy has strides {tuple(energy.stride())}, expected a "
            f"contiguous tensor; {remedy}"
        )


def sparsify24(
    x: Tensor,
    activation: str,
    select: str,
    energy: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Select two of every four values of ``act(x)``, or ``act(x) * up``; pack them.

    The selection is that of :func:`inductor_sparse.reference.sparsify24`, the result
    the ``(values, metadata)`` of :mod:`inductor_sparse.formats`.

    Args:
        x: as there.
        activation: as there.
        select: as there.
        energy: from ``site_energy``: a kernel for a device adds to it, the eager
            definition sums nothing.
        up: as there.

    Raises:
        SparseShapeError: not 2-D, dtype not supported, or an unknown name.
    """
    check_energy("sparsify24", energy)
    values, index = reference.sparsify24(x, activation, select, up)
    return values, formats.pack_index(index, x.dtype)


def sparsify24_quantized(
    x: Tensor,
    activation: str,
    select: str,
    dtype: torch.dtype,
    energy: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select two of every four values of ``act(x)``, quantize them by rows, and pack.

    See :func:`inductor_sparse.reference.sparsify24_quantized` for the meaning, and
    :func:`sparsify24` for ``energy`` and ``up``.

    Returns:
        ``(values [M, S] of dtype, metadata, row_scale [M] float32)``.

    Raises:
        SparseShapeError: not 2-D, dtype not supported, or an unknown name.
    """
    check_energy("sparsify24_quantized", energy)
    values, index, row_scale = reference.sparsify24_quantized(
        x, activation, select, dtype, up
    )
    return values, formats.pack_index(index, dtype), row_scale


def linear_sparsify24(
    x: Tensor,
    w1: Tensor,
    bias: Tensor | None,
    activation: str,
    select: str,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``sparsify24(linear(x, w1, bias), activation, select)``, by definition.

    The linear layer is rounded to its dtype before the activation.  Its rounding
    differs between kernels, and where that makes or breaks a tie so does the selection.

    Args:
        x: ``[M, D]``, one of DTYPES, any strides.
        w1: ``[K, D]``, same dtype, any strides.
        bias: ``[K]``, same dtype, or None.
        activation: as for :func:`sparsify24`.
        select: as for :func:`sparsify24`.
        energy: as for :func:`sparsify24`.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, or an unknown name.
    """
    reference.check_linear_sparsify24(x, w1, bias, activation, select)
    z_MK = torch.nn.functional.linear(x, w1, bias)
    # Through the dispatcher: a device may have a kernel for this half alone.
    op = torch.ops.inductor_sparse.sparsify24
    return op(z_MK, activation, select, energy)


def linear_sparsify24_quantized(
    x: Tensor,
    x_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    activation: str,
    select: str,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear layer of 8-bit operands, selected and packed in 8 bits.

    See :func:`inductor_sparse.reference.linear_sparsify24_quantized` for the meaning,
    :func:`sparsify24` for ``energy``; as in :func:`linear_sparsify24`, the rounding of
    the layer differs between kernels.

    Returns:
        ``(values [M, S] in e4m3, metadata)``, to be multiplied by ``row_scale``.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, or an unknown name.
    """
    check_energy("linear_sparsify24_quantized", energy)
    values, index = reference.linear_sparsify24_quantized(
        x, x_scale, w1, w1_scale, bias, row_scale, activation, select
    )
    return values, formats.pack_index(index, x.dtype)


def sparse24_mm(
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply a packed 2:4 operand by ``w [K, N]``; ``K`` is taken from ``w``.

    See :func:`inductor_sparse.reference.sparse24_mm` for the meaning and the scales.

    Raises:
        SparseShapeError: shapes or dtypes do not fit.
    """
    reference.check_sparse24_mm(values, w, row_scale, col_scale, out_dtype)
    dense = formats.unpack(values, metadata, w.shape[0])
    return reference.sparse24_mm(dense, w, row_scale, col_scale, out_dtype=out_dtype)


def _new_packed(
    x: Tensor, rows: int, features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Uninitialized ``(values, metadata)`` on the device of ``x``."""
    values = x.new_empty(formats.values_shape(rows, features), dtype=dtype)
    metadata = x.new_empty(formats.metadata_shape(rows, features), dtype=torch.int32)
    return values, metadata


def _fake_sparsify24(
    x: Tensor,
    activation: str,
    select: str,
    energy: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_energy("sparsify24", energy)
    reference.check_sparsify24(x, activation, select, up)
    rows, features = x.shape
    return _new_packed(x, rows, features, x.dtype)


def _fake_sparsify24_quantized(
    x: Tensor,
    activation: str,
    select: str,
    dtype: torch.dtype,
    energy: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_energy("sparsify24_quantized", energy)
    reference.check_sparsify24_quantized(x, activation, select, dtype, up)
    rows, features = x.shape
    row_scale = x.new_empty(rows, dtype=torch.float32)
    return *_new_packed(x, rows, features, dtype), row_scale


def _fake_linear_sparsify24(
    x: Tensor,
    w1: Tensor,
    bias: Tensor | None,
    activation: str,
    select: str,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_energy("linear_sparsify24", energy)
    reference.check_linear_sparsify24(x, w1, bias, activation, select)
    return _new_packed(x, x.shape[0], w1.shape[0], x.dtype)


def _fake_linear_sparsify24_quantized(
    x: Tensor,
    x_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    activation: str,
    select: str,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_energy("linear_sparsify24_quantized", energy)
    reference.check_linear_sparsify24_quantized(
        x, x_scale, w1, w1_scale, bias, row_scale, activation, select
    )
    return _new_packed(x, x.shape[0], w1.shape[0], x.dtype)


def _fake_sparse24_mm(
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    reference.check_sparse24_mm(values, w, row_scale, col_scale, out_dtype)
    formats.check_packed(values, metadata, w.shape[0])
    dtype = reference.result_dtype24(values.dtype, out_dtype)
    return values.new_empty((values.shape[0], w.shape[1]), dtype=dtype)


OPS = (
    (sparsify24, _fake_sparsify24),
    (sparsify24_quantized, _fake_sparsify24_quantized),
    (linear_sparsify24, _fake_linear_sparsify24),
    (linear_sparsify24_quantized, _fake_linear_sparsify24_quantized),
    (sparse24_mm, _fake_sparse24_mm),
)
"""Each op, under the name it is registered by, with its fake."""
