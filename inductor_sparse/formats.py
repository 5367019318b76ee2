"""The 2:4 format: two values of every four, and metadata words in fragment order.

A 2:4 operand ``[M, K]`` is stored as

- ``values [M, S]``, ``S = 32 * ceil(K / 64)``, row-major: entries ``2g`` and ``2g + 1``
  of a row are the kept values of its group ``g``; K is padded with zeros to a multiple
  of 64;
- ``metadata [ceil(M / 64), ceil(K / 64), 128]`` int32, each the bits of a u32: one word
  for each of the 128 threads of a warpgroup and each block of 64 rows and 64 columns.
  A thread loads its word with one coalesced read and gives it to ``wgmma.sp`` or
  ``mma.sp`` as it is; 512 bytes cover a block.

A group is a nibble ``i0 | i1 << 2`` with ``i0 < i1`` always: the hardware leaves any
other nibble undefined, so padded rows hold the pair (0, 1).  Group ``j`` of a word is
in bits ``4j..4j+3``.  For thread ``t``, with ``w = t / 32``, ``r = t % 32 / 4`` and
``q = t % 4``, the word holds

- values of 16 bits or more: columns ``16q..16q+15``, of row ``16w + r`` in the low half
  and of row ``16w + r + 8`` in the high half;
- values of 8 bits: columns ``32 * (q / 2)..+31`` of row ``16w + r + 8 * (q % 2)``.

Source: the metadata operands of ``wgmma.mma_async.sp`` and ``mma.sp`` in the PTX ISA.

Shape legend: ``M`` rows, ``K`` columns, ``S`` stored values of a row, ``R`` and ``C``
blocks of 64 rows and of 64 columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inductor_sparse.errors import SparseShapeError

BLOCK = 64
WORDS = 128
"""Metadata words of a block of 64 x 64: one for each thread of a warpgroup."""

FILLER = 0 | 1 << 2
"""The nibble of padding: the pair (0, 1), valid for the hardware."""

_GROUP = 4
_WORD_GROUPS = 8
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PackedBytes(NamedTuple):
    """Bytes of the two tensors of a packed operand."""

    values: int
    metadata: int

    @property
    def total(self) -> int:
        """Bytes of both tensors."""
        return self.values + self.metadata


def values_shape(rows: int, features: int) -> tuple[int, int]:
    """Shape of the values of an ``[rows, features]`` operand; sizes may be symbolic."""
    return rows, (features + BLOCK - 1) // BLOCK * (BLOCK // 2)


def metadata_shape(rows: int, features: int) -> tuple[int, int, int]:
    """Shape of the metadata of an ``[rows, features]`` operand, likewise."""
    return (rows + BLOCK - 1) // BLOCK, (features + BLOCK - 1) // BLOCK, WORDS


def packed_bytes(rows: int, features: int, dtype: torch.dtype) -> PackedBytes:
    """Bytes that an ``[rows, features]`` operand of ``dtype`` takes when packed.

    Example:
        >>> packed_bytes(64, 128, torch.bfloat16)
        PackedBytes(values=8192, metadata=1024)
    """
    M, S = values_shape(rows, features)
    R, C, words = metadata_shape(rows, features)
    return PackedBytes(M * S * dtype.itemsize, R * C * words * 4)


def _lane_split(dtype: torch.dtype) -> tuple[int, int]:
    """How the 16 groups of 64 columns are split over lanes, and then within a word.

    It is all that differs between the two widths: the axes of a block, rows
    ``(w, h, r) = (4, 2, 8)`` and columns ``(lanes, groups)``, are then put in the order
    ``w, r, lanes, h, groups``, of which the last 8 entries are always one word.
    """
    return (2, 8) if dtype.itemsize == 1 else (4, 4)


def pack_index(index: Tensor, dtype: torch.dtype) -> Tensor:
    """Metadata words in fragment order of the positions of the kept values.

    Args:
        index: ``[M, S]`` uint8, ``S`` a multiple of 32; entries ``2g`` and ``2g + 1``
            are the positions 0..3 of the values kept of group ``g``, ascending.
        dtype: dtype of the values; its width decides the layout.

    Returns:
        ``[ceil(M / 64), S / 32, 128]`` int32, contiguous, the bits of a u32.

    Raises:
        SparseShapeError: ``index`` is not 2-D, or ``S`` is not a multiple of 32.
    """
    if index.ndim != 2 or index.shape[1] % (BLOCK // 2):
        raise SparseShapeError(
            f"pack_index: index has shape {tuple(index.shape)}, expected [M, S] with S "
            f"a multiple of {BLOCK // 2}; pad K with zeros to a multiple of {BLOCK}"
        )
    M, S = index.shape
    R, C, _ = metadata_shape(M, 2 * S)
    nibbles = index[:, 0::2].int() | index[:, 1::2].int() << 2
    padding = (0, 0, 0, R * BLOCK - M)
    nibbles = torch.nn.functional.pad(nibbles, padding, value=FILLER)
    axes = nibbles.reshape(R, 4, 2, 8, C, *_lane_split(dtype))
    groups = axes.permute(0, 4, 1, 3, 5, 2, 6).reshape(R, C, WORDS, _WORD_GROUPS)
    return (groups << _shifts(groups)).sum(-1, dtype=torch.int32)


def unpack_index(metadata: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The positions held by metadata words: the inverse of :func:`pack_index`.

    Args:
        metadata: ``[ceil(rows / 64), C, 128]`` int32.
        rows: ``M``; the padded rows beyond are left out.
        dtype: dtype of the values; its width decides the layout.

    Returns:
        ``[M, 32 * C]`` uint8, contiguous.

    Raises:
        SparseShapeError: shape or dtype of ``metadata`` do not fit.
    """
    R, C = (rows + BLOCK - 1) // BLOCK, metadata.shape[1] if metadata.ndim == 3 else -1
    check_metadata(metadata, rows, C * BLOCK)
    groups = metadata.unsqueeze(-1) >> _shifts(metadata) & 15
    lanes, within = _lane_split(dtype)
    axes = groups.reshape(R, C, 4, 8, lanes, 2, within).permute(0, 2, 5, 3, 1, 4, 6)
    nibbles = axes.reshape(R * BLOCK, C * BLOCK // _GROUP)[:rows]
    pairs = torch.stack((nibbles & 3, nibbles >> 2), dim=-1)
    return pairs.to(torch.uint8).flatten(1)


def _shifts(like: Tensor) -> Tensor:
    """The first bit of each group of a word: 0, 4, ... 28."""
    return torch.arange(0, 32, 4, dtype=torch.int32, device=like.device)


def check_metadata(metadata: Tensor, rows: int, features: int) -> None:
    """Raise :class:`SparseShapeError` unless it is the metadata of such an operand."""
    expected = metadata_shape(rows, features)
    if metadata.dtype != torch.int32 or tuple(metadata.shape) != expected:
        raise SparseShapeError(
            f"metadata is {metadata.dtype} {tuple(metadata.shape)}, expected "
            f"torch.int32 {expected} for {rows} rows and {features} columns"
        )


def check_packed(values: Tensor, metadata: Tensor, features: int) -> None:
    """Raise :class:`SparseShapeError` unless the two fit ``features`` columns."""
    if values.ndim != 2 or values.shape != values_shape(values.shape[0], features):
        raise SparseShapeError(
            f"values has shape {tuple(values.shape)}, expected [M, "
            f"{values_shape(0, features)[1]}] for {features} columns"
        )
    check_metadata(metadata, values.shape[0], features)


def unpack(values: Tensor, metadata: Tensor, features: int) -> Tensor:
    """The dense ``[M, features]`` tensor of a packed operand, moved bit for bit.

    Args:
        values: ``[M, S]``, any dtype, ``S = 32 * ceil(features / 64)``.
        metadata: ``[ceil(M / 64), ceil(features / 64), 128]`` int32.
        features: ``K``; what is stored beyond it is left out.

    Returns:
        ``[M, features]`` in the dtype of ``values``, contiguous.

    Raises:
        SparseShapeError: shapes or the dtype of ``metadata`` do not fit.
    """
    check_packed(values, metadata, features)
    M, S = values.shape
    bits = values.contiguous().view(_BITS[values.dtype.itemsize]).view(M, S // 2, 2)
    index = unpack_index(metadata, M, values.dtype).view(M, S // 2, 2).long()
    dense = bits.new_zeros(M, S // 2, _GROUP).scatter_(-1, index, bits)
    return dense.flatten(1)[:, :features].contiguous().view(values.dtype)


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a tensor that is 2:4 already, without loss.

    Args:
        x: ``[M, K]``, any strides, any dtype of 1 to 8 bytes, at most two non-zeros in
            every four consecutive columns.

    Returns:
        ``(values, metadata)`` as described at the top of this module.  In a group with
        fewer than two non-zeros, zeros at the lowest free positions fill the pair.

    Raises:
        SparseShapeError: not 2-D, or a group holds more than two non-zeros.

    Example:
        >>> values, metadata = pack(torch.tensor([[0.0, 7.0, 0.0, 9.0]]))
        >>> values[0, :2], hex(metadata[0, 0, 0] & 0xF)
        (tensor([7., 9.]), '0xd')
    """
    if x.ndim != 2:
        raise SparseShapeError(f"pack: x has shape {tuple(x.shape)}, expected [M, K]")
    M, S = values_shape(*x.shape)
    x = torch.nn.functional.pad(x, (0, 2 * S - x.shape[1]))
    filled = (x != 0).view(M, S // 2, _GROUP)
    if filled.sum(-1).gt(2).any():
        raise SparseShapeError(
            "pack: a group of four holds more than two non-zeros; choose which to keep "
            "with torch.ops.inductor_sparse.sparsify24"
        )
    order = filled.byte().sort(dim=-1, descending=True, stable=True).indices
    index = order[..., :2].sort(dim=-1).values
    bits = x.contiguous().view(_BITS[x.dtype.itemsize]).view(M, S // 2, _GROUP)
    kept = torch.where(filled, bits, 0).gather(-1, index)
    metadata = pack_index(index.byte().flatten(1), x.dtype)
    return kept.flatten(1).view(x.dtype), metadata
