"""``sparsify24`` and ``sparsify24_quantized`` on a GPU: Triton templates.

One read of the activation, one write of each result.  A template has one output of its
own, the smallest; the other results are buffers that it writes into.

Shape legend: ``M`` rows, ``K`` columns, ``S`` stored values of a row, ``R`` and ``C``
blocks of 64 rows and of 64 columns.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, lowerings
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    realize_inputs,
)
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

from inductor_sparse import formats, templates
from inductor_sparse.lowerings import activation_spmm_cuda, common, hopper
from inductor_sparse.runtime import sparsify24_cuda
from inductor_sparse.runtime.sparsify24_cuda import Selection

SPARSIFY24 = common.op("sparsify24")
QUANTIZED = common.op("sparsify24_quantized")


@SymbolicGridFn
def _tiles(r: Any, c: Any, w: Any, meta: dict[str, Any], *, cdiv: Any) -> Any:
    return (r * cdiv(c * formats.BLOCK, meta["BLOCK_K"]), 1, 1)


@SymbolicGridFn
def _padded_rows(m: Any, meta: dict[str, Any], *, cdiv: Any) -> Any:
    # Rows beyond M have metadata.
    return (cdiv(m, formats.BLOCK) * formats.BLOCK, 1, 1)


def _template(name: str, grid: Any, helpers: tuple[str, ...]) -> TritonTemplate:
    parts = [templates.load(f"triton/{part}.py.jinja") for part in (name, *helpers)]
    return TritonTemplate(name=name, grid=grid, source="\n\n".join(parts))


SPARSIFY24_TEMPLATE = _template("sparsify24", _tiles, sparsify24_cuda.SELECT_TEXT)
QUANTIZED_TEMPLATE = _template(
    "sparsify24_quantized", _padded_rows, sparsify24_cuda.QUANTIZED_TEXT
)


def tuned_sparsify24(
    x: ir.TensorBox,
    activation: str,
    select: str,
    energy: ir.TensorBox | None = None,
    up: ir.TensorBox | None = None,
) -> tuple[ir.TensorBox, ir.TensorBox]:
    """Lower ``sparsify24``: ``(values [M, S], metadata [R, C, 128])``."""
    if not _can_generate(x):
        return common.fallback(SPARSIFY24)(x, activation, select, energy, up)
    selection = Selection(activation, select, up is not None)
    M, K = x.get_size()
    values = _empty(_values_shape(M, K), x.get_dtype(), x)
    columns = _known(K)
    block = sparsify24_cuda.BLOCK_K
    metadata = _run(
        SPARSIFY24_TEMPLATE,
        ir.FixedLayout(x.get_device(), torch.int32, _metadata_shape(M, K)),
        x,
        [values],
        [up, energy],
        EVEN_K=columns is not None and columns % block == 0,
        BLOCK_K=block,
        num_warps=sparsify24_cuda.NUM_WARPS,
        HAS_ENERGY=energy is not None,
        **selection.constants(),
    )
    return values, metadata


def tuned_sparsify24_quantized(
    x: ir.TensorBox,
    activation: str,
    select: str,
    dtype: torch.dtype,
    energy: ir.TensorBox | None = None,
    up: ir.TensorBox | None = None,
) -> tuple[ir.TensorBox, ir.TensorBox, ir.TensorBox]:
    """Lower ``sparsify24_quantized``: ``(values, metadata, row_scale [M])``."""
    if not _can_generate(x, dtype):
        return common.fallback(QUANTIZED)(x, activation, select, dtype, energy, up)
    selection = Selection(activation, select, up is not None)
    M, K = x.get_size()
    values = _empty(_values_shape(M, K), dtype, x)
    metadata = _empty(_metadata_shape(M, K), torch.int32, x)
    columns = _known(K)
    plan = sparsify24_cuda.row_plan(columns)
    x = realize_inputs(x)
    # Inductor stores to a single element without a mask, and the rows beyond M, which
    # have metadata only, would do that too.
    rows = formats.BLOCK if M == 1 else M
    row_scale = _run(
        QUANTIZED_TEMPLATE,
        ir.FixedLayout(x.get_device(), torch.float32, [rows]),
        x,
        [values, metadata],
        [up, energy],
        FLOAT8=dtype == torch.float8_e4m3fn,
        PAIRED=selection.is_paired(x.get_dtype(), even=_has_even_rows(x)),
        EVEN_K=columns is not None and columns % plan.block_k == 0,
        WHOLE=plan.whole,
        BLOCK_K=plan.block_k,
        num_warps=plan.num_warps,
        HAS_ENERGY=energy is not None,
        **selection.constants(),
    )
    return values, metadata, lowerings[common.aten.slice.Tensor](row_scale, 0, 0, M)


def _run(
    template: TritonTemplate,
    layout: ir.FixedLayout,
    x: ir.TensorBox,
    results: list[ir.TensorBox],
    optional: list[ir.TensorBox | None],
    **constants: Any,
) -> ir.TensorBox:
    """The output of ``template`` called on ``x``, what it writes, and more inputs.

    Energies are none of the mutated: what the runtime keeps is added to, not replaced.
    """
    given = [one for one in optional if one is not None]
    written = realize_inputs(*results, x, *given)
    buffers, others = written[: len(results)], written[len(results) :]
    return activation_spmm_cuda.choose(
        template,
        [others[0], *buffers, *others[1:]],
        layout,
        mutated_inputs=buffers,
        num_stages=1,
        **constants,
    )


def _known(size: Any) -> int | None:
    """A size if it is a number, None for a symbol."""
    return int(size) if isinstance(size, (int, sympy.Integer)) else None


def _has_even_rows(x: ir.TensorBox) -> bool:
    """Whether rows in memory are contiguous pairs, each at a multiple of its size."""
    row_stride, column_stride = x.get_stride()
    even = V.graph.sizevars.statically_known_multiple_of
    return (
        column_stride == 1
        and even(row_stride, 2)
        and even(x.get_size()[1], 2)
        and hopper.is_aligned(x)
    )


def _values_shape(M: Any, K: Any) -> list[Any]:
    """As :func:`formats.values_shape`, of Inductor's symbols."""
    return [M, CeilDiv(K, formats.BLOCK) * (formats.BLOCK // 2)]


def _metadata_shape(M: Any, K: Any) -> list[Any]:
    """As :func:`formats.metadata_shape`, of Inductor's symbols."""
    return [CeilDiv(M, formats.BLOCK), CeilDiv(K, formats.BLOCK), formats.WORDS]


def _empty(shape: list[Any], dtype: torch.dtype, x: ir.TensorBox) -> ir.TensorBox:
    """An uninitialized contiguous buffer on the device of ``x``."""
    stride = ir.FlexibleLayout.contiguous_strides(shape)
    return empty_strided(shape, stride, dtype=dtype, device=x.get_device())


def _can_generate(x: ir.TensorBox, dtype: torch.dtype | None = None) -> bool:
    """Whether the templates take ``x``: on a GPU, not empty, in Python wrappers."""
    device = x.get_device()
    if device.type != "cuda" or V.graph.cpp_wrapper or 0 in x.get_size():
        return False
    if x.get_dtype() not in sparsify24_cuda.DTYPES:
        return False
    return dtype != torch.float8_e4m3fn or sparsify24_cuda.has_e4m3(device)


def register() -> None:
    """Register the lowerings with Inductor; calling it again changes nothing."""
    common.register(SPARSIFY24, tuned_sparsify24)
    common.register(QUANTIZED, tuned_sparsify24_quantized)
