"""Small questions about FX nodes of an aten graph, and safe ways to change it."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Container
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

if TYPE_CHECKING:
    from typing import TypeGuard

aten = torch.ops.aten
prims = torch.ops.prims

ORDERED_VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.alias.default,
        aten.detach.default,
    }
)
"""Views that keep the row-major order of the elements."""

VIEWS = ORDERED_VIEWS | frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.clone.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
    }
)
"""Ops whose result holds elements of their input, each with its value."""

_CUTS = frozenset({aten.slice.Tensor, aten.select.int})
CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})

_SWAPPED = ([1, 0], [-1, 0], [1, -2], [-1, -2])
_ZEROS = frozenset(
    {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
)
_COMPARES = frozenset({aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar})
_TENSOR_COMPARES = frozenset(
    {aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor}
)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_MODULE_PREFIX = re.compile(
    r"^(L__self__|[LG]\['[^']*'\](\.__closure__\[\d+\]\.cell_contents)?)\.?"
)
_MODULE_ITEM = re.compile(r"(?:\._modules)?\['?([^'\]]+)'?\]")
COMPOSED_KEY = "inductor_sparse_composed"
"""``node.meta`` key of matmuls that had another form, and have it again if no rule
rewrites them: what that was."""

# eager_input_vals are arguments: Inductor would read ours by another op's schema.
_NOT_INHERITED = frozenset(
    {
        *("val", "tensor_meta", "eager_input_vals"),
        *("inductor_sparse_site", "inductor_sparse_operand", COMPOSED_KEY),
    }
)
_TORCH_FOLDER = str(Path(torch.__file__).parent)


def is_call(node: object, targets: Container[Any]) -> TypeGuard[fx.Node]:
    """Whether ``node`` is a call of one of ``targets``."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target in targets
    )


def input_of(node: fx.Node, position: int = 0) -> fx.Node:
    """An argument of a node that is known to be a node itself."""
    argument = node.args[position]
    assert isinstance(argument, fx.Node)
    return argument


def tensor_of(node: object) -> Tensor | None:
    """The fake tensor a node stands for, or None if it is not one tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are known to be equal without adding a guard."""
    return bool(statically_known_true(a == b))


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes are known to be equal without adding a guard."""
    return a.ndim == b.ndim and all(map(same_size, a.shape, b.shape))


def is_row_major(value: Tensor) -> bool:
    """Whether the elements are known to lie one behind the other, adding no guard."""
    expected: int | torch.SymInt = 1
    for dim in reversed(range(value.ndim)):
        size = value.shape[dim]
        if not same_size(size, 1) and not same_size(value.stride(dim), expected):
            return False
        expected = expected * size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are known to have equal strides."""
    return all(map(same_size, a.stride(), b.stride()))


def peel(node: fx.Node, targets: Container[Any]) -> tuple[fx.Node, list[fx.Node]]:
    """Walk back through single-input ops: where it ends, and the nodes passed."""
    passed: list[fx.Node] = []
    while is_call(node, targets):
        passed.append(node)
        node = input_of(node)
    return node, passed


def source_tensor(node: fx.Node) -> fx.Node:
    """The node under any views and casts: what decides where zeros come from.

    A part is a tensor of its own: two of them, as of a matmul that computes a gate and
    its factor, have nothing to do with each other.
    """
    return peel(node, (VIEWS | CASTS) - _CUTS)[0]


def is_cast(node: object) -> TypeGuard[fx.Node]:
    """Whether a node only changes the dtype: a copy to another device is no cast."""
    if not is_call(node, CASTS):
        return False
    to, source = tensor_of(node), tensor_of(node.args[0])
    return to is not None and source is not None and to.device == source.device


def is_widening(cast: object) -> bool:
    """Whether a node is a cast between floating dtypes that loses nothing."""
    if not is_cast(cast):
        return False
    to, source = cast.meta["val"].dtype, input_of(cast).meta["val"].dtype
    if not (to.is_floating_point and source.is_floating_point):
        return False
    if 1 in (to.itemsize, source.itemsize):  # torch promotes no 8-bit floats
        return to == source
    return torch.promote_types(source, to) == to


