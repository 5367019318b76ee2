"""Autotuning in which a wrong result loses whatever its time is.

:func:`checked_time` holds the rules of the race, an :class:`Oracle` what is right.  For
``sparse24_mm`` that is the masked-dense product in float64 of one row of every block of
64 and of the first and last rows, all columns: it meets every tile at a small part of
the product's cost.

Shape legend: ``M`` rows, ``N`` columns, ``K`` reduction, ``S`` packed reduction, ``R``
and ``C`` blocks of 64 rows and of 64 columns of the packed operand, ``P`` rows looked
at.
"""

from __future__ import annotations

import abc
import logging
import math
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.runtime.benchmarking import benchmarker

from inductor_sparse import formats
from inductor_sparse.formats import BLOCK

log = logging.getLogger(__name__)

_PAIRS = tuple(i0 | i1 << 2 for i0 in range(4) for i1 in range(i0 + 1, 4))
"""Every valid nibble: two positions, ascending."""

_EDGE_ROWS = 128
_STRIDE = 17
"""Neighbouring blocks are met at rows this far apart, so at all lanes of a warp."""

_CHUNK_ROWS, _CHUNK_COLUMNS = 16 * BLOCK, 1024

_SUM_TOLERANCE = 2.0**-8
"""Of sums of products of 8 bits, which Hopper adds with 14 bits of mantissa."""

_LAST_RESORT_MS = 1e9

_SHORT = ("out of memory", "out_of_memory", "alloc_failed", "insufficient_resources")
"""How libraries say, in an error of another class, that they got no memory."""

_PROCESS = uuid.uuid4().hex
_failed: set[str] = set()
"""Candidates that failed in this process, other than by a lack of memory."""


class Oracle(abc.ABC):
    """Knows what the candidates of one autotuning have to compute.

    ``timed`` counts the results that were found right, ``short_of_memory`` says whether
    there was not enough to compute or to check one.
    """

    def __init__(self) -> None:
        self.timed = 0
        self.short_of_memory = False
        self._nonce = uuid.uuid4().hex

    @abc.abstractmethod
    def error(self, result: Any, inputs: Sequence[Tensor]) -> float:
        """The relative error of what a candidate made of ``inputs``."""

    def kept_key(self, key: str, name: str) -> str:
        """What the time of a candidate is kept under on disk, by Inductor.

        Memory that was missing, or a candidate that failed, says nothing about the next
        process: such times are kept where nobody else looks.  So a lack of memory costs
        the next layer a new measurement, and a failure the next process.

        Args:
            key: of the candidate, the same in every process.
            name: as for :func:`checked_time`.
        """
        if self.short_of_memory:
            return f"{key}-{self._nonce}"
        return f"{key}-{_PROCESS}" if name in _failed else key


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, is about a lack of memory."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, torch.OutOfMemoryError) or any(s in text for s in _SHORT):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def checked_time(
    name: str,
    oracle: Oracle,
    compute: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    last_resort: bool = False,
) -> float:
    """Milliseconds that ``compute(*inputs)`` takes; inf unless its result is right.

    Args:
        name: what the log calls the candidate when it is out of the race.
        oracle: judges the result and takes note.
        compute: returns a tensor, or a tuple that begins with one.
        inputs: of autotuning.
        last_resort: very long instead of inf, for the candidate that is right by
            definition: that it cannot be measured does not make it wrong.
    """
    try:
        result = compute(*inputs)
        error = oracle.error(result, inputs)
        first = result if isinstance(result, Tensor) else result[0]
        allowed = tolerance(first.dtype)
        if error <= allowed:
            took = float(benchmarker.benchmark_gpu(lambda: compute(*inputs)))
            oracle.timed += 1
            return took
        log.warning(
            "autotuning rejects %s: it is off by %.1e of the largest value, %.1e is "
            "allowed; please report it",
            name,
            error,
            allowed,
        )
    except Exception as problem:  # whatever it is, the candidate is out of the race
        if is_out_of_memory(problem):
            oracle.short_of_memory = True
        else:
            _failed.add(name)
        summary = str(problem).strip().partition("\n")[0]
        sizes = ", ".join(str(list(x.shape)) for x in inputs)
        log.warning(
            "autotuning rejects %s for operands %s: %s; another kernel takes its place",
            *(name, sizes, summary),
        )
    return _LAST_RESORT_MS if last_resort else math.inf


