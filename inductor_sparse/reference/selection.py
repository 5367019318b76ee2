"""Which two of every four values 2:4 selection keeps, and what it drops.

Shape legend: as in :mod:`inductor_sparse.reference`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inductor_sparse.reference.domain import (
    ACTIVATIONS,
    BLOCK,
    GROUP,
    KEPT,
    check_sparsify24,
)


def _groups(a_MK: Tensor) -> Tensor:
    """``[M, G, 4]``: K padded with zeros to a multiple of 64, -0.0 replaced by 0.0."""
    M, K = a_MK.shape
    padded = math.ceil(K / BLOCK) * BLOCK
    a_MK = torch.where(a_MK == 0, torch.zeros_like(a_MK), a_MK)
    a_MK = torch.nn.functional.pad(a_MK, (0, padded - K))
    return a_MK.reshape(M, padded // GROUP, GROUP)


def _top_two(key_MG4: Tensor) -> Tensor:
    """Positions of the two largest of four, ascending: ``[M, G, 2]`` uint8.

    Each pair is compared once; the later element wins only if strictly larger, so that
    the result is the same on every device.  Float comparisons drop NaN: hence the mask.
    """
    keys, nans = key_MG4.unbind(-1), key_MG4.isnan().unbind(-1)
    losses = [torch.zeros_like(key, dtype=torch.uint8) for key in keys]
    for i in range(GROUP):
        for j in range(i + 1, GROUP):
            later_wins = (keys[j] > keys[i]) | (nans[j] & ~nans[i])
            losses[i] += later_wins
            losses[j] += ~later_wins
    kept = [(loss < KEPT).to(torch.uint8) * i for i, loss in enumerate(losses)]
    total_MG = kept[1] + kept[2] + kept[3]
    last_MG = torch.stack(kept).amax(0)
    return torch.stack((total_MG - last_MG, last_MG), dim=-1)


def _select(a_MG4: Tensor, select: str) -> Tensor:
    return _top_two(a_MG4.abs() if select == "largest_abs" else a_MG4)


def select_groups(a_MK: Tensor, select: str) -> tuple[Tensor, Tensor]:
    """``(values, index)`` of an activated matrix: see :func:`sparsify24`."""
    a_MG4 = _groups(a_MK)
    index_MG2 = _select(a_MG4, select)
    values_MG2 = a_MG4.gather(-1, index_MG2.long())
    return values_MG2.flatten(1), index_MG2.flatten(1)


def activated(x: Tensor, activation: str, up: Tensor | None) -> Tensor:
    """``act(x)``, or ``act(x) * up``."""
    a = ACTIVATIONS[activation](x)
    return a if up is None else a * up


def sparsify24(
    x: Tensor, activation: str, select: str, up: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep two of every four consecutive values of ``act(x)`` along K.

    K is padded with zeros to a multiple of 64.  A group with at most two non-zeros
    loses nothing under ``largest_abs``, nor under ``largest`` without negative values.
    Ties go to the lower position; NaN is larger than every number; zeros are stored as
    +0.0; where a group has fewer than two non-zeros, zeros fill the pair.

    Args:
        x: ``[M, K]``, one of :data:`DTYPES`, any strides.
        activation: a key of :data:`ACTIVATIONS`.
        select: ``largest`` compares values (meant for non-negative ones: 0 beats -1),
            ``largest_abs`` compares magnitudes.
        up: ``[M, K]``, same dtype, any strides: what a gate ``act(x)`` is multiplied
            by, or None.

    Returns:
        ``(values, index)``, both contiguous ``[M, S]`` with ``S = 32 * ceil(K / 64)``:
        ``values`` in ``x.dtype``; ``index`` in uint8, the positions 0..3 within the
        group.  Entries ``2g`` and ``2g + 1`` belong to group ``g``, in its order.

    Raises:
        SparseShapeError: not 2-D, dtype not supported, or an unknown name.

    Example:
        >>> x = torch.tensor([[1.0, -5.0, 2.0, 2.0]])
        >>> values, index = sparsify24(x, "relu", "largest")
        >>> values[0, :2], index[0, :2]
        (tensor([2., 2.]), tensor([2, 3], dtype=torch.uint8))

    Source:
        Haziza et al., "Accelerating Transformer Inference and Training with 2:4
        Activation Sparsity", 2025, https://arxiv.org/abs/2503.16672.
    """
    check_sparsify24(x, activation, select, up)
    return select_groups(activated(x, activation, up), select)


def dropped_energy(x: Tensor, activation: str, select: str) -> float:
    """Fraction of the sum of squares of ``act(x)`` that 2:4 selection drops, in [0, 1].

    Args:
        x: ``[..., K]``, one of :data:`DTYPES`; groups are formed along K.
        activation: a key of :data:`ACTIVATIONS`.
        select: one of :data:`SELECTS`.

    Returns:
        0.0 for a tensor without energy; NaN if ``act(x)`` holds NaN or Inf.

    Raises:
        SparseShapeError: dtype not supported, no axis, or an unknown name.

    Example:
        >>> dropped_energy(torch.tensor([3.0, 4.0, 12.0, 0.0]), "relu", "largest")
        0.05325443786982249
    """
    x_MK = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.ndim else x
    check_sparsify24(x_MK, activation, select)
    a_MG4 = _groups(ACTIVATIONS[activation](x_MK)).double()
    # Only what is dropped is summed, so that a loss of zero is exactly zero.
    dropped_MG4 = a_MG4.scatter(-1, _select(a_MG4, select).long(), 0.0)
    total = a_MG4.square().sum()
    return float(dropped_MG4.square().sum() / total) if total != 0 else 0.0


def density(x: Tensor) -> float:
    """Fraction of elements of ``x`` that are not zero, in [0, 1]; 0.0 if it is empty.

    Example:
        >>> density(torch.tensor([0.0, -0.0, float("nan"), 2.0]))
        0.5
    """
    return float(x.count_nonzero()) / x.numel() if x.numel() else 0.0
