"""Which tile of the Hopper kernel suits a product, by the time it is expected to take.

The grid is persistent, so time is quantised: every cluster of CTAs works through the
same number of tiles but for the last, partial round, and a round takes as long with one
tile in it as with all.  Small tiles waste less of the last round; large ones are faster
for each element, because what is copied into shared memory, and read from it, serves
more of them.  A last round of few tiles is one of halves.

Shape legend: ``M`` rows, ``N`` columns, ``K`` reduction.
"""

from __future__ import annotations

import math

import torch

from inductor_sparse.lowerings import sparse24_kernel
from inductor_sparse.lowerings.sparse24_kernel import TileConfig
from inductor_sparse.profitability import cuda as model

_STEP_NS: dict[tuple[int, int, int], tuple[float, float]] = {
    (128, 256, 2): (472.0, 498.0),
    (256, 192, 2): (646.0, 681.0),
    (256, 128, 2): (482.0, 513.0),
    (128, 192, 2): (372.0, 385.0),
    (128, 128, 2): (280.0, 290.0),
    (128, 128, 1): (342.0, 344.0),
    (128, 64, 1): (213.0, 217.0),
}
"""(rows, columns, cluster) -> nanoseconds of a step along K, for 16-bit and for 8-bit
operands: measured on an H200 under steady load, where its power limits the clock, until
that had settled; the median over products that give every multiprocessor work.  The
second needs less power than the first, so its clock is higher.  In an FFN, behind a
first matmul and packing, it was the faster for most as well."""

_TILE_NS = 1500.0
"""Of each tile, whatever K is: the first stages and the epilogue."""

_PRODUCT_NS = 7000.0
"""Of each product, whatever its size."""


def rounds(tile: TileConfig, M: int, N: int, multiprocessors: int) -> float:
    """Tiles that the busiest cluster works through; half a tile counts by its time."""
    across = math.ceil(N / tile.block_n)
    down = math.ceil(M / (tile.block_m * tile.cluster))
    clusters = multiprocessors // tile.cluster
    return model.rounds(across * down, clusters, halves=tile.halves)


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
    wide, narrow = _STEP_NS[tile.block_m, tile.block_n, tile.cluster]
    tile_ns = steps * (narrow if itemsize == 1 else wide) + _TILE_NS
    return (rounds(tile, M, N, multiprocessors) * tile_ns + _PRODUCT_NS) * 1e-9


def best_tile(
    M: int, N: int, K: int, dtype: torch.dtype, b_order: str, multiprocessors: int
) -> TileConfig:
    """The tile with the shortest expected time; of equals the first in the list.

    Raises:
        KeyError: there is no kernel for ``dtype``.
    """
    return min(
        sparse24_kernel.configs(dtype, b_order),
        key=lambda tile: expected_seconds(
            tile, M, N, K, dtype.itemsize, multiprocessors
        ),
    )
