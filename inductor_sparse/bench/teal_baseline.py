"""A masked-load product for decoding, in the style of TEAL (arXiv 2408.14690).

Benchmark only: what one gets without a list of active rows.  Every program owns a tile
of the weight, loads its rows under a mask that is false where no token is active, and
adds its partial sums to the output with atomics.  Two liberties, both in its favour:
rows are shared by all tokens (the original is for one), and the sums stay in float32,
which spares it the conversion.

Shape legend: ``M`` tokens, ``F`` hidden features, ``N`` outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inductor_sparse.bench.models import Down, FeedForward, Model

Kernel = Callable[[Tensor], Tensor]

TILES = ((16, 512), (32, 256), (64, 128), (128, 64))
"""Rows and columns of a program's tile of the weight, to choose among."""


@triton.jit
def masked_spmm(
    z_ptr,  # noqa: ANN001
    w_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    F,  # noqa: ANN001
    N,  # noqa: ANN001
    M: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Add ``act(z) @ w`` of one tile of ``w [F, N]`` to ``out [M, N]`` float32."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    active = tl.zeros((BLOCK_F,), dtype=tl.int1)
    for m in tl.static_range(M):
        active |= tl.load(z_ptr + m * F + f, mask=f < F, other=0.0) > 0
    mask = active[:, None] & (n < N)[None, :]
    offset = f.to(tl.int64)[:, None] * N + n[None, :]
    w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        h = tl.load(z_ptr + m * F + f, mask=f < F, other=0.0).to(tl.float32)
        h = tl.maximum(h, 0.0)
        if SQUARE:
            h = h * h
        tl.atomic_add(out_ptr + m * N + n, tl.sum(h[:, None] * w, axis=0), mask=n < N)


@dataclasses.dataclass(frozen=True)
class MaskedLoad:
    """The kernel with one tile size; ``w_FN`` row-contiguous."""

    w_FN: Tensor
    activation: str
    block_f: int
    block_n: int

    def __call__(self, z_MF: Tensor) -> Tensor:
        """``act(z) @ w``, ``[M, N]`` float32."""
        M = z_MF.shape[0]
        F, N = self.w_FN.shape
        out_MN = torch.zeros(M, N, dtype=torch.float32, device=z_MF.device)
        grid = (triton.cdiv(F, self.block_f), triton.cdiv(N, self.block_n))
        launch: Any = masked_spmm[grid]
        square = self.activation == "relu2"
        sizes = (F, N, M, square, self.block_f, self.block_n)
        launch(z_MF, self.w_FN, out_MN, *sizes)
        return out_MN


def candidates(model: Model) -> dict[str, Kernel]:
    """``{tile: call}`` for a model without gating; empty for a gated one.

    The first product of a whole FFN is torch's own, as its input is not sparse.
    """
    if isinstance(model, FeedForward) and model.up is not None:
        return {}
    w_FN = model.down.weight.detach().t().contiguous()
    calls = {}
    for block_f, block_n in TILES:
        kernel = MaskedLoad(w_FN, model.activation, block_f, block_n)
        calls[f"{block_f}x{block_n}"] = _whole(model, kernel)
    return calls


def _whole(model: Model, kernel: MaskedLoad) -> Kernel:
    """The kernel behind whatever comes before it in the model."""
    if isinstance(model, Down):
        return kernel
    weight_DF = model.gate.weight.detach().t()
    return lambda x_MD: kernel(torch.mm(x_MD, weight_DF))