def with_dtype(node: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
    """The value of ``node`` in ``dtype`` if widening casts hide it, else None."""
    while node is not None:
        value = tensor_of(node)
        if value is None:
            return None
        if value.dtype == dtype:
            return node
        node = input_of(node) if is_widening(node) else None
    return None


def is_transposition(node: object) -> TypeGuard[fx.Node]:
    """Whether a node swaps the dimensions of a matrix: ``permute(0, 1)`` does not."""
    value = tensor_of(node)
    if value is None or value.ndim != 2:
        return False
    if is_call(node, {aten.permute.default}):
        return node.args[1] in _SWAPPED
    return is_call(node, {aten.t.default})


def is_zero(value: object) -> bool:
    """Whether an argument is 0, or a node known to be a tensor of zeros."""
    if isinstance(value, (int, float)):
        return value == 0
    if not isinstance(value, fx.Node):
        return False
    node, _ = peel(value, VIEWS | CASTS)
    if is_call(node, {aten.full.default, aten.full_like.default}):
        return bool(node.args[1] == 0)
    if is_call(node, {aten.scalar_tensor.default}):
        return bool(node.args[0] == 0)
    if is_call(node, _ZEROS):
        return True
    if node.op == "get_attr" and node.graph.owning_module is not None:
        constant = getattr(node.graph.owning_module, str(node.target), None)
        real = isinstance(constant, Tensor) and not isinstance(constant, FakeTensor)
        if not real or constant.numel() != 1:
            return False
        with unset_fake_temporarily():  # passes run where tensors are made fake
            return bool(constant.item() == 0)
    return False


def selection(node: object) -> tuple[Any, Any, Any] | None:
    """``(condition, if_true, if_false)`` of ``where``, and of ``x[condition] = y``."""
    if is_call(node, {aten.where.self}):
        condition, if_true, if_false = node.args
        return condition, if_true, if_false
    if not is_call(node, {aten.index_put.default}) or True in node.args[3:]:
        return None
    x, indices, value = node.args[:3]
    if not isinstance(indices, (list, tuple)) or len(indices) != 1:
        return None
    whole, mask = tensor_of(x), tensor_of(indices[0])
    if whole is None or mask is None or not same_shape(mask, whole):
        return None
    return indices[0], value, x


def sign_test(node: object) -> tuple[str, fx.Node] | None:
    """``("gt", x)`` for a node comparing ``x`` with zero by gt, ge, lt or le."""
    return threshold_test(node, largest=0.0)


def threshold_test(
    node: object, largest: float = math.inf
) -> tuple[str, fx.Node] | None:
    """As :func:`sign_test`, also for constants above zero, up to ``largest``."""
    if not is_call(node, _COMPARES):
        return None
    x, threshold = node.args[:2]
    constant = 0.0 if is_zero(threshold) else threshold
    if not isinstance(x, fx.Node) or not isinstance(constant, (int, float)):
        return None
    return (op_name(node), x) if 0 <= constant <= largest else None


def magnitude_test(node: object) -> tuple[str, fx.Node] | None:
    """``("gt", x)`` for a node comparing ``|x|`` with anything but a constant up to 0.

    ``x`` is without views and casts.
    """
    if not is_call(node, _COMPARES | _TENSOR_COMPARES):
        return None
    magnitude, threshold = node.args[:2]
    if is_zero(threshold) or (isinstance(threshold, (int, float)) and threshold < 0):
        return None
    core = source_tensor(magnitude) if isinstance(magnitude, fx.Node) else None
    if not is_call(core, {aten.abs.default}):
        return None
    return op_name(node), source_tensor(input_of(core))


def op_name(node: fx.Node) -> str:
    """The name of the op a node calls, without namespace and overload."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target.overloadpacket.__name__


def module_path(node: fx.Node) -> str:
    """The module that ran this node, as in ``named_modules()``; "" if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return ""
    # Behind a module that the graph sets attributes of, Dynamo asks its dictionary.
    spelled = str(entries[-1][0]).replace(".__dict__['_modules']", "._modules")
    path = _MODULE_PREFIX.sub("", spelled)
    path = _MODULE_ITEM.sub(r".\1", path).replace("_orig_mod.", "")
    return path.removeprefix("_modules").removeprefix(".")


def source_line(node: fx.Node) -> str:
    """``file.py:line`` of the innermost frame of user code; "" if unknown."""
    trace = node.meta.get("stack_trace") or ""
    for match in reversed(list(_FRAME.finditer(trace))):
        if not match["file"].startswith(_TORCH_FOLDER):
            return f"{Path(match['file']).name}:{match['line']}"
    return ""


def plain_value(argument: Any) -> Any:
    """What node arguments stand for: a node's fake value, anything else itself."""
    return fx.node.map_arg(argument, lambda node: node.meta["val"])


def insert_call(
    before: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """Insert a call before a node, with its fake value and that node's origin."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    # Everything inherited: the partitioner reads tags of recomputation, for one.
    node.meta.update(
        {key: meta for key, meta in before.meta.items() if key not in _NOT_INHERITED}
    )
    values, named = plain_value(args), plain_value(kwargs or {})
    with torch._guards.detect_fake_mode(values) or nullcontext():
        node.meta["val"] = target(*values, **named)
    return node


def insert_traced(
    before: fx.Node, function: Callable[..., Tensor], args: tuple[fx.Node, ...]
) -> fx.Node:
    """Insert what a function of tensors computes, as the aten ops that it calls."""
    values = plain_value(args)
    with torch._guards.detect_fake_mode(values) or nullcontext():
        traced = make_fx(function, select_decomp_table())(*values).graph
    # Decompositions that gave up leave their first steps behind.
    traced.eliminate_dead_code()
    made = dict(zip(traced.find_nodes(op="placeholder"), args, strict=True))
    for node in traced.nodes:
        if callable(node.target):
            at = fx.node.map_arg(node.args, made.__getitem__)
            made[node] = insert_call(before, node.target, at, dict(node.kwargs))
    return made[traced.output_node().args[0]]


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let ``new`` take every use of ``old``, then erase what nothing uses any more."""
    old.replace_all_uses_with(new)
    erase_dead(old)


def erase_dead(node: fx.Node) -> None:
    """Erase a pure node without users, and in turn the inputs that only it used.

    Nodes that nobody used before are none of our business, and are left alone; so are
    random ops, because removing one would change every number drawn after it.
    """
    erased: set[fx.Node] = set()
    pending = [node]
    while pending:
        dead = pending.pop()
        if dead in erased or dead.users or not _is_pure(dead):
            continue
        erased.add(dead)
        pending.extend(dead.all_input_nodes)
        dead.graph.erase_node(dead)


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not random and not target._schema.is_mutable


def changing_input(
    graph: fx.Graph, device: torch.device, static_inputs: frozenset[str]
) -> fx.Node | None:
    """An input that freezing does not fold: a tensor of the device, not a parameter."""
    for node in graph.find_nodes(op="placeholder"):
        value = tensor_of(node)
        if (
            node.name not in static_inputs
            and value is not None
            and value.device == device
        ):
            return node
    return None
