"""When a rewrite is expected to win on a GPU: few tokens skip, many tokens pack.

Two regimes, and between them neither wins:

- *decode*, up to :func:`decode_max_tokens`: bound by reading the weight, of which
  skipping reads the rows that any token needs;
- *prefill*, from :func:`prefill_min_tokens` on: bound by the tensor cores, which take
  an operand packed 2:4 at a higher rate.

The figures were measured on one H200 under its power limit: the best of the dense side,
an ordinary one of the other.

Shape legend: M tokens (rows of the activation), K reduction, N output features.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from inductor_sparse.profitability.common import ASSUMED_DENSITY, GLU_MAX_TOKENS

MARGIN = 1.05
PREFILL_MARGIN = 1.12
"""A gain below these is within what the model gets wrong.  It is a tenth for a product
whose last round of tiles leaves the GPU half empty; where the number of tokens may be
any, few of them are such, and the other margin holds."""

DECODE_TOKENS = (1, 2, 4, GLU_MAX_TOKENS)
"""Numbers of tokens that end a decode regime."""

PREFILL_TOKENS = (512, 1024, 2048, 4096, 8192)
"""Numbers of tokens at which a prefill regime begins."""

SYMBOLIC_DECODE_TOKENS = (4,)
"""Where the number of tokens is symbolic all sites of a graph that skip do so up to
here.  Each limit is a guard of the whole graph, and Dynamo compiles no more than
``recompile_limit`` of them, 8 by default.  It cannot be two tokens: a symbolic size is
2 or more, so the guard would make it a constant, which ``mark_dynamic`` forbids."""

PREFILL_MIN_SIZE = 1024
"""A K or N below this leaves the tensor cores waiting for memory and for launches."""

UNTRAINED_DENSITY = 0.5
"""Fraction of positive activations of random weights."""
UNTRAINED_ONE_TOKEN = 0.95
"""What a single token, by far the most usual number, may lose in such a model."""

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}

_READ_BYTES_PER_US = 4.3e6
"""Weights read once: 4.3 TB/s of 4.8, by either kernel."""
_PACK_BYTES_PER_US = 3.6e6
"""Reading and writing in equal parts."""
_DENSE_FIXED_US = 2.0
_DECODE_FIXED_US = {1: 5.5, 2: 7.0, 4: 7.0, GLU_MAX_TOKENS: 9.0}
"""Finding the neurons that so many tokens need, and adding up what blocks have summed;
the rows themselves are read as fast as a dense product reads them."""
_GATED_FIXED_US = {1: 10.0, 2: 15.0, 4: 19.0, GLU_MAX_TOKENS: 18.0}
"""The same with a gate, and of the down projection: its up projection comes before."""

_CLUSTERS = 66
"""Pairs of multiprocessors, each working on two tiles one below the other."""
_TILE_ROWS = 128
_HALF_TILES = ((256, 1.0), (192, 0.94), (128, 0.84))
_BYTE_TILES = ((256, 1.0), (192, 0.94), (128, 0.82))
"""Columns, and measured rate relative to the largest tile."""
_CUT_ROUND = 0.7
"""Time of a round of tiles that are cut in two, relative to that of whole ones: there
are as many rows to copy.  Measured: 0.56 and 0.58 in 16 bits, 0.66 and 0.72 in 8, and
up to 0.9 if there is no other round."""

_DENSE_TFLOPS = {"bfloat16": 840.0, "float16": 840.0}
_DENSE_TFLOPS_ELSE = 1580.0
_PACKED_TFLOPS = {"bfloat16": 1240.0, "float16": 1240.0}
_PACKED_TFLOPS_ELSE = 2150.0
_PRODUCT_FIXED_US = 3.5
_PACKED_FIXED_US = 6.0
"""Filling the pipeline, and the epilogue that nothing overlaps."""


_DENSE_HOST_US = 97.0
_SKIPPING_HOST_US = 116.0
_PACKED_HOST_US = 97.0
_QUANTIZED_HOST_US = {"float8_e4m3fn": 250.0, "int8": 290.0}
"""What a call takes on the host before a GPU without CUDA graphs can be kept busy:
skipping with its counters.  Packing takes a fifth less than a dense call, which is no
reason to approximate.  In 8 bits that the dense FFN does not have, rows are quantized
and weights looked up besides, and ``_scaled_mm`` takes longer to call than a product in
16 bits: those are the times of a whole FFN, on the slower of two hosts."""
_NARROW_HOST_US = 80.0
"""What another matmul before the activation adds to that: an estimate, a third."""


def union_density(density: float, M: int) -> float:
    """The fraction of neurons that at least one of M independent tokens needs."""
    return float(1.0 - (1.0 - min(1.0, density)) ** M)


@dataclasses.dataclass(frozen=True)
class _DecodeCost:
    """Microseconds for M tokens: all of the rows, what skipping takes besides, dense.

    ``host_us`` is the least that skipping takes, 0 under CUDA graphs.
    """

    rows_us: float
    fixed_us: float
    dense_us: float
    host_us: float

    def gain(self, union: float) -> float:
        """Dense time / time of skipping, if tokens need that fraction of neurons."""
        return self.dense_us / self._skipping_us(union)

    def saved_us(self, union: float) -> float:
        """Dense time less that of skipping; negative where skipping loses."""
        return self.dense_us - self._skipping_us(union)

    def _skipping_us(self, union: float) -> float:
        return max(self.fixed_us + self.rows_us * union, self.host_us)

    def break_even(self) -> float:
        """The fraction of neurons above which skipping loses; 0 if it always does."""
        if self.host_us > self.dense_us:
            return 0.0
        return max(0.0, (self.dense_us - self.fixed_us) / self.rows_us)


def _decode_cost(
    M: int, K: int, N: int, dtype: str, gated: bool, graphs: bool, read_dtype: str
) -> _DecodeCost:
    weights = 2 if gated else 1
    weight_us = weights * K * N * _ITEMSIZE[dtype] / _READ_BYTES_PER_US
    activation_us = 2 * M * (K + N) * _ITEMSIZE[dtype] / _READ_BYTES_PER_US
    steps = _GATED_FIXED_US if gated else _DECODE_FIXED_US
    fixed_us = next((steps[most] for most in steps if most >= M), math.inf)
    dense_us, host_us = weights * _DENSE_FIXED_US + weight_us, 0.0
    if not graphs:
        dense_us = max(dense_us, weights * _DENSE_HOST_US)
        host_us = weights * _SKIPPING_HOST_US
    rows_us = weight_us * _ITEMSIZE[read_dtype or dtype] / _ITEMSIZE[dtype]
    return _DecodeCost(rows_us, fixed_us + activation_us, dense_us, host_us)


def decode_gain(
    M: int,
    K: int,
    N: int,
    dtype: str,
    density: float | None,
    *,
    gated: bool = False,
    graphs: bool = True,
    read_dtype: str = "",
) -> float:
    """Expected dense time / time of skipping, for M tokens that read one weight.

    Args:
        M: tokens.
        K: reduction: hidden neurons.
        N: output features.
        dtype: of weight and activation.
        density: fraction of non-zeros, None if no plan has measured it.
        gated: whether rows of an up projection of the same size are skipped as well.
        graphs: whether kernels are launched by CUDA graphs.
        read_dtype: in which rows are read that are not skipped; empty for the same.
    """
    known = ASSUMED_DENSITY if density is None else density
    cost = _decode_cost(M, K, N, dtype, gated, graphs, read_dtype)
    return round(cost.gain(union_density(known, M)), 2)


def break_even_union(
    M: int,
    K: int,
    N: int,
    dtype: str,
    *,
    gated: bool = False,
    graphs: bool = True,
    read_dtype: str = "",
) -> float:
    """The fraction of neurons that M tokens may need together before skipping loses.

    0 if it always does, 1 or more if it never does; arguments as for
    :func:`decode_gain`.
    """
    return _decode_cost(M, K, N, dtype, gated, graphs, read_dtype).break_even()


def decode_max_tokens(
    K: int,
    N: int,
    dtype: str,
    density: float | None,
    *,
    gated: bool = False,
    graphs: bool = True,
    observed: bool = False,
    read_dtype: str = "",
) -> int:
    """Up to how many tokens skipping is expected to win; 0 if never.

    A site that no plan has measured, and that is not ``observed`` either, so that it
    would go back to dense, must not lose if its model was never trained.
    """

    def gain(M: int, at: float | None) -> float:
        how = {"gated": gated, "graphs": graphs}
        return decode_gain(M, K, N, dtype, at, **how, read_dtype=read_dtype)

    def is_safe(M: int) -> bool:
        least = UNTRAINED_ONE_TOKEN if M == 1 else MARGIN
        known = observed or density is not None
        return known or gain(M, UNTRAINED_DENSITY) >= least

    def wins(M: int) -> bool:
        return is_safe(M) and gain(M, density) >= MARGIN

    return max((M for M in DECODE_TOKENS if wins(M)), default=0)


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """Up to how many tokens a form is the best: whether it skips two weights' rows."""

    up_to: int
    gated: bool


