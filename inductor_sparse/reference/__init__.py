"""The eager definition of every op: the specification, and the oracle of the tests.

Nothing here is fast.  Every kernel agrees with these functions: bit for bit where
values are only selected, within an error budget taken from float64 elsewhere.  Three
rules hold for all of them:

- **A zero is skipped.**  A zero activation never touches the weight, so 0 * Inf and
  0 * NaN contribute nothing.  NaN and Inf in the activation propagate as usual.
- **Rounding follows eager.**  An activation, and the product of a gate, is rounded to
  the dtype of its input before it is multiplied; sums of bfloat16 and float16 products
  are accumulated in float32 and rounded once.
- **-0.0 is a zero.**

The 2:4 functions speak of a plain ``index`` tensor; how it becomes metadata words is
the subject of :mod:`inductor_sparse.formats`.

Shape legend: ``B`` batch, ``M`` rows (tokens), ``K`` reduction, ``N`` output features,
``D`` model features, ``F`` hidden features, ``G`` groups of four along K, ``S`` stored
values of a row under 2:4, half of K rounded up to a multiple of 64.
"""

from __future__ import annotations

from inductor_sparse.reference.domain import (
    ACTIVATIONS,
    BLOCK,
    DTYPES,
    GROUP,
    INT8_MAX_K,
    KEPT,
    QUANTIZED_LIMITS,
    SELECTS,
    accumulation_dtype,
    activation,
    check_activation,
    check_activation_spmm,
    check_dtypes,
    check_glu_spmm,
    check_linear_sparsify24,
    check_linear_sparsify24_quantized,
    check_quantize_rows,
    check_select,
    check_shape,
    check_sparse24_mm,
    check_sparsify24,
    check_sparsify24_quantized,
    check_window,
    result_dtype24,
    strided_extent,
)
from inductor_sparse.reference.matmul import (
    activation_spmm,
    glu_spmm,
    row_major_weight,
    sparse24_mm,
)
from inductor_sparse.reference.quantized import (
    linear_sparsify24_quantized,
    predicted_scale,
    quantize_rows,
    scaled_linear,
    sparsify24_quantized,
)
from inductor_sparse.reference.selection import density, dropped_energy, sparsify24
from inductor_sparse.reference.windows import quantized_weight, window_gradient

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "DTYPES",
    "GROUP",
    "INT8_MAX_K",
    "KEPT",
    "QUANTIZED_LIMITS",
    "SELECTS",
    "accumulation_dtype",
    "activation",
    "activation_spmm",
    "check_activation",
    "check_activation_spmm",
    "check_dtypes",
    "check_glu_spmm",
    "check_linear_sparsify24",
    "check_linear_sparsify24_quantized",
    "check_quantize_rows",
    "check_select",
    "check_shape",
    "check_sparse24_mm",
    "check_sparsify24",
    "check_sparsify24_quantized",
    "check_window",
    "density",
    "dropped_energy",
    "glu_spmm",
    "linear_sparsify24_quantized",
    "predicted_scale",
    "quantize_rows",
    "quantized_weight",
    "result_dtype24",
    "row_major_weight",
    "scaled_linear",
    "sparse24_mm",
    "sparsify24",
    "sparsify24_quantized",
    "strided_extent",
    "window_gradient",
]
