"""``glu_spmm`` of few tokens on a GPU: two Triton kernels.

The first computes the hidden values, reading only rows of ``w_up`` whose gate is open
for one of the tokens; the second is ``activation_spmm`` of the result, which skips the
neurons that are zero for whatever reason.

Shape legend: ``M`` rows (tokens), ``D`` input features, ``F`` neurons, ``N`` outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    realize_inputs,
)

from inductor_sparse.lowerings import activation_spmm_cuda, dependent_launch


@dataclasses.dataclass(frozen=True)
class UpTile:
    """How the hidden values are cut into programs; the names are the template's."""

    BM: int
    LOCAL: int
    ROWS: int
    BD: int
    PARTS: int
    STAGES: int
    DOT: bool
    num_warps: int


_LOCAL = {1: 64, 2: 32, 4: 32, 8: 16}
"""Tokens of a program -> its neurons.  At a tenth of non-zeros nearly all programs then
find no more of them than they read at a time, and need no second turn."""

_DOT_PARTS = {1: 4, 2: 4, 4: 4, 8: 1}
"""Tokens of a program -> its warps, if they use tensor cores.  Warps that share a tile
would all multiply the same, so each has features of its own, or a program to itself."""

_STAGES = {1: 4, 2: 3, 4: 3, 8: 4}
"""Tokens of a program -> loads of it that are in flight, if it uses tensor cores."""


def choose_up_tile(
    tokens: int | None, D: int, dtype: torch.dtype, *, amd: bool = False
) -> UpTile:
    """The tile for ``tokens`` rows, or for an unknown number of them (None).

    Args:
        tokens: rows of one product.
        D: input features.
        dtype: of the operands.
        amd: whether the compiler is that of AMD, which spills the registers of gfx950
            with more than two stages.
    """
    most = activation_spmm_cuda.MAX_TOKENS
    power_of_2 = activation_spmm_cuda.power_of_2
    block = most if tokens is None else min(most, power_of_2(tokens))
    dot = dtype.itemsize == 2
    parts = _DOT_PARTS[block] if dot else 1
    warps = parts if dot else 4
    row_bytes = warps * activation_spmm_cuda.WARP_BYTES
    features = 128 if dot else row_bytes // dtype.itemsize
    return UpTile(
        BM=block,
        LOCAL=_LOCAL[block] if dot else 32,
        ROWS=16 if dot else 4,
        BD=max(16, min(features, power_of_2(D))),
        PARTS=parts,
        STAGES=2 if amd else _STAGES[block] if dot else 4,
        DOT=dot,
        num_warps=warps,
    )


@SymbolicGridFn
def _grid(m: Any, f: Any, meta: Any, *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(f, meta["LOCAL"]), cdiv(m, meta["BM"]), 1)


def helper_text() -> str:
    """The functions of the first kernel: plain Triton, nothing of Inductor in it."""
    return activation_spmm_cuda.text("glu_spmm_helpers")


TEMPLATE = TritonTemplate(
    name="glu_spmm_up",
    grid=_grid,
    source=activation_spmm_cuda.text("glu_spmm_up", "glu_spmm_helpers"),
)


def product(
    gate: ir.TensorBox,
    x: ir.TensorBox,
    w_up: ir.TensorBox,
    w_down: ir.TensorBox,
    activation: str,
    counters: ir.TensorBox | None = None,
) -> ir.TensorBox:
    """The result ``[M, N]``; shapes as :func:`inductor_sparse.reference.glu_spmm`.

    The neurons of the down projection are counted: the open gates, but for a few.
    """
    gate, x, w_up = inputs = realize_inputs(gate, x, w_up)
    M, F = gate.get_size()
    dtype = gate.get_dtype()
    tokens = activation_spmm_cuda.most(M)
    features = activation_spmm_cuda.size_hint(w_up.get_size()[1])
    amd = torch.version.hip is not None
    tile = choose_up_tile(tokens, features, dtype, amd=amd)
    layout = ir.FixedLayout(gate.get_device(), dtype, [M, F])
    hidden = activation_spmm_cuda.choose(
        TEMPLATE,
        inputs,
        layout,
        ACTIVATION=repr(activation),
        DOT_DTYPE=activation_spmm_cuda.DOT_DTYPES[dtype],
        num_stages=tile.STAGES,
        **dependent_launch.options(layout.device),
        **dataclasses.asdict(tile),
    )
    return activation_spmm_cuda.product(hidden, w_down, "identity", counters)
