"""Which tile of the Hopper kernel suits a product, by the time it is expected to take.

The grid is persistent, so time is quantised: every cluster of CTAs works through the
same number of tiles but for the last, partial round.  Within a tile the shared memory
of a multiprocessor is the limit: each ``wgmma`` reads its tile of ``w`` for only 64
rows, so a step along K takes as many cycles as it takes to read the operands; a small
tile also has to fetch more from L2 for each multiplication.

Shape legend: ``M`` rows, ``N`` columns, ``K`` reduction.
"""

from __future__ import annotations

import math

import torch

from inductor_sparse.lowerings.sparse24_kernel import DTYPE_NAMES, TileConfig

_WIDE = (
    TileConfig(m64=1, block_n=256, stages=5, cluster=2),
    TileConfig(m64=2, block_n=128, stages=6, cluster=2),
    TileConfig(m64=1, block_n=192, stages=6, cluster=2),
    TileConfig(m64=1, block_n=128, stages=8, cluster=2),
    TileConfig(m64=1, block_n=256, stages=5, cluster=1),
    TileConfig(m64=1, block_n=128, stages=8, cluster=1),
    TileConfig(m64=1, block_n=64, stages=8, cluster=1),
)
_NARROW = (
    TileConfig(m64=1, block_n=256, stages=4, cluster=2, store_buffers=2),
    TileConfig(m64=2, block_n=128, stages=5, cluster=2),
    TileConfig(m64=1, block_n=192, stages=5, cluster=2),
    TileConfig(m64=1, block_n=128, stages=7, cluster=2),
    TileConfig(m64=1, block_n=256, stages=4, cluster=1, store_buffers=2),
    TileConfig(m64=1, block_n=128, stages=7, cluster=1),
    TileConfig(m64=1, block_n=64, stages=8, cluster=1),
)

_SHARED_READ = 128
"""Bytes that a multiprocessor reads from shared memory in a cycle."""

_L2_READ = 40
"""Bytes that a multiprocessor gets from L2 in a cycle when all of them read."""

_TENSOR_EFFICIENCY = 0.85
"""Measured share of the rate that the shared memory allows, at large K."""

_TILE_CYCLES = 4000
"""Of each tile, whatever K is: filling the ring, and the epilogue of 128 x 256."""

_CLOCK_HZ = 1.5e9
"""The clock under a load that takes all the power there is."""

_LAUNCH_SECONDS = 4e-6


def tiles(dtype: torch.dtype, b_order: str = "k") -> tuple[TileConfig, ...]:
    """The tiles for operands of ``dtype``, the one for large products first.

    With ``w`` in N order a tile of it is loaded in boxes of 64 columns, and the CTAs of
    a cluster must be able to share them out.

    Raises:
        KeyError: there is no kernel for ``dtype``.
    """
    DTYPE_NAMES[dtype]
    table = _NARROW if dtype.itemsize == 1 else _WIDE
    if b_order == "k":
        return table
    return tuple(tile for tile in table if tile.block_n % (64 * tile.cluster) == 0)


def step_cycles(tile: TileConfig) -> float:
    """Cycles of a step along K: 128 bytes of every column of ``w``."""
    w_bytes, values_bytes = tile.block_n * 128, tile.block_m * 64
    groups = tile.block_m // 64
    reads = groups * w_bytes + values_bytes
    shared = reads / _SHARED_READ / _TENSOR_EFFICIENCY
    fetched = w_bytes / tile.cluster + values_bytes
    return max(shared, fetched / _L2_READ)


def rounds(tile: TileConfig, M: int, N: int, multiprocessors: int) -> int:
    """Tiles that the busiest cluster works through."""
    clusters = multiprocessors // tile.cluster
    across = math.ceil(N / tile.block_n)
    down = math.ceil(M / (tile.block_m * tile.cluster))
    return math.ceil(across * down / clusters)


def expected_seconds(
    tile: TileConfig, M: int, N: int, K: int, itemsize: int, multiprocessors: int
) -> float:
    """Expected time of a product with ``tile``, in seconds.

    Args:
        tile: the tile.
        M: rows.
        N: columns.
        K: reduction.
        itemsize: bytes of an element of either operand.
        multiprocessors: of the device.
    """
    steps = math.ceil(K * itemsize / 128)
    fixed = _TILE_CYCLES * (0.5 + 0.5 * tile.block_m * tile.block_n / (128 * 256))
    cycles = steps * step_cycles(tile) + fixed
    return rounds(tile, M, N, multiprocessors) * cycles / _CLOCK_HZ + _LAUNCH_SECONDS


def best_tile(
    M: int, N: int, K: int, dtype: torch.dtype, b_order: str, multiprocessors: int
) -> TileConfig:
    """The tile with the shortest expected time; of equals the first in the list.

    Raises:
        KeyError: there is no kernel for ``dtype``.
    """
    return min(
        tiles(dtype, b_order),
        key=lambda tile: expected_seconds(
            tile, M, N, K, dtype.itemsize, multiprocessors
        ),
    )
