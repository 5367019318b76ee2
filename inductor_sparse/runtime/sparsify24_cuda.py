"""``sparsify24`` and ``sparsify24_quantized`` on a GPU outside compiled graphs.

The kernels are those that Inductor compiles into a graph, from the same text; what they
are given, block sizes included, is decided here for both.  Without triton, or for what
the kernels do not take, the eager definitions of the ops serve.

Importing this module registers them, once for the life of the process.

Shape legend: ``M`` rows, ``K`` columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inductor_sparse import formats, ops, reference
from inductor_sparse.runtime import triton_text

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of activations that the kernels take."""

SELECT_TEXT = ("select24", "sparsify24_tile")
QUANTIZED_TEXT = ("select24", "select24_pairs", "sparsify24_quantized_tile")

BLOCK_K = 64
NUM_WARPS = 4
"""Columns and warps of a program of ``sparsify24``; its rows are always 64."""

LARGEST_WHOLE_ROW = 32768
"""Columns up to which a program of ``sparsify24_quantized`` holds its row."""

_NON_NEGATIVE = 0
_ORDERS = {"largest_abs": 1, "largest": 2}
"""How the kernels compare; values that cannot be negative need less."""


class RowPlan(NamedTuple):
    """How a program of ``sparsify24_quantized`` goes through its row."""

    whole: bool
    block_k: int
    num_warps: int


def row_plan(features: int | None) -> RowPlan:
    """How rows are gone through; one that fits into registers is read once.

    Args:
        features: columns of a row; None where that is not known.
    """
    if features is None or features > LARGEST_WHOLE_ROW:
        return RowPlan(whole=False, block_k=8192, num_warps=8)
    block = max(formats.BLOCK, 1 << (features - 1).bit_length())
    # 32 values of a thread in short rows, so that there are warps; 64 in long ones.
    num_warps = max(1, min(4, block // 1024), block // 2048)
    return RowPlan(whole=True, block_k=block, num_warps=num_warps)


class Selection(NamedTuple):
    """What is selected from, and how; see :func:`inductor_sparse.ops.sparsify24`.

    ``gated``: whether the activation is multiplied by another matrix.
    """

    activation: str
    select: str
    gated: bool = False

    def constants(self) -> dict[str, bool | int]:
        """What the kernels want to know of it."""
        signed = self.gated or self.activation == "identity"
        return {
            "RELU": self.activation != "identity",
            "SQUARE": self.activation == "relu2",
            "GATED": self.gated,
            "ORDER": _ORDERS[self.select] if signed else _NON_NEGATIVE,
        }

    def is_paired(self, dtype: torch.dtype, *, even: bool) -> bool:
        """Whether ``sparsify24_quantized`` handles two groups at a time.

        Args:
            dtype: of the activation.
            even: whether rows are contiguous, begin at multiples of 4 bytes and have an
                even number of columns.
        """
        by_value = self.constants()["ORDER"] == _ORDERS["largest"]
        able = even and dtype.itemsize == 2 and not self.gated and not by_value
        return able and torch.version.hip is None  # its text has PTX in it


def has_even_rows(x: Tensor) -> bool:
    """Whether 16-bit numbers lie as :meth:`Selection.is_paired` calls even."""
    row_stride, column_stride = x.stride()
    odd = row_stride % 2 or x.shape[1] % 2 or x.data_ptr() % 4
    return column_stride == 1 and not odd


def takes(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernels take ``x``, and give ``dtype`` on its device."""
    if x.dtype not in DTYPES or not x.numel() or not triton_text.available():
        return False
    return dtype != torch.float8_e4m3fn or has_e4m3(x.device)


def has_e4m3(device: torch.device) -> bool:
    """Whether the GPU converts to e4m3, and Triton for it."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (
        8,
        9,
    )


def sparsify24(
    x: Tensor,
    activation: str,
    select: str,
    energy: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`inductor_sparse.ops.sparsify24`; ``energy`` is added to."""
    if not takes(x):
        return ops.sparsify24(x, activation, select, energy, up)
    ops.check_energy("sparsify24", energy)
    reference.check_sparsify24(x, activation, select, up)
    selection, gate = Selection(activation, select, up is not None), _or(up, x)
    M, K = x.shape
    values = x.new_empty(formats.values_shape(M, K))
    metadata = x.new_empty(formats.metadata_shape(M, K), dtype=torch.int32)
    kernel = triton_text.load(*SELECT_TEXT, "sparsify24_eager").sparsify24_kernel
    tiles = metadata.shape[0] * -(-K // BLOCK_K)
    with torch.cuda.device(x.device):
        kernel[(tiles,)](
            *(x, gate, values, metadata, _or(energy, values)),
            *(M, K, *x.stride(), *gate.stride()),
            **selection.constants(),
            EVEN_K=K % BLOCK_K == 0,
            HAS_ENERGY=energy is not None,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
        )
    return values, metadata


def sparsify24_quantized(
    x: Tensor,
    activation: str,
    select: str,
    dtype: torch.dtype,
    energy: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`inductor_sparse.ops.sparsify24_quantized`; ``energy`` is added to."""
    op = "sparsify24_quantized"
    if not takes(x, dtype):
        return ops.sparsify24_quantized(x, activation, select, dtype, energy, up)
    ops.check_energy(op, energy)
    reference.check_sparsify24_quantized(x, activation, select, dtype, up)
    selection, gate = Selection(activation, select, up is not None), _or(up, x)
    M, K = x.shape
    values = x.new_empty(formats.values_shape(M, K), dtype=dtype)
    metadata = x.new_empty(formats.metadata_shape(M, K), dtype=torch.int32)
    scales = x.new_empty(M, dtype=torch.float32)
    module = triton_text.load(*QUANTIZED_TEXT, f"{op}_eager")
    plan = row_plan(K)
    with torch.cuda.device(x.device):
        module.sparsify24_quantized_kernel[(metadata.shape[0] * formats.BLOCK,)](
            *(x, gate, values, metadata, scales, _or(energy, scales)),
            *(M, K, *x.stride(), *gate.stride()),
            **selection.constants(),
            FLOAT8=dtype == torch.float8_e4m3fn,
            PAIRED=selection.is_paired(x.dtype, even=has_even_rows(x)),
            EVEN_K=K % plan.block_k == 0,
            HAS_ENERGY=energy is not None,
            BLOCK_K=plan.block_k,
            WHOLE=plan.whole,
            num_warps=plan.num_warps,
        )
    return values, metadata, scales


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    """An optional argument of a kernel, or one that it never reads."""
    return other if given is None else given


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
_library.impl("sparsify24", sparsify24, "CUDA")
_library.impl("sparsify24_quantized", sparsify24_quantized, "CUDA")
