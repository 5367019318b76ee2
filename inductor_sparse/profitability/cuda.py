"""When a rewrite is expected to win on a GPU: few tokens skip, many tokens pack.

Two regimes, and between them neither wins:

- *decode*, up to :func:`decode_max_tokens`: bound by reading the weight, of which
  skipping reads the rows that any token needs;
- *prefill*, from :func:`prefill_min_tokens` on: bound by the tensor cores, which take
  an operand packed 2:4 at a higher rate.

The figures are those of one H200.  Its rates are under its power limit, on data that is
as full of zeros as trained activations are for neither side: that favours the dense
side, which runs faster on zeros.

Shape legend: M tokens (rows of the activation), K reduction, N output features.
"""

from __future__ import annotations

import functools
import math

from inductor_sparse.profitability.common import ASSUMED_DENSITY, GLU_MAX_TOKENS

MARGIN = 1.05
"""A gain below this is within what a model of a GPU gets wrong."""

DECODE_TOKENS = (1, 2, 4, GLU_MAX_TOKENS)
"""Numbers of tokens that end a decode regime: few, so that graphs with a symbolic
number of tokens are compiled for few cases."""

PREFILL_TOKENS = (512, 1024, 2048, 4096, 8192)
"""Numbers of tokens at which a prefill regime begins, for the same reason."""

PREFILL_MIN_SIZE = 1024
"""A K or N below this leaves the tensor cores waiting for memory and for launches."""

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}

_READ_BYTES_PER_US = 4.0e6
"""Weights read once: 4.0 TB/s of 4.8."""
_PACK_BYTES_PER_US = 3.6e6
"""Reading and writing in equal parts."""
_DENSE_FIXED_US = 3.0
_DECODE_FIXED_US = 5.5
"""Finding the active neurons, and adding up what each block has summed."""

_MULTIPROCESSORS = 132
_DENSE_TILES = ((128, 256, 1.0), (128, 128, 0.93), (64, 128, 0.7))
_PACKED_TILES = ((128, 256, 1.0), (128, 128, 0.8))
"""Rows, columns, and rate relative to the best tile."""

_DENSE_TFLOPS = {"bfloat16": 790.0, "float16": 790.0, "float8_e4m3fn": 1600.0}
_PACKED_TFLOPS = {"bfloat16": 1120.0, "float16": 1120.0, "float8_e4m3fn": 2050.0}
_DENSE_TFLOPS_ELSE, _PACKED_TFLOPS_ELSE = 1600.0, 2050.0
_TILE_FIXED_US = 2.5
"""Filling the pipeline, and the epilogue that nothing overlaps."""


def union_density(density: float, M: int) -> float:
    """The fraction of neurons that at least one of M independent tokens needs."""
    return float(1.0 - (1.0 - min(1.0, density)) ** M)


def decode_gain(M: int, K: int, N: int, dtype: str, density: float | None) -> float:
    """Expected dense time / time of skipping, for M tokens that read one weight."""
    known = ASSUMED_DENSITY if density is None else density
    itemsize = _ITEMSIZE[dtype]
    weight_us = K * N * itemsize / _READ_BYTES_PER_US
    activation_us = 2 * M * (K + N) * itemsize / _READ_BYTES_PER_US
    dense_us = _DENSE_FIXED_US + weight_us
    skipping_us = _DECODE_FIXED_US + activation_us + weight_us * union_density(known, M)
    return round(dense_us / skipping_us, 2)


def decode_max_tokens(K: int, N: int, dtype: str, density: float | None) -> int:
    """Up to how many tokens skipping is expected to win; 0 if never."""
    return max(
        (M for M in DECODE_TOKENS if decode_gain(M, K, N, dtype, density) >= MARGIN),
        default=0,
    )


def _product_us(
    M: int,
    K: int,
    N: int,
    itemsize: int,
    tflops: float,
    tiles: tuple[tuple[int, int, float], ...],
) -> float:
    """The time of the best tile, whose last round may leave the GPU half empty."""
    flops_per_us = tflops * 1e6 / _MULTIPROCESSORS
    weight_us = K * N * itemsize / _READ_BYTES_PER_US

    def one(rows: int, columns: int, rate: float) -> float:
        rounds = math.ceil(
            math.ceil(M / rows) * math.ceil(N / columns) / _MULTIPROCESSORS
        )
        tile_us = 2 * rows * columns * K / (flops_per_us * rate)
        return max(rounds * tile_us, weight_us) + _TILE_FIXED_US

    return min(one(*tile) for tile in tiles)


@functools.lru_cache(4096)
def prefill_gain(
    M: int,
    K: int,
    N: int,
    dtype: str,
    *,
    pack_dtype: str = "",
    replaces_activation: bool = True,
) -> float:
    """Expected dense time / time of packing and multiplying, for M tokens.

    Args:
        M: tokens.
        K: reduction.
        N: output features.
        dtype: of the dense product that is replaced.
        pack_dtype: of the packed operand; empty for the same.
        replaces_activation: whether packing takes the place of the kernel that writes
            the dense activation, as it does unless something else reads that too.
    """
    packed = pack_dtype or dtype
    read, write = _ITEMSIZE.get(dtype, 2), _ITEMSIZE.get(packed, 2)
    pack_us = M * K * (max(read, 2) + write / 2 + 0.125) / _PACK_BYTES_PER_US
    activation_us = M * K * (max(read, 2) + read) / _PACK_BYTES_PER_US
    dense = _DENSE_TFLOPS.get(dtype, _DENSE_TFLOPS_ELSE)
    sparse = _PACKED_TFLOPS.get(packed, _PACKED_TFLOPS_ELSE)
    dense_us = _product_us(M, K, N, read, dense, _DENSE_TILES)
    packed_us = pack_us + _product_us(M, K, N, write, sparse, _PACKED_TILES)
    if replaces_activation:
        dense_us += activation_us
    return round(dense_us / packed_us, 2)


@functools.lru_cache(4096)
def prefill_min_tokens(
    K: int,
    N: int,
    dtype: str,
    *,
    pack_dtype: str = "",
    replaces_activation: bool = True,
) -> int | None:
    """From how many tokens on packing is expected to win; None if it never is.

    From there on at every number of tokens: rounds of tiles make the gain go up and
    down, so all sizes up to :data:`PREFILL_TOKENS`' last are looked at.
    """

    def wins(M: int) -> bool:
        gain = prefill_gain(
            M,
            K,
            N,
            dtype,
            pack_dtype=pack_dtype,
            replaces_activation=replaces_activation,
        )
        return gain >= MARGIN

    if min(K, N) < PREFILL_MIN_SIZE:
        return None
    last = PREFILL_TOKENS[-1]
    losing = [M for M in range(128, 2 * last + 1, 128) if not wins(M)]
    safe = max(losing, default=0) + 1
    return next((M for M in PREFILL_TOKENS if safe <= M), None)
