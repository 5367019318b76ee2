"""Reading an operand that was quantized to e4m3 row by row, with its scale.

``(h / s).to(fp8)`` stands for ``h`` if the product multiplies by the same ``s`` again,
and if ``s`` is so large that nothing but rounding was lost.  Then any other scale of
that kind gives the same product within the rounding of e4m3.
"""

from __future__ import annotations

import dataclasses
import math
import operator

import torch
from torch import fx

from inductor_sparse.passes.activations import clip_bounds
from inductor_sparse.passes.fx_utils import (
    ORDERED_VIEWS,
    aten,
    input_of,
    is_call,
    is_cast,
    peel,
    tensor_of,
)

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ROUNDING = 2**-7
"""How far a scale may be below what fits, for having been computed in bfloat16."""

_SCALINGS = frozenset({aten.mul.Tensor, aten.div.Tensor})
_EXTREMES = frozenset({aten.maximum.default, aten.minimum.default})
_CLAMPS = frozenset(
    {aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default}
)
_MAXIMA = frozenset({aten.amax.default, aten.max.default, aten.max.dim})

WRONG_SCALE = "the scale of the product is not the one that the rows were divided by"
NOT_THE_LARGEST = "the scale of a row is not taken from the largest value of the row"
SATURATED = "values are clipped that e4m3 could hold after another scaling"


@dataclasses.dataclass(frozen=True)
class QuantizedOperand:
    """``h`` before it was scaled, the views behind that, and the scale it was given.

    ``divides``: whether ``h`` was divided by ``scale``; else they were multiplied.
    """

    h: fx.Node
    views: list[fx.Node]
    scale: fx.Node
    divides: bool


def read_quantized(lhs: fx.Node) -> QuantizedOperand | str:
    """The activation behind a quantized operand, or why it is none that we know."""
    node, views = peel(lhs, ORDERED_VIEWS)
    if not is_cast(node):
        return "the operand is not cast from a wider one"
    node = input_of(node)
    while is_call(node, _CLAMPS):
        low, high = _bounds(node)
        if not (low <= -_LARGEST and high >= _LARGEST):
            return SATURATED
        node = input_of(node)
    inner, more = peel(node, ORDERED_VIEWS)
    if not is_call(inner, _SCALINGS):
        return "the operand is not divided by a scale"
    h, scale = inner.args[:2]
    if not isinstance(h, fx.Node) or not isinstance(scale, fx.Node):
        return "the operand is divided by a constant, not by the scale of its row"
    while is_cast(h):
        h = input_of(h)
    divides = inner.target is aten.div.Tensor
    return QuantizedOperand(h, [*views, *more], scale, divides)


def scale_obstacle(product_scale: fx.Node, operand: QuantizedOperand) -> str | None:
    """Why a product with this scale of its rows is not that of ``h``, or None."""
    given, inverted = _inverse_of(product_scale)
    used, used_inverted = _inverse_of(operand.scale)
    if given is not used or (inverted != used_inverted) == operand.divides:
        return WRONG_SCALE
    multiple = _multiple_of_maximum(operand)
    if isinstance(multiple, str):
        return multiple
    return SATURATED if multiple < (1 - _ROUNDING) / _LARGEST else None


def _multiple_of_maximum(operand: QuantizedOperand) -> float | str:
    """What ``h`` is divided by, relative to the largest value of the row.

    Or why it is no multiple of that.  Lower bounds of the divisor do not count: they
    are there for rows of zeros, and lose no more than rounding.
    """
    # The divisor is factor * scale, or factor / scale while it is inverted.
    scale, factor, inverted = operand.scale, 1.0, not operand.divides
    while True:
        scale, inverse = _inverse_of(scale)
        inverted ^= inverse
        if is_call(scale, _CLAMPS | _EXTREMES):
            low, high = _bounds(scale)
            if math.isnan(low):
                return NOT_THE_LARGEST
            if (low if inverted else -high) != -math.inf:
                return SATURATED
            scale = input_of(scale)
            continue
        step = _scaling(scale)
        if step is None:
            break
        scale, by, inverse = step
        factor = factor / by if inverted else factor * by
        inverted ^= inverse
    if is_call(scale, {operator.getitem}):
        if scale.args[1] != 0:  # 1 of max.dim: where the largest value is
            return NOT_THE_LARGEST
        scale = input_of(scale)
    if not is_call(scale, _MAXIMA) or not _is_by_row(scale, operand.h):
        return NOT_THE_LARGEST
    return WRONG_SCALE if inverted else factor


def _scaling(node: fx.Node) -> tuple[fx.Node, float, bool] | None:
    """``(x, by, inverse)`` of a node ``by * x``, or ``by / x``, with ``by`` above 0."""
    if not is_call(node, _SCALINGS):
        return None
    first, second = (_constant_of(argument) for argument in node.args[:2])
    divides = node.target is aten.div.Tensor
    if second is not None and second > 0:
        return input_of(node), 1 / second if divides else second, False
    if first is not None and first > 0 and isinstance(node.args[1], fx.Node):
        return node.args[1], first, divides
    return None


def _inverse_of(scale: fx.Node) -> tuple[fx.Node, bool]:
    """What a scale is a view, a cast or the inverse of, and whether the inverse."""
    inverted = False
    while True:
        step = _scaling(scale)
        if _keeps_value(scale):
            scale = input_of(scale)
        elif is_call(scale, {aten.reciprocal.default}):
            inverted, scale = not inverted, input_of(scale)
        elif step is not None and step[1] == 1:
            scale, inverted = step[0], inverted ^ step[2]
        else:
            return scale, inverted


def _keeps_value(node: fx.Node) -> bool:
    """Whether a node is a view, or a cast to a float of 16 bits or more."""
    if is_call(node, ORDERED_VIEWS):
        return True
    dtype = node.meta["val"].dtype if is_cast(node) else torch.uint8
    return dtype.is_floating_point and dtype.itemsize > 1


def _bounds(node: fx.Node) -> tuple[float, float]:
    """The constant bounds of a clamp or an extreme; NaN if they are not constant."""
    if not is_call(node, _EXTREMES):
        if any(isinstance(argument, fx.Node) for argument in node.args[1:]):
            return math.nan, math.nan
        return clip_bounds(node)
    bound = _constant_of(node.args[1])
    if bound is None:
        return math.nan, math.nan
    largest = node.target is aten.maximum.default
    return (bound, math.inf) if largest else (-math.inf, bound)


def _constant_of(argument: object) -> float | None:
    """The number that an argument is, also as a tensor made of it; None for another."""
    if isinstance(argument, (int, float)):
        return float(argument)
    if is_call(argument, {aten.full.default}):
        return _constant_of(argument.args[1])
    if is_call(argument, {aten.scalar_tensor.default}):
        return _constant_of(argument.args[0])
    return None


def _magnitude_source(node: fx.Node) -> fx.Node:
    while _keeps_value(node) or is_call(node, {aten.abs.default}):
        node = input_of(node)
    return node


def _is_by_row(maximum: fx.Node, h: fx.Node) -> bool:
    """Whether a maximum is that of ``h`` over the last dimension alone."""
    value = tensor_of(maximum.args[0])
    dims = maximum.args[1] if len(maximum.args) > 1 else []
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    by_row = value is not None and listed in ([-1], [value.ndim - 1])
    return by_row and _magnitude_source(input_of(maximum)) is _magnitude_source(h)
