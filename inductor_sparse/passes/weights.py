"""The right operand of a site in the row-contiguous layout that skipping needs.

``nn.Linear`` stores ``[N, K]``, so that a row of ``W.T [K, N]`` is scattered over the
whole weight.  If the operand is a parameter, one ``row_major_weight`` node makes the
copy and the runtime keeps it; an autocast to a lower precision goes into it too.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_sparse._compat import discards_parameters
from inductor_sparse.decisions import Reason
from inductor_sparse.passes.fx_utils import (
    CASTS,
    ORDERED_VIEWS,
    aten,
    insert_call,
    is_call,
    is_cast,
    peel,
    plain_value,
    tensor_of,
)
from inductor_sparse.passes.sites import Rejection

if TYPE_CHECKING:
    from inductor_sparse.passes.base import PassContext

_PURE_VIEWS = ORDERED_VIEWS | frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
    }
)
_MUTATIONS = frozenset({aten.copy_.default, aten.set_.source_Tensor})


@dataclasses.dataclass(frozen=True)
class Copy:
    """A row-contiguous copy of a window of a parameter, to be made when it is used."""

    weight: fx.Node
    size: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype, as in ``"bfloat16"``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def args(self) -> tuple[object, ...]:
        """The arguments of the ``row_major_weight`` op."""
        return (
            self.weight,
            list(self.size),
            list(self.stride),
            self.storage_offset,
            self.dtype,
        )


Weight = fx.Node | Copy


def is_row_contiguous(value: Tensor) -> bool:
    """Whether each matrix of ``[.., K, N]`` is known to be stored row after row."""
    rows, columns = value.stride()[-2:]
    return bool(
        statically_known_true(columns == 1)
        and statically_known_true(rows == value.shape[-1])
    )


def resolve_weight(rhs: fx.Node, context: PassContext) -> Weight | Rejection:
    """How to have ``rhs [.., K, N]`` row-contiguous: as it is, as a copy, or not."""
    value = tensor_of(rhs)
    assert value is not None
    weight, chain = peel(rhs, _PURE_VIEWS | CASTS)
    casts = any(is_call(node, CASTS) for node in chain)
    folds_cast = casts and _is_static(weight, context)
    may_copy = bool(context.option("weight_copies"))
    if is_row_contiguous(value) and not (folds_cast and may_copy):
        return rhs
    return static_window(rhs, context)


def static_window(rhs: fx.Node, context: PassContext) -> Copy | Rejection:
    """The window of a parameter that ``rhs`` shows, if a copy of it may be kept."""
    value = tensor_of(rhs)
    assert value is not None
    weight, chain = peel(rhs, _PURE_VIEWS | CASTS)
    casts = [node for node in chain if is_call(node, CASTS)]
    if not _is_static(weight, context):
        return _not_static("it is computed, or passed in as an argument")
    if weight.name in context.untracked_inputs:
        return Rejection(
            Reason.WEIGHT_UNTRACKED,
            "a change to the weight would not be noticed: it was made under "
            "inference_mode, or fully_shard gathers it in each call",
        )
    if not context.option("weight_copies"):
        return _not_static("the sparse.weight_copies option is off")
    written = (user.args[0] for user in weight.users if is_call(user, _MUTATIONS))
    if any(target is weight for target in written):
        return _not_static("the compiled function itself changes it")
    if len(casts) > 1 or not all(map(is_cast, casts)):
        return _not_static("it is cast more than once, or moved between devices")
    return _window(weight, chain, value)


def _is_static(weight: fx.Node, context: PassContext) -> bool:
    return weight.op == "get_attr" or weight.name in context.static_inputs


def _not_static(why: str) -> Rejection:
    return Rejection(
        Reason.WEIGHT_NOT_STATIC,
        f"the weight is not row-contiguous, and no copy of it can be kept: {why}",
    )


def _window(weight: fx.Node, chain: list[fx.Node], value: Tensor) -> Copy | Rejection:
    # The views are replayed on the weight itself: a cast between them has its own
    # storage, and what we need is where the elements are in the weight's.
    view = base = tensor_of(weight)
    if base is None:
        return _not_static("its layout is unknown")
    views = [node for node in reversed(chain) if not is_call(node, CASTS)]
    try:
        with torch._guards.detect_fake_mode(base) or nullcontext():
            for node in views:
                assert callable(node.target)
                view = node.target(view, *plain_value(node.args[1:]))
    except RuntimeError:
        return _not_static("its views do not apply before the cast")
    assert view is not None
    offset = view.storage_offset() - base.storage_offset()
    sizes = (*view.shape, *view.stride())
    same_storage = view.untyped_storage()._cdata == base.untyped_storage()._cdata
    known = all(isinstance(size, int) for size in sizes)
    if not same_storage or not isinstance(offset, int) or not known:
        return _not_static("its size is symbolic, or it is not a view of a parameter")
    return Copy(weight, tuple(view.shape), view.stride(), offset, value.dtype)


def emit_weight(weight: Weight, before: fx.Node) -> fx.Node:
    """The node holding the weight, inserted before another node if it is a copy.

    A second site that needs the same copy of a tied weight shares the node.
    """
    if isinstance(weight, fx.Node):
        return weight
    target = torch.ops.inductor_sparse.row_major_weight.default
    for user in weight.weight.users:
        if is_call(user, {target}) and tuple(user.args) == weight.args:
            if before < user:
                before.prepend(user)
            return user
    return insert_call(before, target, weight.args)


def copy_bytes(product: fx.Node, replaced: fx.Node) -> int:
    """The memory that copies of weights take which this node is the first to use.

    None if freezing erases the original: ``replaced`` was the last to read that.
    """
    target = torch.ops.inductor_sparse.row_major_weight.default
    copies = [
        tensor_of(source)
        for source in product.all_input_nodes
        if is_call(source, {target})
        and len(source.users) == 1
        and not (discards_parameters() and _only_copied(source, replaced))
    ]
    return sum(copy.numel() * copy.itemsize for copy in copies if copy is not None)


def _only_copied(copy: fx.Node, replaced: fx.Node) -> bool:
    """Whether nothing but a copy reads its weight once a node is gone."""
    users = set(copy.all_input_nodes[0].users) - {copy}
    while users:
        user = users.pop()
        if is_call(user, _PURE_VIEWS | CASTS):
            users.update(user.users)
        elif user is not replaced:
            return False
    return True
