"""``quantize_rows``: a Triton kernel, or Inductor's own IR where that fuses.

A matrix that Inductor is about to compute (by a norm, say) is quantized by IR: what
comes before, the reduction and the cast become one kernel, and the wide matrix is never
written.  IR reads its rows twice, the second time out of cache; a matrix that is in
memory already is read once, by a kernel that holds a row in registers.

Every step is one correctly rounded float32 operation, as the op demands.  Triton's own
division is not: in IR the instruction is asked for by name.

Shape legend: ``M`` rows, ``K`` columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import (
    empty_strided,
    lowerings,
    make_pointwise,
    to_dtype,
)
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    realize_inputs,
)
from torch._inductor.virtualized import ops

from inductor_sparse import reference, templates
from inductor_sparse.lowerings import activation_spmm_cuda, common
from inductor_sparse.reference import quantized

OP = common.op("quantize_rows")

MAX_ROW = 32768
"""Values of a row that the registers of one program hold."""

_TRITON_NAMES = {torch.int8: "tl.int8", torch.float8_e4m3fn: "tl.float8e4nv"}

_ROUNDS_TO_ZERO = 2.0**-10
"""Half of the smallest e4m3 number; the tie goes to zero, the even one."""


@SymbolicGridFn
def _grid(m: Any, k: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (m, 1, 1)


TEMPLATE = TritonTemplate(
    name="quantize_rows",
    grid=_grid,
    source="\n\n".join(
        templates.load(f"triton/{part}.py.jinja")
        for part in ("quantize_rows", "quantize_rows_helpers")
    ),
)


def tuned_quantize_rows(
    x: ir.TensorBox, dtype: torch.dtype
) -> tuple[ir.TensorBox, ir.TensorBox]:
    """Lower ``quantize_rows``: ``(values [M, K], scale [M])``."""
    device = x.get_device().type
    if not _can_generate(device, x, dtype):
        return common.fallback(OP)(x, dtype)
    if device == "cuda" and _in_memory(x) and _fits(x):
        return _one_read(x, dtype)
    return _as_ir(x, dtype)


def _as_ir(x: ir.TensorBox, dtype: torch.dtype) -> tuple[ir.TensorBox, ir.TensorBox]:
    """A reduction, and pointwise work behind it."""
    limit = reference.QUANTIZED_LIMITS[dtype]
    divide = _divide_on(x.get_device().type)
    wide_MK = to_dtype(x, torch.float32)
    amax_M1 = lowerings[common.aten.amax.default](
        lowerings[common.aten.abs.default](wide_MK), [1], True
    )
    # Written once a row, not computed again for each of its values.
    amax_M1.realize()

    def scale(amax: object) -> object:
        quotient = divide(_at_least_smallest(amax), _constant(limit))
        return _one_for_zero(amax, quotient)

    def inverse(amax: object) -> object:
        quotient = divide(_constant(limit), _at_least_smallest(amax))
        return _one_for_zero(amax, quotient)

    def stored(value: object, amax: object) -> object:
        return _round(ops.mul(value, inverse(amax)), limit, dtype)

    scale_M1 = make_pointwise(scale)(amax_M1)
    amax_MK = lowerings[common.aten.expand.default](amax_M1, x.get_size())
    values_MK = make_pointwise(stored, override_return_dtype=dtype)(wide_MK, amax_MK)
    return values_MK, lowerings[common.aten.squeeze.dim](scale_M1, 1)


def _one_read(x: ir.TensorBox, dtype: torch.dtype) -> tuple[ir.TensorBox, ir.TensorBox]:
    """The Triton kernel: one program for each row."""
    M, K = x.get_size()
    device = x.get_device()
    scale = empty_strided([M], [1], dtype=torch.float32, device=device)
    x, scale_M = realize_inputs(x, scale)
    block = activation_spmm_cuda.power_of_2(int(K))
    values = activation_spmm_cuda.choose(
        TEMPLATE,
        [x, scale_M],
        ir.FixedLayout(device, dtype, [M, K]),
        mutated_inputs=[scale_M],
        BLOCK_K=block,
        LIMIT=reference.QUANTIZED_LIMITS[dtype],
        SMALLEST=quantized.SMALLEST_AMAX,
        DTYPE=_TRITON_NAMES[dtype],
        num_stages=1,
        num_warps=4 if block < MAX_ROW else 8,
    )
    return values, scale


def _in_memory(x: ir.TensorBox) -> bool:
    """Whether nothing that Inductor generates could be fused with reading ``x``."""
    data = x.data
    while isinstance(data, (ir.BaseView, ir.MutableBox)):
        data = data.data
    written_by_inductor = (ir.Loops, ir.ComputedBuffer)
    return not isinstance(data, written_by_inductor)


def _fits(x: ir.TensorBox) -> bool:
    """Whether a program can hold a row; its length must be known."""
    K = x.get_size()[1]
    return isinstance(K, (int, sympy.Integer)) and K <= MAX_ROW


def _can_generate(device: str, x: ir.TensorBox, dtype: torch.dtype) -> bool:
    """Whether Inductor has code for the cast, and there is anything to reduce."""
    if x.get_dtype() not in common.CPP_DTYPES or 0 in x.get_size():
        return False
    if device == "cuda" and torch.version.hip is None:
        e4m3 = torch.cuda.get_device_capability(x.get_device()) >= (8, 9)
        return dtype == torch.int8 or e4m3
    return device == "cpu"


def _divide_on(device: str) -> Callable[[Any, Any], Any]:
    if device == "cpu":
        return ops.truediv
    return lambda a, b: ops.inline_asm_elementwise(
        a, b, asm="div.rn.f32 $0, $1, $2;", constraints="=f,f,f", dtype=torch.float32
    )


def _constant(value: float) -> object:
    return ops.constant(value, torch.float32)


def _at_least_smallest(amax: object) -> object:
    # Not a maximum: the comparison is false for NaN, which stays.
    smallest = _constant(quantized.SMALLEST_AMAX)
    return ops.where(ops.lt(amax, smallest), smallest, amax)


def _one_for_zero(amax: object, quotient: object) -> object:
    return ops.where(ops.eq(amax, _constant(0.0)), _constant(1.0), quotient)


def _round(scaled: object, limit: float, dtype: torch.dtype) -> object:
    high, low = _constant(limit), _constant(-limit)
    scaled = ops.where(ops.gt(scaled, high), high, scaled)
    scaled = ops.where(ops.lt(scaled, low), low, scaled)
    zero = _constant(0.0)
    if dtype == torch.int8:
        number = ops.where(ops.ne(scaled, scaled), zero, scaled)
        return ops.to_dtype(ops.round(number), dtype)
    # A zero is stored as +0.0, also where a negative value is rounded away.
    vanishes = ops.le(ops.abs(scaled), _constant(_ROUNDS_TO_ZERO))
    return ops.to_dtype(ops.where(vanishes, zero, scaled), dtype)


def register() -> None:
    """Register the lowering with Inductor; calling it again changes nothing."""
    common.register(OP, tuned_quantize_rows)
