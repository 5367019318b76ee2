"""All matmuls of a ReLU or ReLU² FFN in 8 bits, the last one packed 2:4.

``mm(act(mm(x, w1)), w2)`` becomes, with weights quantized once and kept,

- ``x8, sx = quantize_rows(x)``
- ``z = _scaled_mm(x8, w1_8, sx, s1)`` in fp8, ``_int_mm`` and its scales in int8
- ``values, metadata, sz = sparsify24_quantized(z, act)``
- ``sparse24_mm(values, metadata, w2_8, sz, s2)``

A gated FFN has a second ``z``, by which ``act(z)`` is multiplied as it is packed.

Each row of an activation and each output feature of a weight has its own scale.  If it
may be predicted instead of taken from the largest value of ``act(z)``, the first matmul
packs, and nothing of 16 bits is written:

- ``sz = predicted_scale(x8, sx, ...)``, from norms
- ``values, metadata = linear_sparsify24_quantized(x8, sx, w1_8, s1, bias, sz, act)``

For a few tokens the weight of a site that skips zeros may have 8 bits as well, and each
of the rows that are skipped its own scale.

Shape legend: M tokens, D model, F hidden, N output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from inductor_sparse import reference
from inductor_sparse._compat import decide
from inductor_sparse.passes.emit import (
    emit_activation_spmm,
    first_equal,
    scaled_and_shifted,
    shared_call,
    shared_items,
)
from inductor_sparse.passes.fx_utils import (
    ORDERED_VIEWS,
    aten,
    insert_call,
    insert_traced,
    is_call,
    peel,
    prims,
    replace,
)
from inductor_sparse.passes.gpu_obstacles import kernel_obstacle
from inductor_sparse.passes.packing import (
    READ_ELSEWHERE,
    WINDOWS,
    Packable,
    fusable_linear,
    has_bias_by_feature,
    is_only_read_by,
    read_factors,
    read_packable,
)
from inductor_sparse.passes.producers import Family
from inductor_sparse.passes.sites import MATMULS, Rejection, Site, read_site
from inductor_sparse.passes.weights import Copy, static_window

if TYPE_CHECKING:
    from inductor_sparse.passes.base import PassContext

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""What the ``sparse.quantize`` option names."""

_STEP = 16
"""8-bit products read 16 bytes at a time: every size is a multiple of this."""

_INT8_MIN_TOKENS = 17
"""``_int_mm`` refuses fewer rows on a GPU."""
_INT8_MAX_K = reference.INT8_MAX_K // 2
"""Above this a sum of products of int8 may overflow; a packed operand has half of
them, so that its limit is higher."""

_OPERANDS = (aten.mm.default, aten.addmm.default)
_ops = torch.ops.inductor_sparse
_READERS = MATMULS | {_ops.sparsify24_quantized.default}
"""What may read a product that is multiplied before it is packed, as in int8."""


@dataclasses.dataclass(frozen=True)
class First:
    """A matmul before the activation, and the window ``[F, D]`` of its weight."""

    site: Site
    weight: Copy


