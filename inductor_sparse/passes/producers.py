"""Where the zeros of a matmul's left operand come from, if they come from anywhere.

:func:`find_producer` walks back from the operand through operations that map zero to
zero, until it meets an activation function.  The walk decides only whether a site is
*worth* rewriting, never what it computes: a rewrite that keeps the chain of operations
is exact whatever the walk thought of it.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from inductor_sparse.decisions import Reason
from inductor_sparse.passes import activations
from inductor_sparse.passes.fx_utils import (
    CASTS,
    VIEWS,
    aten,
    input_of,
    is_call,
    peel,
    same_shape,
    source_tensor,
    tensor_of,
    threshold_test,
)

if TYPE_CHECKING:
    from typing import TypeGuard

_MULS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIVS = frozenset({aten.div.Tensor, aten.div.Scalar})
_POWS = frozenset({aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.square.default})
_SHIFTS = frozenset(
    {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}
)
_ZERO_TO_ZERO = frozenset(
    {
        *VIEWS,
        *CASTS,
        *_DIVS,
        aten.neg.default,
        aten.round.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.gather.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.native_dropout.default,
        *filter(None, [getattr(aten, "_fused_rms_norm", None)]),
        operator.getitem,
    }
)
_MAX_WALK = 64

STARRELU = (
    "StarReLU: the constant added after squaring makes every zero non-zero; moving it "
    "into the bias of the next layer, as constant times the column sums of its weight, "
    "gives the same function with zeros kept"
)
SHIFTED = "a term is added between the activation and the matmul, so zeros are lost"


class Family(str, enum.Enum):
    """What kind of producer it is; the value names the rule that takes its sites."""

    PLAIN = "relu_matmul"
    SQUARED = "relu_squared_matmul"
    GATED = "gated_matmul"
    MAGNITUDE = "magnitude_matmul"


@dataclasses.dataclass(frozen=True)
class Producer:
    """An activation that feeds a matmul.

    ``activation`` is what a reader calls it (``relu2``, ``relu2*up``, ``silu``);
    ``node`` where the walk met it; ``gate`` and ``up`` the two factors of a plain gated
    product, else None.  ``reason`` is set if the activation is not one that makes
    zeros, or the zeros do not reach the matmul.
    """

    family: Family
    activation: str
    node: fx.Node
    z: fx.Node | None = None
    gate: fx.Node | None = None
    up: fx.Node | None = None
    reason: Reason | None = None
    detail: str = ""


def find_producer(node: fx.Node) -> Producer | None:
    """The producer of a matmul operand, or None if nothing activation-like feeds it."""
    return _find(node, _MAX_WALK)


def _find(node: object, budget: int) -> Producer | None:
    if not isinstance(node, fx.Node) or node.op != "call_function" or budget == 0:
        return None
    z = activations.as_relu_squared(node)
    if z is not None:
        return Producer(Family.SQUARED, "relu2", node, z)
    z = activations.as_relu(node)
    if z is not None:
        return Producer(Family.PLAIN, "relu", node, z)
    if activations.is_thresholded(node):
        return Producer(Family.MAGNITUDE, "magnitude", node)
    if activations.is_scattered(node):
        return Producer(Family.PLAIN, "scatter", node)
    name = activations.smooth_activation(node)
    if name is not None:
        return _smooth(node, name, budget - 1)
    for targets, walk in _WALKS:
        if node.target in targets:
            return walk(node, budget - 1)
    return None


def _smooth(node: fx.Node, name: str, budget: int) -> Producer:
    """A smooth activation: it makes no zeros, but most of them keep those they get."""
    producer = Producer(Family.PLAIN, name, node)
    if name in activations.ZERO_AT_ZERO:
        inner = (_find(source, budget) for source in node.all_input_nodes)
        found = next((p for p in inner if p is not None and p.reason is None), None)
        if found is not None:
            is_magnitude = found.family is Family.MAGNITUDE
            return dataclasses.replace(
                producer,
                family=found.family if is_magnitude else Family.PLAIN,
                activation=f"{name}({found.activation})",
            )
    why = f"{name} is almost never exactly zero"
    return _refuse(producer, Reason.ACTIVATION_NOT_SPARSE, why)


def _refuse(producer: Producer, reason: Reason, detail: str) -> Producer:
    return dataclasses.replace(producer, reason=reason, detail=detail)


def _first_input(node: fx.Node, budget: int) -> Producer | None:
    if node.target is operator.getitem and node.args[1] != 0:
        split = {aten.split.Tensor, aten.split_with_sizes.default}
        if not is_call(node.args[0], split):
            return None
    return _find(node.args[0], budget)


def _power(node: fx.Node, budget: int) -> Producer | None:
    base = _find(node.args[0], budget)
    if base is None:
        return None
    exponent = 2 if node.target is aten.square.default else node.args[1]
    squared = dataclasses.replace(base, family=Family.SQUARED, node=node)
    if base.reason is not None:
        return squared
    if not isinstance(exponent, (int, float)):
        return _refuse(
            squared, Reason.SYMBOLIC_EXPONENT, "the exponent is not a constant"
        )
    if base.activation not in ("relu", "relu2") and exponent > 0:
        return dataclasses.replace(base, node=node)
    if base.activation == "relu" and exponent == 2:
        return dataclasses.replace(squared, activation="relu2")
    total = exponent * (2 if base.activation == "relu2" else 1)
    return _refuse(squared, Reason.EXPONENT_NOT_TWO, f"relu(x) to the power {total:g}")


def _clip(node: fx.Node, budget: int) -> Producer | None:
    low, high = activations.clip_bounds(node)
    inner = node.args[0]
    relu_inside = isinstance(inner, fx.Node) and activations.as_relu(inner) is not None
    is_relu = relu_inside or (low == 0 and _find(inner, budget) is None)
    if is_relu and high < math.inf:
        name = f"relu clipped at {high:g}"
        clipped = Producer(Family.PLAIN, name, node)
        return _refuse(
            clipped,
            Reason.CLIPPED_ACTIVATION,
            f"the activation is clipped at {high:g}, so it is not a plain relu",
        )
    return _find(inner, budget) if low <= 0 <= high else None


def _where(node: fx.Node, budget: int) -> Producer | None:
    masked = activations.masking(node)
    if masked is None:
        return None
    condition, kept, positive = masked
    test = threshold_test(condition)
    if test is not None and test[0] in positive and isinstance(kept, fx.Node):
        x = source_tensor(test[1])
        if source_tensor(kept) is x:
            rectified = _find(kept, budget)
            if rectified is not None and rectified.reason is None:
                return rectified
            return Producer(Family.PLAIN, "relu", node)
        root = activations.square_root(kept)
        if root is not None and source_tensor(root) is x:
            return Producer(Family.SQUARED, "relu2", node)
    return _find(kept, budget)


def _shift(node: fx.Node, budget: int) -> Producer | None:
    value = tensor_of(node)
    operands = node.args[:2]
    full = [a for a in operands if value is not None and _is_full(a, value)]
    if len(full) != 1:
        return None
    producer = _find(full[0], budget)
    if producer is None:
        return None
    if producer.reason not in (None, Reason.NOT_ZERO_PRESERVING):
        return None
    (other,) = (a for a in operands if a is not full[0])
    if producer.family is Family.SQUARED and _is_scalar(other):
        return _refuse(producer, Reason.NOT_ZERO_PRESERVING, STARRELU)
    return _refuse(producer, Reason.NOT_ZERO_PRESERVING, producer.detail or SHIFTED)


def _layer_norm(node: fx.Node, budget: int) -> Producer | None:
    producer = _find(node.args[0], budget)
    if producer is None or producer.reason is not None:
        return None
    detail = "LayerNorm subtracts the mean, so zeros are lost"
    return _refuse(producer, Reason.NOT_ZERO_PRESERVING, detail)


def _is_scalar(argument: object) -> bool:
    value = tensor_of(argument)
    return not isinstance(argument, fx.Node) or (
        value is not None and all(size == 1 for size in value.shape)
    )


def _is_full(argument: object, product: Tensor) -> TypeGuard[fx.Node]:
    # With a single token a [1, F] gate and an [F] norm weight have as many elements:
    # only the number of dimensions tells a factor from a scale.
    value = tensor_of(argument)
    return value is not None and same_shape(value, product)


@dataclasses.dataclass
class _Factors:
    """The factors of a product, told apart by what they do to its zeros."""

    full: list[tuple[fx.Node, Producer | None]] = dataclasses.field(
        default_factory=list
    )
    positive: list[fx.Node] = dataclasses.field(default_factory=list)
    scaled: bool = False


def _collect(node: fx.Node, into: _Factors, budget: int) -> None:
    product = tensor_of(node)
    assert product is not None
    for argument in node.args[:2]:
        mask = source_tensor(argument) if isinstance(argument, fx.Node) else None
        test = threshold_test(mask)
        if test is not None and test[0] in ("gt", "ge"):
            into.positive.append(source_tensor(test[1]))
        elif _is_dropout_mask(argument) or not _is_full(argument, product):
            into.scaled = True
        elif _is_nested_product(argument):
            _collect(argument, into, budget)
        else:
            into.full.append((argument, _find(argument, budget)))


def _is_dropout_mask(argument: object) -> bool:
    if not isinstance(argument, fx.Node):
        return False
    mask, _ = peel(argument, VIEWS | CASTS | _DIVS)
    value = tensor_of(mask)
    drawn = is_call(mask, {aten.bernoulli.p, aten.bernoulli.default})
    return drawn or (value is not None and value.dtype == torch.bool)


def _is_nested_product(node: object) -> TypeGuard[fx.Node]:
    return (
        is_call(node, _MULS)
        and activations.as_relu_squared(node) is None
        and not activations.is_thresholded(node)
        and activations.smooth_activation(node) is None
    )


def _product(node: fx.Node, budget: int) -> Producer | None:
    if tensor_of(node) is None:
        return None
    factors = _Factors()
    _collect(node, factors, budget)
    base = _base(factors)
    if base is None:
        return _product_without_relu(node, factors)
    degree, others, gate = 0, [], None
    for leaf, producer in factors.full:
        power = _power_of(leaf, producer, base)
        degree += power
        if power == 0:
            others.append((leaf, producer))
        elif producer is not None:
            gate = leaf
    if degree == 0:
        return None
    if degree > 2:
        cubed = Producer(Family.SQUARED, "relu", node)
        detail = f"relu(x) to the power {degree}"
        return _refuse(cubed, Reason.EXPONENT_NOT_TWO, detail)
    activation = "relu2" if degree == 2 else "relu"
    if not others:
        family = Family.SQUARED if degree == 2 else Family.PLAIN
        return Producer(family, activation, node)
    up, up_producer = others[0]
    sparse_up = up_producer is not None and up_producer.reason is None
    name = f"{activation}*{up_producer.activation if sparse_up else 'up'}"
    single = len(factors.full) == 2 and not factors.scaled and not factors.positive
    pair = (gate, up) if single and gate is not None else (None, None)
    return Producer(Family.GATED, name, node, gate=pair[0], up=pair[1])


def _base(factors: _Factors) -> fx.Node | None:
    """The ``x`` of the ``relu(x)`` or the ``(x > 0)`` in a product."""
    for _, producer in factors.full:
        if producer is not None and producer.reason is None and producer.z is not None:
            return source_tensor(producer.z)
    for x in factors.positive:
        if any(_power_of(leaf, producer, x) for leaf, producer in factors.full):
            return x
    return None


def _power_of(leaf: fx.Node, producer: Producer | None, base: fx.Node) -> int:
    if producer is not None and producer.z is not None and producer.reason is None:
        same = source_tensor(producer.z) is base
        return (2 if producer.family is Family.SQUARED else 1) if same else 0
    if source_tensor(leaf) is base:
        return 1
    root = activations.square_root(leaf)
    return 2 if root is not None and source_tensor(root) is base else 0


def _product_without_relu(node: fx.Node, factors: _Factors) -> Producer | None:
    found = [producer for _, producer in factors.full if producer is not None]
    if not found:
        return None
    found.sort(key=lambda producer: producer.reason is not None)
    best = found[0]
    if len(factors.full) == 1 or best.family is Family.GATED or best.gate is not None:
        return best
    kind = best.family if best.family is Family.MAGNITUDE else Family.GATED
    product = dataclasses.replace(best, family=kind, node=node)
    if best.reason is not None:
        return product
    others = [p.activation for p in found if p is not best and p.reason is None]
    name = "*".join([best.activation, *(others or ["up"])])
    product = dataclasses.replace(product, activation=name)
    if len(factors.full) > 2 or factors.scaled or factors.positive:
        return product
    gate, up = (leaf for leaf, _ in factors.full)
    gate, up = (gate, up) if factors.full[0][1] is best else (up, gate)
    return dataclasses.replace(product, gate=gate, up=up)


def _minimum(node: fx.Node, budget: int) -> Producer | None:
    a, b = input_of(node), input_of(node, 1)
    for argument, other in ((a, b), (b, a)):
        if activations.as_relu(argument) is not None:
            bound, _ = peel(other, VIEWS | CASTS)
            if is_call(bound, _CONSTANTS):
                clipped = Producer(Family.PLAIN, "relu clipped", node)
                detail = "the activation is clipped, so it is not a plain relu"
                return _refuse(clipped, Reason.CLIPPED_ACTIVATION, detail)
    return None


_CONSTANTS = frozenset(
    {aten.full.default, aten.full_like.default, aten.scalar_tensor.default}
)
_CLIPS = frozenset(
    {
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.hardtanh.default,
    }
)
_WALKS = (
    (_MULS, _product),
    (_POWS, _power),
    (_CLIPS, _clip),
    ({aten.minimum.default}, _minimum),
    ({aten.where.self, aten.index_put.default}, _where),
    (_SHIFTS, _shift),
    ({aten.native_layer_norm.default}, _layer_norm),
    (_ZERO_TO_ZERO, _first_input),
)
