"""The Hopper kernel of ``sparse24_mm`` as text: its tiles, its source, its arguments.

Shape legend: ``M`` rows, ``N`` columns, ``K`` reduction, ``S`` packed reduction.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from inductor_sparse.lowerings import hopper
from inductor_sparse.lowerings.hopper import SHARED_BYTES as SHARED_BYTES

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "s8",
}
"""Dtypes of the packed operand, and what PTX calls them."""

_ROW_BYTES = 128
_METADATA_BYTES = 512


def _blocks(itemsize: int) -> int:
    """Blocks of 64 columns, each with its metadata, in two steps along K."""
    return 4 // itemsize


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a CTA tiles the product.

    ``consumers`` warpgroups each compute ``m64`` blocks of 64 rows, all of them
    ``block_n`` columns; a ``cluster`` of CTAs, adjacent along M, shares each tile of
    ``w``; ``stages`` tiles of it are in flight; a consumer has ``store_buffers``
    buffers of 64 x ``store_columns`` output values (32 or 64).
    """

    consumers: int = 2
    m64: int = 1
    block_n: int = 256
    stages: int = 5
    cluster: int = 2
    store_buffers: int = 2
    store_columns: int = 64

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return 64 * self.consumers * self.m64

    @property
    def halves(self) -> bool:
        """Whether tiles of the last round may be cut in two along N.

        One CTA of two then loads all of the columns of ``w``, and a half is stored from
        whole buffers, the same as a tile begins with.
        """
        buffers, left_over = divmod(self.block_n // 2, self.store_columns)
        return self.cluster == 2 and not left_over and buffers % self.store_buffers == 0

    @property
    def slots(self) -> int:
        """Tiles of the packed operand in flight, each for two steps along K."""
        return self.stages // 2 + 1

    @property
    def threads(self) -> int:
        """Threads of a CTA: the consumers and one warpgroup that produces."""
        return 128 * (self.consumers + 1)

    @property
    def accumulators(self) -> int:
        """Accumulator registers of a consumer thread."""
        return self.m64 * self.block_n // 2

    def shared_bytes(self, itemsize: int) -> int:
        """Bytes of dynamic shared memory for operands of ``itemsize`` bytes."""
        w = self.stages * self.block_n * _ROW_BYTES
        metadata = self.block_m // 64 * _blocks(itemsize) * _METADATA_BYTES
        values = self.slots * (self.block_m * _ROW_BYTES + metadata)
        store = self.consumers * self.store_buffers * 64 * self.store_columns * 2
        scales = self.consumers * self.block_n * 4  # of the columns, if there are any
        barriers, alignment = 16 * self.stages, 1024
        return w + values + store + scales + barriers + alignment

    def __str__(self) -> str:
        """As in ``128x256 cluster 2 stages 5``."""
        return (
            f"{self.block_m}x{self.block_n} cluster {self.cluster} stages {self.stages}"
        )


_CONFIGS: dict[int, tuple[TileConfig, ...]] = {
    2: (
        TileConfig(store_buffers=1, store_columns=32),
        TileConfig(m64=2, block_n=192, stages=4, store_buffers=1, store_columns=32),
        TileConfig(m64=2, block_n=128),
        TileConfig(block_n=192, store_buffers=3, store_columns=32),
        TileConfig(block_n=128, stages=7, store_buffers=1),
        TileConfig(block_n=128, stages=7, store_buffers=1, cluster=1),
        TileConfig(block_n=64, stages=9, cluster=1, store_buffers=1),
    ),
    1: (
        TileConfig(stages=4),
        TileConfig(m64=2, block_n=192, stages=4, store_buffers=1, store_columns=32),
        TileConfig(m64=2, block_n=128, store_buffers=1),
        TileConfig(block_n=192, store_buffers=3, store_columns=32),
        TileConfig(block_n=128, stages=7, store_buffers=1),
        TileConfig(block_n=128, stages=7, store_buffers=1, cluster=1),
        TileConfig(block_n=64, stages=9, cluster=1, store_buffers=1),
    ),
}


def configs(dtype: torch.dtype, b_order: str = "k") -> tuple[TileConfig, ...]:
    """The tiles that exist for a dtype, the best for many tokens first.

    With ``b_order="n"`` a CTA loads boxes of 64 columns, so its part of a tile must be
    whole boxes.
    """
    return tuple(
        config
        for config in _CONFIGS[dtype.itemsize]
        if b_order == "k" or config.block_n % (64 * config.cluster) == 0
    )


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What happens to an accumulator after the scales; by default it is stored.

    ``code``, ``params``, ``body``, ``primary0`` and ``primary1`` are C++ text, see the
    head of ``templates/cuda/sparse24_mm.cu.jinja``.  ``out_dtype`` is the dtype of the
    output that goes through shared memory and TMA (bf16 or fp16), or None if every
    store is in ``body``; ``transposed`` says that it lies in memory as ``[N, M]``.
    """

    out_dtype: torch.dtype | None
    code: str = ""
    params: tuple[str, ...] = ()
    body: str = ""
    primary0: str = "acc0"
    primary1: str = "acc1"
    transposed: bool = False


def plain_epilogue(out_dtype: torch.dtype, N: int) -> Epilogue:
    """Store the product itself as ``[M, N]`` row-major.

    TMA takes rows of a multiple of 16 bytes and 16-bit values; otherwise every thread
    stores its own elements.
    """
    if out_dtype in (torch.bfloat16, torch.float16) and N % 8 == 0:
        return Epilogue(out_dtype)
    code, kind, value0, value1 = "", "float", "acc0", "acc1"
    if out_dtype != torch.float32:
        convert = "bf16" if out_dtype == torch.bfloat16 else "f16"
        code = (
            "DEVICE u16 round16(float x) {\n  u16 r;\n"
            f'  asm("cvt.rn.{convert}.f32 %0, %1;" : "=h"(r) : "f"(x));\n'
            "  return r;\n}"
        )
        kind, value0, value1 = "u16", "round16(acc0)", "round16(acc1)"
    body = (
        f"if (ok0) out[m * N + n] = {value0};\nif (ok1) out[m * N + n + 1] = {value1};"
    )
    return Epilogue(
        None,
        code=code,
        params=(f"{kind}* __restrict__ out",),
        body=body,
    )


def kernel_source(
    name: str,
    dtype: torch.dtype,
    config: TileConfig,
    epilogue: Epilogue,
    *,
    b_order: str = "k",
    has_row_scale: bool = False,
    has_col_scale: bool = False,
) -> str:
    """CUDA C++ of one kernel.

    Args:
        name: name of the kernel.
        dtype: of ``values`` and ``w``; a key of :data:`DTYPE_NAMES`.
        config: the tile.
        epilogue: what happens to the accumulators.
        b_order: ``"k"`` if ``w`` lies in memory as ``[N, K]``, ``"n"`` if as
            ``[K, N]`` (16-bit only).
        has_row_scale: whether there is a scale of each row, float32.
        has_col_scale: whether there is a scale of each column, float32.
    """
    return hopper.render(
        "cuda/sparse24_mm.cu.jinja",
        **dataclasses.asdict(config),
        slots=config.slots,
        halves=config.halves,
        name=name,
        dtype=DTYPE_NAMES[dtype],
        b_order=b_order,
        has_row_scale=has_row_scale,
        has_col_scale=has_col_scale,
        store="none" if epilogue.out_dtype is None else "tma16",
        out_dtype="f16" if epilogue.out_dtype == torch.float16 else "bf16",
        transposed=epilogue.transposed,
        epilogue_code=epilogue.code,
        epilogue_params="".join(f",\n    {param}" for param in epilogue.params),
        epilogue_body=epilogue.body,
        primary0=epilogue.primary0,
        primary1=epilogue.primary1,
    )


def signature(
    epilogue: Epilogue, *, has_row_scale: bool = False, has_col_scale: bool = False
) -> tuple[str, ...]:
    """Kinds of the arguments before those of the epilogue.

    They are values, w, the output if it is stored through TMA, metadata, the scales,
    then M, N and K.
    """
    maps = 3 if epilogue.out_dtype is None else 4
    pointers = has_row_scale + has_col_scale
    return ("map",) * maps + ("pointer",) * pointers + ("int32",) * 3


def map_boxes(
    dtype: torch.dtype, config: TileConfig, epilogue: Epilogue, b_order: str = "k"
) -> tuple[dict[str, Any], ...]:
    """Box (inner, outer) and swizzle in bytes of each tensor map, in argument order.

    ``transposed`` says that the map is of ``w.t()`` or of the output's transpose, which
    lies in memory row by row.
    """
    item = dtype.itemsize
    line = _ROW_BYTES // item
    values = {"box": (line, config.block_m), "swizzle": 128, "transposed": False}
    box = (line, config.block_n // config.cluster) if b_order == "k" else (64, 64)
    w = {"box": box, "swizzle": 128, "transposed": b_order == "k"}
    columns = config.store_columns
    out = {"box": (columns, 64), "swizzle": 2 * columns, "transposed": False}
    if epilogue.transposed:
        out = {"box": (64, columns), "swizzle": 128, "transposed": True}
    # Copies of a plain run of bytes would move the words too, in 16-byte pieces: much
    # slower.  A box is the words of 64 rows in two steps.
    metadata = {"box": (128, _blocks(item)), "swizzle": 0, "transposed": False}
    outputs = () if epilogue.out_dtype is None else (out,)
    return (values, w, *outputs, metadata)