@dataclasses.dataclass(frozen=True)
class QuantizedFfn:
    """The parts of an FFN that runs in 8 bits.

    ``firsts`` are the matmuls before the activation: one, with a gate two, and none if
    another site of the same activation has rewritten them.  ``w2`` is the window
    ``[N, F]`` of the weight behind it.  ``predicted`` says whether the first one packs,
    with scales that are predicted, and ``note`` why it does not although that was asked
    for.
    """

    dtype: torch.dtype
    firsts: tuple[First, ...]
    w2: Copy
    predicted: bool = False
    note: str = ""

    @property
    def dtype_name(self) -> str:
        """The dtype of the operands, as in ``"float8_e4m3fn"``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        """The memory held by its quantized weights."""
        return quantized_bytes(self.w2, *(first.weight for first in self.firsts))


def read_ffn(site: Site, context: PassContext) -> QuantizedFfn | str:
    """The FFN whose last matmul is ``site``, or why it cannot be quantized."""
    dtype = DTYPES[str(context.option("quantize"))]
    if site.matmul.target not in _OPERANDS or site.dtype == "float32":
        return "only a ReLU or ReLU² FFN in bfloat16 or float16 can be"
    if dtype == torch.float8_e4m3fn and site.dtype != "bfloat16":
        return "fp8 products with per-row scales need a bfloat16 model"
    product, _ = peel(site.lhs, ORDERED_VIEWS)
    # Where they lie does not matter yet: the matmuls before are about to be others.
    factors = read_factors(site) if is_only_read_by(product, _READERS) else None
    packable = factors or read_packable(site, replaced=False)
    w2 = _stored(site, dtype, context)
    if isinstance(w2, str):
        return w2
    if packable.activation == "identity":
        return "something lies between the activation and its matmul"
    firsts = _read_firsts(packable, product, dtype, context)
    if isinstance(firsts, str):
        return firsts
    # Under "auto" so few tokens are not packed; "2:4" packs any number of them.
    forced = dtype == torch.int8 and context.option("activation_format") == "2:4"
    if any(forced and not decide(f.site.sizes[0] >= _INT8_MIN_TOKENS) for f in firsts):
        return f"products of int8 need {_INT8_MIN_TOKENS} tokens or more"
    ffn = QuantizedFfn(dtype, firsts, w2)
    return _with_scales(ffn, site, packable, context)


def _read_firsts(
    packable: Packable, product: fx.Node, dtype: torch.dtype, context: PassContext
) -> tuple[First, ...] | str:
    """The matmuls whose results are activated or multiplied, if not yet rewritten."""

    def activates(reader: fx.Node) -> bool:
        return is_call(reader, {aten.relu.default})

    def multiplies(reader: fx.Node) -> bool:
        return reader is product

    readers = {peel(packable.z, WINDOWS)[0]: [activates]}
    if packable.up is not None:
        # One matmul may compute both.
        readers.setdefault(peel(packable.up, WINDOWS)[0], []).append(multiplies)
    firsts = []
    for core, tests in readers.items():
        if core.meta.get(_DONE) == dtype:
            continue
        first = read_site(core)
        if first is None or core.target not in _OPERANDS:
            return "the activation is not that of a linear layer"
        if not _all_readers(core, tests):
            return "the layer before the activation is read by something else"
        weight = _stored(first, dtype, context)
        if isinstance(weight, str):
            return weight
        firsts.append(First(first, weight))
    # In the order of the graph, so that the second finds the rows of the first.
    return tuple(sorted(firsts, key=lambda one: one.site.matmul))


def _with_scales(
    ffn: QuantizedFfn, site: Site, packable: Packable, context: PassContext
) -> QuantizedFfn:
    """The same with predicted scales, if these are asked for and possible."""
    if context.option("quantize_scales") != "predicted":
        return ffn
    why = _prediction_obstacle(ffn, site, packable, context)
    if why is not None:
        return dataclasses.replace(ffn, note=f"; scales not predicted: {why}")
    return dataclasses.replace(ffn, predicted=True, note="; scales predicted")


def _prediction_obstacle(
    ffn: QuantizedFfn, site: Site, packable: Packable, context: PassContext
) -> str | None:
    """Why the first matmul cannot pack what it computes, or None."""
    if ffn.dtype != torch.float8_e4m3fn:
        return "int8 has no exponent that could absorb a loose bound"
    if packable.up is not None:
        return "the activation is a gate"
    if not ffn.firsts:
        return READ_ELSEWHERE
    linear = fusable_linear(packable.z, site)
    if isinstance(linear, str):
        return linear
    arch = context.architecture(site.matmul.meta["val"].device)
    ops = ("linear_sparsify24_quantized",)
    obstacle = kernel_obstacle(ops, ffn.dtype_name, arch, context)
    return None if obstacle is None else obstacle.detail


_DONE = "inductor_sparse_quantized"
"""``node.meta`` key: the dtype in which a matmul before an activation now runs."""


def _all_readers(node: fx.Node, tests: Sequence[Callable[[fx.Node], bool]]) -> bool:
    """Whether all readers of a node, however it is viewed, pass one of the tests."""
    return all(
        any(test(user) for test in tests)
        or (is_call(user, WINDOWS) and _all_readers(user, tests))
        for user in node.users
    )


def _stored(site: Site, dtype: torch.dtype, context: PassContext) -> Copy | str:
    """The window ``[N, K]`` of the parameter behind the weight of a site."""
    found = static_window(site.rhs, context)
    if isinstance(found, Rejection):
        return found.detail
    if any(size % _STEP for size in found.size):
        return f"K and N of every matmul must be multiples of {_STEP}"
    if dtype == torch.int8 and site.sizes[1] > _INT8_MAX_K:
        return f"sums of more than {_INT8_MAX_K} products of int8 may overflow"
    return dataclasses.replace(
        found, size=found.size[::-1], stride=found.stride[::-1], dtype=dtype
    )


def emit_quantized_ffn(site: Site, ffn: QuantizedFfn) -> fx.Node:
    """Insert the last product of an FFN, packed and in 8 bits; replace those before."""
    before = site.matmul
    emit = _emit_fused if ffn.predicted else _emit_packing
    values, metadata, row_scale = emit(site, ffn)
    w_FN, scale_N = _emit_weight(ffn.w2, before)
    return insert_call(
        before,
        _ops.sparse24_mm.default,
        (values, metadata, w_FN, row_scale, scale_N),
        {"out_dtype": before.meta["val"].dtype},
    )


def _emit_packing(site: Site, ffn: QuantizedFfn) -> tuple[fx.Node, ...]:
    """``(values, metadata, row_scale)`` by a kernel behind the first matmuls."""
    for first in ffn.firsts:
        _emit_first(first, ffn.dtype)
    # The operands are others now, and the producer is read anew.
    packable = read_packable(dataclasses.replace(site))
    target = _ops.sparsify24_quantized.default
    return shared_items(packable.emit(target, site.matmul, ffn.dtype), 3, site.matmul)


def _emit_fused(site: Site, ffn: QuantizedFfn) -> tuple[fx.Node, ...]:
    """``(values, metadata, row_scale)`` by the first matmul itself."""
    before, (one,) = site.matmul, ffn.firsts
    first = one.site
    packable = read_packable(site)
    activation, select = packable.activation, packable.select
    rows = shared_call(before, _ops.quantize_rows.default, (first.lhs, ffn.dtype))
    weight = shared_call(before, _ops.quantized_weight.default, one.weight.args)
    x, w1 = shared_items(rows, 2, before), shared_items(weight, 3, before)
    bias = () if first.bias is None else (first.bias,)
    row_scale = insert_traced(before, _predicted(activation), (*x, w1[2], *bias))
    arguments = (*x, *w1[:2], first.bias, row_scale, activation, select)
    target = _ops.linear_sparsify24_quantized.default
    packed = insert_call(before, target, arguments)
    return (*shared_items(packed, 2, before), row_scale)


def _predicted(activation: str) -> Callable[..., Tensor]:
    """``predicted_scale`` for an activation, as a function of tensors alone."""

    def scale(x: Tensor, x_scale: Tensor, norm: Tensor, *bias: Tensor) -> Tensor:
        given = bias[0] if bias else None
        return reference.predicted_scale(x, x_scale, norm, given, activation)

    return scale


def quantized_bytes(*windows: Copy) -> int:
    """The memory held by quantized windows of weights, each row with its scale."""
    sizes = (window.size for window in windows)
    return sum(rows * columns + 4 * rows for rows, columns in sizes)


def read_rows(site: Site, arch: str, context: PassContext) -> Copy | str:
    """The window ``[K, N]`` whose rows a site that skips zeros may read in 8 bits.

    Or why they are read as they are, although ``sparse.quantize`` asks for 8 bits.
    """
    dtype = DTYPES[str(context.option("quantize"))]
    if context.option("activation_format") == "exact":
        return "sparse.activation_format allows only exact rewrites"
    if site.dtype == "float32":
        return "only those of a bfloat16 or float16 weight are"
    if site.producer is not None and site.producer.family is Family.GATED:
        return "only those of a plain ReLU or ReLU² FFN are"
    if context.is_training:
        return "the graph has a backward"
    name = str(dtype).removeprefix("torch.")
    obstacle = kernel_obstacle(("activation_spmm",), name, arch, context)
    if obstacle is not None:
        return obstacle.detail
    found = static_window(site.rhs, context)
    if isinstance(found, Rejection):
        return found.detail
    return dataclasses.replace(found, dtype=dtype)


def emit_quantized_rows(site: Site, window: Copy) -> fx.Node:
    """Insert a product that skips zeros, with rows quantized once."""
    return emit_activation_spmm(site, *_emit_quantized(window, site.matmul))


def _emit_quantized(window: Copy, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """``(values, scale)``: a window of a weight, its rows quantized."""
    node = shared_call(before, _ops.quantized_weight.default, window.args)
    values, scale = shared_items(node, 2, before)
    return values, scale


def _emit_weight(window: Copy, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """``(w [K, N], scale [N])``: the transposed view is what a product wants."""
    values, scale = _emit_quantized(window, before)
    return shared_call(before, aten.permute.default, (values, [1, 0])), scale


def _emit_first(one: First, dtype: torch.dtype) -> None:
    """Replace a matmul before the activation by its 8-bit form."""
    first, before = one.site, one.site.matmul
    x = first_equal(first.lhs)
    rows = shared_call(before, _ops.quantize_rows.default, (x, dtype))
    x_MD, scale_M = shared_items(rows, 2, before)
    w_DF, scale_F = _emit_weight(one.weight, before)
    column = insert_call(before, aten.unsqueeze.default, (scale_M, 1))
    row = insert_call(before, aten.unsqueeze.default, (scale_F, 0))
    product = _fp8_product if dtype == torch.float8_e4m3fn else _int8_product
    result = product(first, x_MD, w_DF, column, row)
    result.meta[_DONE] = dtype
    replace(before, result)


def _fp8_product(
    first: Site, x_MD: fx.Node, w_DF: fx.Node, column: fx.Node, row: fx.Node
) -> fx.Node:
    before, out = first.matmul, first.matmul.meta["val"].dtype
    inside = first.beta == first.alpha == 1 and has_bias_by_feature(first)
    args = (x_MD, w_DF, column, row, first.bias if inside else None, None, out, True)
    result = insert_call(before, aten._scaled_mm.default, args)
    return result if inside else scaled_and_shifted(first, result)


def _int8_product(
    first: Site, x_MD: fx.Node, w_DF: fx.Node, column: fx.Node, row: fx.Node
) -> fx.Node:
    before, cast = first.matmul, prims.convert_element_type.default
    sums = insert_call(before, aten._int_mm.default, (x_MD, w_DF))
    wide = insert_call(before, cast, (sums, torch.float32))
    for scale in (column, row):
        wide = insert_call(before, aten.mul.Tensor, (wide, scale))
    wide = scaled_and_shifted(first, wide)
    return insert_call(before, cast, (wide, before.meta["val"].dtype))
