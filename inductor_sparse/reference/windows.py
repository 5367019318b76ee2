"""Windows into a weight: strided views of its memory that an op makes its own.

Shape legend: as in :mod:`inductor_sparse.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inductor_sparse.reference.domain import check_window, strided_extent
from inductor_sparse.reference.quantized import quantize_rows


def quantized_weight(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize_rows` of a two-dimensional window into ``weight``.

    Args:
        weight: any shape and strides, one of DTYPES.
        size: shape ``[N, K]`` of the window and of the result.
        stride: strides of the window, in elements of ``weight``.
        storage_offset: elements from the first element of ``weight``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.int8``.

    Returns:
        ``values [N, K]`` of ``dtype``, contiguous, ``scale [N]`` float32, and the
        largest norm of a row of what these two mean, a scalar in float32.

    Raises:
        SparseShapeError: the window leaves the weight or is not 2-D, or a dtype is not
            supported.
    """
    check_window(weight, size, stride, storage_offset)
    window = weight.as_strided(size, stride, weight.storage_offset() + storage_offset)
    values, scale_N = quantize_rows(window, dtype)
    norm_N = torch.linalg.vector_norm(values.float(), dim=1) * scale_N
    return values, scale_N, torch.nn.functional.pad(norm_N, (0, 1)).amax()  # N may be 0


def window_gradient(
    grad: Tensor,
    shape: Sequence[int],
    weight_stride: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
) -> Tensor:
    """The gradient of a weight of ``shape``, given that of a window into it.

    Args:
        grad: of the window.
        shape: of the weight.
        weight_stride: of the weight.
        size: of the window.
        stride: of the window, in elements of the weight.
        storage_offset: of the window, from the first element of the weight.
    """
    # Such a window starts where the weight does: at any other offset it would leave it.
    axes = _permutation(shape, weight_stride, size, stride)
    if axes is not None:
        return grad.permute(axes)
    # As for as_strided: overlaps of the window add up, and elements of the weight that
    # share memory share its gradient equally.
    extent = strided_extent(shape, weight_stride)
    to = _memory_index(shape, weight_stride, grad.device).reshape(-1)
    source = _memory_index(size, stride, grad.device).reshape(-1) + storage_offset
    memory = grad.new_zeros(extent).index_add(0, source, grad.reshape(-1))
    sharing = grad.new_zeros(extent).index_add(0, to, grad.new_ones(to.shape))
    return (memory[to] / sharing[to]).view(tuple(shape))


def _permutation(
    shape: Sequence[int],
    weight_stride: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
) -> list[int] | None:
    """The axes that turn a window back into the weight, if it merely reorders them."""
    reach = 0
    for step, n in sorted(zip(weight_stride, shape, strict=True)):
        if n > 1 and step <= reach:
            return None  # elements of the weight share memory
        reach += (n - 1) * step
    axes = list(range(len(size)))
    found = []
    for n, step in zip(shape, weight_stride, strict=True):
        match = [a for a in axes if size[a] == n and stride[a] == step]
        if not match:
            return None
        axes.remove(match[0])
        found.append(match[0])
    return None if axes else found


def _memory_index(
    size: Sequence[int], stride: Sequence[int], device: torch.device
) -> Tensor:
    """For each element of a strided tensor, its distance in memory from the first."""
    index = torch.zeros((1,) * len(size), dtype=torch.int64, device=device)
    for axis, (n, step) in enumerate(zip(size, stride, strict=True)):
        line = torch.arange(n, device=device) * step
        index = index + line.view([-1 if a == axis else 1 for a in range(len(size))])
    return index.expand(size)