def decode_steps(
    K: int,
    N: int,
    dtype: str,
    density: float | None,
    *,
    forms: tuple[bool, ...] = (False,),
    graphs: bool = True,
    observed: bool = False,
    read_dtype: str = "",
    ends: tuple[int, ...] = DECODE_TOKENS,
) -> tuple[DecodeStep, ...]:
    """Which form of skipping wins up to how many tokens, fewest first.

    Args:
        forms: the possible ones: ``False`` skips rows of one weight, ``True`` those of
            an up projection as well.
        ends: where a step may end.

    The other arguments are those of :func:`decode_max_tokens`, whose limits hold for
    each form.  Where several forms win, the one that saves most time does: the dense
    up projection counts where it is not skipped.
    """
    shape, known = (K, N, dtype), ASSUMED_DENSITY if density is None else density
    limits = {
        gated: decode_max_tokens(
            *(*shape, density),
            gated=gated,
            graphs=graphs,
            observed=observed,
            read_dtype=read_dtype,
        )
        for gated in forms
    }

    def saved_us(M: int, gated: bool) -> float:
        cost = _decode_cost(M, *shape, gated, graphs, read_dtype)
        return cost.saved_us(union_density(known, M))

    steps: list[DecodeStep] = []
    for up_to in ends:
        winning = [gated for gated, limit in limits.items() if up_to <= limit]
        if not winning:
            break
        best = max(winning, key=lambda gated: saved_us(up_to, gated))
        if steps and steps[-1].gated == best:
            steps.pop()
        steps.append(DecodeStep(up_to, best))
    return tuple(steps)


