"""How the result of a product should lie in memory: as whoever reads it wants it.

Shape legend: ``M`` rows, ``N`` columns.
"""

from __future__ import annotations

import torch
from torch import fx

_SWAPPED = ([1, 0], [-1, 0], [1, -2], [-1, -2])
_aten, _prims = torch.ops.aten, torch.ops.prims


def is_read_transposed(product: fx.Node) -> bool:
    """Whether all that becomes of a product is a row-major copy of its transpose.

    Pointwise steps of the same shape may come before; each must be read by one node.

    Args:
        product: a node whose value is a matrix ``[M, N]``.
    """
    node, size = product, _size(product)
    while len(node.users) == 1:
        (user,) = node.users
        if _is_transposition(user):
            return bool(user.users) and all(map(_is_row_major_copy, user.users))
        if not _is_pointwise(user) or _size(user) != size:
            return False
        node = user
    return False


def _size(node: fx.Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else None


def _is_transposition(node: fx.Node) -> bool:
    if node.target is _aten.t.default:
        return True
    return node.target is _aten.permute.default and node.args[1] in _SWAPPED


def _is_row_major_copy(node: fx.Node) -> bool:
    wanted = torch.contiguous_format
    return (
        node.target is _aten.clone.default
        and node.kwargs.get("memory_format") is wanted
    )


def _is_pointwise(node: fx.Node) -> bool:
    if node.target is _prims.convert_element_type.default:
        return True
    target = node.target
    tagged = isinstance(target, torch._ops.OpOverload)
    return tagged and torch.Tag.pointwise in target.tags
