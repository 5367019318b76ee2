"""Recognizing ReLU, ReLU² and their look-alikes, however they are spelled.

Each recognizer answers for *values*: :func:`as_relu` returns ``z`` only if the node
equals ``relu(z)`` on every input, NaN and infinities included, up to exact widening
casts.  The spellings that treat NaN or infinities differently (``x * x * (x > 0)`` and
its kin) are found by :mod:`inductor_sparse.passes.producers` and keep their arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from inductor_sparse.passes.fx_utils import (
    aten,
    input_of,
    is_call,
    is_cast,
    is_widening,
    is_zero,
    magnitude_test,
    same_shape,
    selection,
    sign_test,
    source_tensor,
    tensor_of,
    with_dtype,
)

_Recognizer = Callable[[fx.Node], fx.Node | None]

_SMOOTH = {
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.elu.default: "elu",
    aten.leaky_relu.default: "leaky_relu",
    aten.mish.default: "mish",
    aten.softplus.default: "softplus",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.log_sigmoid_forward.default: "logsigmoid",
}
ZERO_AT_ZERO = frozenset({"tanh", "silu", "gelu", "elu", "leaky_relu", "mish"})
"""Smooth activations that map zero to zero, by the names of them used here."""
_MULS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_ADDS = frozenset({aten.add.Tensor, aten.add.Scalar})
_POWS = frozenset({aten.pow.Tensor_Scalar})


def as_relu(node: fx.Node) -> fx.Node | None:
    """``z`` if ``node`` equals ``relu(z)`` on every input, else None.

    ``z`` may have a narrower dtype than ``node``: the widening is then inside.
    """
    if is_cast(node):
        return _through_cast(node, as_relu)
    if is_call(node, {aten.relu.default, aten.alias.default, aten.detach.default}):
        source = input_of(node)
        return source if node.target is aten.relu.default else as_relu(source)
    if is_call(node, {aten.maximum.default}):
        a, b = node.args
        return _full(node, a if is_zero(b) else b if is_zero(a) else None)
    choice = selection(node)
    if choice is not None:
        return _where_negative_is_zero(node, choice, lambda value: value)
    floor, ceiling = clip_bounds(node)
    if floor == 0 and ceiling == math.inf:
        return input_of(node)
    if floor == -math.inf and ceiling == math.inf and is_clip(node):
        return as_relu(input_of(node))
    return None


def as_relu_squared(node: fx.Node) -> fx.Node | None:
    """``z`` if ``node`` equals ``relu(z) ** 2`` on every input, else None.

    Squares of a widened bfloat16 or float16 are exact, so that narrowing afterwards
    rounds once, exactly as squaring in the narrow dtype does.
    """
    if is_cast(node):
        return _through_cast(node, as_relu_squared)
    if is_call(node, {aten.alias.default, aten.detach.default}):
        return as_relu_squared(input_of(node))
    root = square_root(node)
    if root is not None:
        return as_relu(root)
    if is_call(node, _MULS):
        a, b = node.args
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            z = as_relu(a)
            return z if z is not None and z is as_relu(b) else None
    choice = selection(node)
    if choice is not None:
        return _where_negative_is_zero(node, choice, square_root)
    return None


def square_root(node: object) -> fx.Node | None:
    """``x`` if ``node`` is ``x ** 2`` or ``x * x``, else None."""
    if is_call(node, {aten.square.default}):
        return input_of(node)
    if is_call(node, _POWS) and is_exponent_two(node):
        return input_of(node)
    if is_call(node, _MULS) and node.args[0] is node.args[1]:
        return input_of(node)
    return None


def is_exponent_two(node: fx.Node) -> bool:
    """Whether a ``pow`` with a scalar exponent is a square."""
    exponent = node.args[1]
    return isinstance(exponent, (int, float)) and exponent == 2


def _through_cast(cast: fx.Node, recognize: _Recognizer) -> fx.Node | None:
    # Widening may come before or after squaring: the two differ in the wide dtype,
    # where nobody takes a narrow z, and agree once they are rounded to z's dtype.
    z = recognize(input_of(cast))
    return z if is_widening(cast) else with_dtype(z, cast.meta["val"].dtype)


def _where_negative_is_zero(
    node: fx.Node, choice: tuple[Any, Any, Any], root: _Recognizer
) -> fx.Node | None:
    # where(z <= 0, 0, f(z)): NaN fails the test and so takes f(z), as relu does.
    condition, if_true, if_false = choice
    test = sign_test(condition)
    if test is None or test[0] not in ("le", "lt") or not is_zero(if_true):
        return None
    if not isinstance(if_false, fx.Node):
        return None
    z = test[1]
    return _full(node, z) if root(if_false) is z else None


def _full(node: fx.Node, z: object) -> fx.Node | None:
    """``z`` unless it was broadcast or promoted to become ``node``."""
    value, z_value = tensor_of(node), tensor_of(z)
    if not isinstance(z, fx.Node) or value is None or z_value is None:
        return None
    same = value.dtype == z_value.dtype and same_shape(value, z_value)
    return z if same else None


def is_clip(node: object) -> bool:
    """Whether a node clips its first input to scalar bounds."""
    return is_call(
        node,
        {
            aten.clamp.default,
            aten.clamp_min.default,
            aten.clamp_max.default,
            aten.hardtanh.default,
            aten.threshold.default,
        },
    )


def clip_bounds(node: fx.Node) -> tuple[float, float]:
    """The lower and upper bound of a clip; infinite where it has none or is no clip.

    ``threshold(x, 0, 0)`` has the lower bound 0; any other threshold is no clip.
    """
    unbounded = (-math.inf, math.inf)
    if not is_clip(node) or any(isinstance(a, fx.Node) for a in node.args[1:]):
        return unbounded
    low: object = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high: object = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    if node.target is aten.threshold.default:
        return (0.0, math.inf) if low == 0 and high == 0 else (math.nan, math.nan)
    if node.target is aten.clamp_max.default:
        low, high = None, low
    if node.target is aten.hardtanh.default:
        low = -1.0 if len(node.args) < 2 else low
        high = 1.0 if len(node.args) < 3 else high
    return (
        float(low) if isinstance(low, (int, float)) else -math.inf,
        float(high) if isinstance(high, (int, float)) else math.inf,
    )


def masking(
    node: fx.Node, zero: Callable[[object], bool] = is_zero
) -> tuple[Any, Any, tuple[str, str]] | None:
    """``(condition, kept, passing)`` of a selection that has zeros on one side.

    ``passing`` are the comparisons with which large values are the ``kept`` ones.
    """
    choice = selection(node)
    if choice is None:
        return None
    condition, if_true, if_false = choice
    if zero(if_false):
        return condition, if_true, ("gt", "ge")
    return (condition, if_false, ("lt", "le")) if zero(if_true) else None


def is_thresholded(node: fx.Node) -> bool:
    """Whether a node is something whose small values, of either sign, became zero.

    ``where(|x| > t, x, 0)`` and ``x * (|x| > t)``, as TEAL (Liu et al., 2024) and CATS
    (Lee et al., 2024) have them, and soft shrinkage.
    """
    if is_call(node, _MULS):
        a, b = node.args
        return _masks(a, b) or _masks(b, a)
    masked = masking(node, _is_zeroed)
    if masked is None:
        return False
    condition, kept, passing = masked
    test = magnitude_test(condition)
    if test is None or test[0] not in passing or not isinstance(kept, fx.Node):
        return False
    x = source_tensor(kept)
    return x is test[1] or (
        is_call(x, {aten.sub.Tensor}) and source_tensor(input_of(x)) is test[1]
    )


def _is_zeroed(value: object) -> bool:
    """Whether a value is 0, or something times 0: that keeps a NaN."""
    return is_zero(value) or (is_call(value, _MULS) and any(map(is_zero, value.args)))


def _masks(mask: object, x: object) -> bool:
    """Whether a factor is 1 where the other has a large magnitude, and 0 elsewhere."""
    if not isinstance(mask, fx.Node) or not isinstance(x, fx.Node):
        return False
    test = magnitude_test(source_tensor(mask))
    return test is not None and (
        test[0] in ("gt", "ge") and source_tensor(x) is test[1]
    )


def is_scattered(node: fx.Node) -> bool:
    """Whether a node is zero but where few values were written, as of a top-k.

    Few: no more than a quarter of the last dimension.
    """
    if not is_call(node, {aten.scatter.src, aten.scatter.value}):
        return False
    into, dim, index = node.args[:3]
    value, places = tensor_of(node), tensor_of(index)
    if value is None or places is None or not is_zero(into):
        return False
    size, few = value.shape[-1], places.shape[-1]
    last = dim in (-1, value.ndim - 1) and isinstance(size, int)
    return last and isinstance(few, int) and 4 * few <= size


def smooth_activation(node: fx.Node) -> str | None:
    """The name of an activation function that is known not to produce zeros, if any.

    Inductor decomposes most of them before passes see the graph, so the decomposed
    forms are matched by the part that no other formula has.
    """
    if node.op == "call_function" and node.target in _SMOOTH:
        return _SMOOTH[node.target]
    if is_call(node, {aten.div.Tensor}):
        return _smooth_quotient(*node.args)
    if is_call(node, _MULS):
        a, b = node.args
        return _smooth_product(a, b) or _smooth_product(b, a)
    if is_call(node, {aten.where.self}):
        return _smooth_where(*node.args)
    return None


def _smooth_quotient(a: object, b: object) -> str | None:
    if is_call(b, _ADDS) and is_call(b.args[0], {aten.exp.default}):
        exponent = input_of(input_of(b))
        return "silu" if is_call(exponent, {aten.neg.default}) else None
    if b == 6 and isinstance(a, fx.Node):
        clips = [a, *(x for x in a.args if isinstance(x, fx.Node))]
        if any(is_clip(c) and clip_bounds(c)[1] == 6 for c in clips):
            return "hardswish"
    return None


def _smooth_product(x: object, gate: object) -> str | None:
    if not isinstance(x, fx.Node) or not isinstance(gate, fx.Node):
        return None
    if is_call(gate, {aten.sigmoid.default}):
        same = source_tensor(input_of(gate)) is source_tensor(x)
        return "silu" if same else None
    if is_call(gate, {aten.tanh.default}) and is_call(gate.args[0], {aten.where.self}):
        return "mish"
    if is_call(gate, _ADDS) and gate.args[1] == 1:
        curve = is_call(gate.args[0], {aten.erf.default, aten.tanh.default})
        return "gelu" if curve and is_call(x, _MULS) and 0.5 in x.args else None
    return None


def _smooth_where(condition: object, if_true: object, if_false: object) -> str | None:
    masked = is_zero(if_false) or is_zero(if_true)
    if masked or not is_call(condition, {aten.gt.Scalar}):
        return None
    x = condition.args[0]
    curve = source_tensor(if_false) if isinstance(if_false, fx.Node) else None
    if is_call(curve, {aten.log1p.default}):
        return "softplus"
    if is_call(curve, _MULS):
        inner = curve.args[0]
        if is_call(inner, {aten.expm1.default}):
            return "elu"
        return "leaky_relu" if inner is x else None
    return None