def generator(device: torch.device) -> torch.Generator:
    """Of numbers that are the same every time; the model's own are left alone."""
    return torch.Generator(device).manual_seed(0)


def random_metadata(
    shape: tuple[int, int, int], device: torch.device, draw: torch.Generator
) -> Tensor:
    """``[R, C, 128]`` int32 words of valid pairs; any other is undefined behaviour."""
    pairs = torch.tensor(_PAIRS, dtype=torch.int32, device=device)
    like: dict[str, Any] = {"dtype": torch.uint8, "device": device}
    drawn = torch.randint(len(_PAIRS), (*shape, 8), generator=draw, **like)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=device)
    return (pairs[drawn.int()] << shifts).sum(-1, dtype=torch.int32)


def random_values(
    shape: tuple[int, int],
    K: int,
    dtype: torch.dtype,
    device: torch.device,
    draw: torch.Generator,
) -> Tensor:
    """``[M, S]`` values like those of a ReLU² layer, zero beyond column ``K``."""
    if dtype == torch.int8:
        values = torch.randint(
            0, 128, shape, dtype=dtype, device=device, generator=draw
        )
    else:
        wide = torch.randn(shape, device=device, generator=draw)
        values = wide.relu_().square_().to(dtype)
    values[:, -(-K // 4) * 2 :] = 0
    return values


def random_weight(like: Tensor, draw: torch.Generator) -> Tensor:
    """``like`` filled with random values; its shape, strides and dtype stay."""
    at: dict[str, Any] = {"device": like.device, "generator": draw}
    if like.dtype == torch.int8:
        return like.copy_(torch.randint(-127, 128, like.shape, **at))
    return like.copy_(torch.randn(like.shape, **at))


def sample_rows(M: int) -> Tensor:
    """The rows to look at, ascending: one of each block of 64, and the edges."""
    blocks = torch.arange(-(-M // BLOCK))
    spread = blocks * BLOCK + blocks * _STRIDE % BLOCK
    edges = torch.arange(min(M, _EDGE_ROWS))
    rows = torch.cat((spread.clamp(max=M - 1), edges, M - 1 - edges))
    return rows.unique()


def expected_rows(
    rows: Tensor,
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
) -> Tensor:
    """``[P, N]`` float64: those rows of the masked-dense product."""
    dense_PK = torch.cat(
        [
            _unpacked_rows(rows, first, values, metadata, w.shape[0])
            for first in range(0, values.shape[0], _CHUNK_ROWS)
        ]
    )
    parts = [dense_PK @ part.double() for part in w.split(_CHUNK_COLUMNS, dim=1)]
    product = torch.cat(parts, dim=1)
    if row_scale is not None:
        product *= row_scale.double()[rows.to(values.device)].unsqueeze(1)
    if col_scale is not None:
        product *= col_scale.double()
    return product


def _unpacked_rows(
    rows: Tensor, first: int, values: Tensor, metadata: Tensor, K: int
) -> Tensor:
    """Those of ``rows`` that lie in the chunk that starts at ``first``, dense."""
    part = values[first : first + _CHUNK_ROWS]
    end = first + part.shape[0]
    words = metadata[first // BLOCK : -(-end // BLOCK)]
    inside = rows[(rows >= first) & (rows < end)] - first
    dense = formats.unpack(part, words, K)
    return dense[inside.to(values.device)].double()


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest error as a fraction of the largest expected value; NaN counts as inf.

    What is beyond the range of the result's dtype is expected to be infinite.
    """
    limit = torch.finfo(result.dtype).max
    found = result.double().clamp(-limit, limit)
    wanted = expected.clamp(-limit, limit)
    scale = wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    error = float((found - wanted).abs().max() / scale)
    return math.inf if math.isnan(error) else error


def tolerance(out_dtype: torch.dtype) -> float:
    """What :func:`relative_error` may be for a result of ``out_dtype``."""
    return torch.finfo(out_dtype).eps + _SUM_TOLERANCE
