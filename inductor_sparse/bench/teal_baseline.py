"""A masked-load product for decoding, in the style of TEAL (arXiv 2408.14690).

Benchmark only: what one gets without a list of active rows.  Every program owns a tile
of the weight, loads its rows under a mask that is false where no token is active, and
adds its partial sums to the output with atomics.  Two liberties, both in its favour:
rows are shared by all tokens (the original is for one), and the sums stay in float32,
which spares it the conversion.  A gated FFN reads both of its skippable weights so.

Shape legend: ``M`` tokens, ``D`` features, ``F`` hidden features, ``N`` outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inductor_sparse.bench.models import Down, Model

Kernel = Callable[[Tensor], Tensor]

TILES = ((16, 512), (32, 256), (64, 128), (128, 64))
"""Rows and columns of a program's tile of the weight, to choose among."""


@triton.jit
def _active(z_ptr, f, F, M: tl.constexpr):  # noqa: ANN001, ANN202
    """Which hidden features ``f`` any token has above zero in ``z [M, F]``."""
    active = tl.zeros(f.shape, dtype=tl.int1)
    for m in tl.static_range(M):
        active |= tl.load(z_ptr + m * F + f, mask=f < F, other=0.0) > 0
    return active


@triton.jit
def masked_spmm(
    z_ptr,  # noqa: ANN001
    up_ptr,  # noqa: ANN001
    w_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    F,  # noqa: ANN001
    N,  # noqa: ANN001
    M: tl.constexpr,
    SQUARE: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Add ``(act(z) [* up]) @ w`` of one tile of ``w [F, N]`` to ``out [M, N]``."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = _active(z_ptr, f, F, M)[:, None] & (n < N)[None, :]
    offset = f.to(tl.int64)[:, None] * N + n[None, :]
    w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        h = tl.load(z_ptr + m * F + f, mask=f < F, other=0.0).to(tl.float32)
        h = tl.maximum(h, 0.0)
        if SQUARE:
            h = h * h
        if GATED:
            h = h * tl.load(up_ptr + m * F + f, mask=f < F, other=0.0)
        tl.atomic_add(out_ptr + m * N + n, tl.sum(h[:, None] * w, axis=0), mask=n < N)


@triton.jit
def masked_rows(
    z_ptr,  # noqa: ANN001
    x_ptr,  # noqa: ANN001
    w_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    F,  # noqa: ANN001
    D,  # noqa: ANN001
    M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Add ``x @ w^T`` of one tile of ``w [F, D]`` to ``out [M, F]`` where z is active.

    All that is float32 is ``out``.
    """
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    active = _active(z_ptr, f, F, M)
    offset = f.to(tl.int64)[:, None] * D + d[None, :]
    mask = active[:, None] & (d < D)[None, :]
    w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        x = tl.load(x_ptr + m * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.atomic_add(out_ptr + m * F + f, tl.sum(x[None, :] * w, axis=1), mask=active)


@dataclasses.dataclass(frozen=True)
class MaskedLoad:
    """The kernel with one tile size; ``w_FN`` row-contiguous."""

    w_FN: Tensor
    activation: str
    block_f: int
    block_n: int

    def __call__(self, z_MF: Tensor, up_MF: Tensor | None = None) -> Tensor:
        """``(act(z) [* up]) @ w``, ``[M, N]`` float32; ``up`` is float32 as well."""
        M = z_MF.shape[0]
        F, N = self.w_FN.shape
        out_MN = torch.zeros(M, N, dtype=torch.float32, device=z_MF.device)
        grid = (triton.cdiv(F, self.block_f), triton.cdiv(N, self.block_n))
        launch: Any = masked_spmm[grid]
        gated = up_MF is not None
        kinds = (self.activation == "relu2", gated, self.block_f, self.block_n)
        launch(z_MF, up_MF if gated else z_MF, self.w_FN, out_MN, F, N, M, *kinds)
        return out_MN

    def up(self, z_MF: Tensor, x_MD: Tensor, w_FD: Tensor) -> Tensor:
        """``x @ w^T`` where any token is active, else 0: ``[M, F]`` float32."""
        M, D = x_MD.shape
        F = len(w_FD)
        out_MF = torch.zeros(M, F, dtype=torch.float32, device=z_MF.device)
        grid = (triton.cdiv(F, self.block_f), triton.cdiv(D, self.block_n))
        launch: Any = masked_rows[grid]
        launch(z_MF, x_MD, w_FD, out_MF, F, D, M, self.block_f, self.block_n)
        return out_MF


def candidates(model: Model) -> dict[str, Kernel]:
    """``{tile: call}`` for a model.

    The first product of a whole FFN is torch's own, as its input is not sparse.
    """
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
    if model.up is None:
        return lambda x_MD: kernel(torch.mm(x_MD, weight_DF))
    up_FD = model.up.weight.detach()

    def gated(x_MD: Tensor) -> Tensor:
        z_MF = torch.mm(x_MD, weight_DF)
        return kernel(z_MF, kernel.up(z_MF, x_MD, up_FD))

    return gated
