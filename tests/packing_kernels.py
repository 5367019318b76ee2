"""The Triton kernels that pack 2:4, run by Triton's interpreter."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton_interpreter import Interpreter

from inductor_sparse import formats, ops
from inductor_sparse.runtime import sparsify24_cuda
from inductor_sparse.runtime.sparsify24_cuda import Selection

INF, NAN = math.inf, math.nan
FORMATS = (torch.int8, torch.float8_e4m3fn)


def awkward(M: int, K: int, dtype: torch.dtype, finite: bool = False) -> Tensor:
    """Ties, both zeros and numbers too small to square; NaN and Inf if allowed."""
    generator = torch.Generator().manual_seed(M * K)
    x = torch.randn(M, K, generator=generator) * 2
    some: list[float] = [1.0, 1.0, -1.0, 0.0, -0.0, 1e-7, -1e-30]
    some += [] if finite else [NAN, -NAN, INF, -INF]
    which = torch.randint(2 * len(some), (M, K), generator=generator)
    for i, value in enumerate(some):
        x[which == i] = value
    return x.to(dtype)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether all bits agree, those of NaN aside; the first may be on a GPU."""
    actual = actual.cpu()
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    nan = actual.float().isnan() & expected.float().isnan()
    return bool(((actual.view(bits) == expected.view(bits)) | nan).all())


def packed(M: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Results for a kernel to write, filled with what it must overwrite."""
    values = torch.ones(formats.values_shape(M, K)).to(dtype)
    return values, torch.full(formats.metadata_shape(M, K), -1, dtype=torch.int32)


def select(
    interpreter: Interpreter,
    x: Tensor,
    activation: str,
    select: str,
    programs: int | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(values, metadata, energy)`` as the kernel computes them.

    With ``programs`` only of so many tiles.
    """
    M, K = x.shape
    gate = x if up is None else up
    block = sparsify24_cuda.BLOCK_K
    energy = torch.zeros(ops.ENERGY_SLOTS, 2, dtype=torch.float64)
    results = interpreter.run(
        (*sparsify24_cuda.SELECT_TEXT, "sparsify24_eager"),
        "sparsify24_kernel",
        (programs or -(-M // 64) * -(-K // block),),
        *(x, gate, *packed(M, K, x.dtype), energy, M, K, *x.stride(), *gate.stride()),
        **Selection(activation, select, up is not None).constants(),
        EVEN_K=K % block == 0,
        HAS_ENERGY=True,
        BLOCK_K=block,
    )
    return tuple(results[2:5])


def quantize(
    interpreter: Interpreter,
    x: Tensor,
    way: tuple[str, str],
    dtype: torch.dtype,
    plan: sparsify24_cuda.RowPlan,
    energy: Tensor | None = None,
    blocks: int | None = None,
    paired: bool | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``(values, metadata, row_scale, energy)`` as the kernel computes them.

    With ``blocks`` only of so many blocks of 64 rows.
    """
    M, K = x.shape
    gate, selection = x if up is None else up, Selection(*way, up is not None)
    if paired is None:
        paired = selection.is_paired(x.dtype, even=K % 2 == 0)
    results = (*packed(M, K, dtype), torch.full((M,), -1.0))
    left = interpreter.run(
        (*sparsify24_cuda.QUANTIZED_TEXT, "sparsify24_quantized_eager"),
        "sparsify24_quantized_kernel",
        ((blocks or -(-M // 64)) * 64,),
        *(x, gate, *results, results[2] if energy is None else energy),
        *(M, K, *x.stride(), *gate.stride()),
        **selection.constants(),
        FLOAT8=dtype != torch.int8,
        PAIRED=paired,
        EVEN_K=K % plan.block_k == 0,
        HAS_ENERGY=energy is not None,
        BLOCK_K=plan.block_k,
        WHOLE=plan.whole,
    )
    return tuple(left[2:6])


def quantizable(K: int, dtype: torch.dtype) -> Tensor:
    """A row of every kind that has a rule of its own."""
    x = awkward(9, K, dtype, finite=True)
    x[1], x[2], x[3, 1], x[4, 2] = 0.0, -0.0, NAN, INF
    x[5, ::2] = -1e-9  # rounded away, and stored as +0.0
    x[6] *= 1e-37
    x[7] = torch.arange(K) - K // 2  # exact ties in int8
    x[7, 0] = 127
    return x


def assert_quantized(
    interpreter: Interpreter,
    x: Tensor,
    way: tuple[str, str],
    whole: bool,
    dtype: torch.dtype,
    up: Tensor | None = None,
) -> None:
    """Whether the kernel quantizes and packs as the op defines it, bit for bit.

    It holds ``whole`` rows, or reads them twice in pieces.
    """
    plan = sparsify24_cuda.row_plan(x.shape[1])
    if not whole:
        plan = plan._replace(whole=False, block_k=64)
    results = quantize(interpreter, x, way, dtype, plan, up=up)
    expected = ops.sparsify24_quantized(x, *way, dtype, up=up)
    assert torch.equal(results[1], expected[1])
    assert same_bits(results[0], expected[0])
    assert same_bits(results[2], expected[2])