def _dense_us(M: int, K: int, N: int, dtype: str) -> float:
    """The time of a dense product whose last round of tiles costs nothing extra."""
    rate = _DENSE_TFLOPS.get(dtype, _DENSE_TFLOPS_ELSE) * 1e6
    weight_us = K * N * _ITEMSIZE.get(dtype, 2) / _READ_BYTES_PER_US
    return _PRODUCT_FIXED_US + max(2 * M * K * N / rate, weight_us)


def rounds(tiles: int, clusters: int, *, halves: bool = True) -> float:
    """Rounds in which ``clusters`` of CTAs work through tiles of a packed product.

    Args:
        tiles: of all clusters.
        clusters: that work at a time.
        halves: whether tiles of a last round are cut in two if there are few: then that
            round counts by its time.
    """
    whole, left = divmod(tiles, clusters)
    if halves and 0 < 2 * left <= clusters:
        return whole + _CUT_ROUND
    return whole + (left > 0)


def _packed_us(M: int, K: int, N: int, dtype: str) -> float:
    """The time of the best tile, whose last round may leave the GPU half empty."""
    rate = _PACKED_TFLOPS.get(dtype, _PACKED_TFLOPS_ELSE) * 1e6 / _CLUSTERS
    tiles = _HALF_TILES if dtype in _PACKED_TFLOPS else _BYTE_TILES
    weight_us = K * N * _ITEMSIZE.get(dtype, 2) / _READ_BYTES_PER_US

    def one(columns: int, relative: float) -> float:
        pairs = math.ceil(M / (2 * _TILE_ROWS)) * math.ceil(N / columns)
        pair_us = 4 * _TILE_ROWS * columns * K / (rate * relative)
        return max(rounds(pairs, _CLUSTERS) * pair_us, weight_us)

    return _PACKED_FIXED_US + min(one(*tile) for tile in tiles)


@functools.lru_cache(4096)
def prefill_gain(
    M: int,
    K: int,
    N: int,
    dtype: str,
    *,
    pack_dtype: str = "",
    replaces_activation: bool = True,
    graphs: bool = False,
    gated: bool = False,
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
        graphs: whether kernels are launched by CUDA graphs.
        gated: whether a gate and what it is multiplied by are read, by either side.
    """
    packed = pack_dtype or dtype
    read, write = _ITEMSIZE.get(dtype, 2), _ITEMSIZE.get(packed, 2)
    inputs = max(read, 2) * (2 if gated else 1)
    pack_us = M * K * (inputs + write / 2 + 0.125) / _PACK_BYTES_PER_US
    activation_us = M * K * (inputs + read) / _PACK_BYTES_PER_US
    dense_us = _dense_us(M, K, N, dtype)
    packed_us = pack_us + _packed_us(M, K, N, packed)
    if replaces_activation:
        dense_us += activation_us
    if graphs:
        return round(dense_us / packed_us, 2)
    if packed != dtype:
        # What is before is of the FFN as well, and gives the host time.
        firsts = 2 if gated else 1
        first_us, narrow_us = (_dense_us(M, N, K, name) for name in (dtype, packed))
        host_us, gain = _QUANTIZED_HOST_US[packed], dense_us / packed_us
        host_us += (firsts - 1) * _NARROW_HOST_US
        if packed_us + firsts * narrow_us < host_us:
            gain = min(gain, (dense_us + firsts * first_us) / host_us)
        return round(gain, 2)
    floored = max(dense_us, _DENSE_HOST_US) / max(packed_us, _PACKED_HOST_US)
    return round(floored, 2)


@functools.lru_cache(4096)
def prefill_min_tokens(
    K: int,
    N: int,
    dtype: str,
    *,
    pack_dtype: str = "",
    replaces_activation: bool = True,
    graphs: bool = False,
    gated: bool = False,
) -> int | None:
    """From how many tokens on packing is expected to win; None if it never is.

    Rounds of tiles make the gain go up and down: from there on it is :data:`MARGIN` at
    least for whole tiles, and never a loss, not even for one token more than those.
    """

    def gain(M: int) -> float:
        return prefill_gain(
            M,
            K,
            N,
            dtype,
            pack_dtype=pack_dtype,
            replaces_activation=replaces_activation,
            graphs=graphs,
            gated=gated,
        )

    if min(K, N) < PREFILL_MIN_SIZE:
        return None
    tile, most = 2 * _TILE_ROWS, 2 * PREFILL_TOKENS[-1]
    whole = [M for M in range(tile, most + 1, tile) if gain(M) < MARGIN]
    begun = [M for M in range(1, most, tile) if gain(M) < 1]
    losing = max([*whole, *begun], default=0)
    return next((M for M in PREFILL_TOKENS if losing < M), None)
