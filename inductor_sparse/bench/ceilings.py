"""What the machine can do at best, measured in the same process as everything else.

- The memory ceiling is a copy of a large buffer, bytes read plus bytes written, by the
  faster of the device's own copy and an elementwise kernel.
- The arithmetic ceiling is a large square matmul of random numbers by torch itself; a
  2:4 product may exceed it, as it does half of the multiplications.

Zeros cost less power than random numbers, and a GPU under load is limited by power, so
the second ceiling may be exceeded by a dense matmul of sparse activations as well.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from inductor_sparse.bench.intervals import median
from inductor_sparse.bench.models import DTYPES
from inductor_sparse.bench.rows import Row
from inductor_sparse.bench.timing import interleave

COPY_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Size of the copied buffer: many times the last-level cache."""
SQUARE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the square matmul."""
SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """``copy_gb_per_s`` in 1e9 bytes, ``matmul_tflop_per_s`` in 1e12 operations."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float

    def fields(self) -> Row:
        """The columns of a row."""
        return {
            "ceiling_copy_gb_per_s": self.copy_gb_per_s,
            "ceiling_matmul_tflop_per_s": self.matmul_tflop_per_s,
        }


@functools.cache
def measure(device: str, dtype: str, seconds: float = SECONDS) -> Ceilings:
    """Measure both ceilings once per process; ``dtype`` is that of the matmul.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: of :data:`~inductor_sparse.bench.models.DTYPES`, or of 8 bits:
            ``float8_e4m3fn``, ``int8``.
        seconds: budget of each of the two.
    """
    return Ceilings(_copy(device, seconds), _matmul(device, dtype, seconds))


def _copy(device: str, seconds: float) -> float:
    """GB/s of a copy."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    calls = {
        "copy": lambda _: target.copy_(source),
        "elementwise": lambda _: torch.neg(source, out=target),
    }
    times = interleave(calls, seconds=seconds, device=device)
    fastest = min(median(samples) for samples in times.values())
    return 2 * source.nbytes / fastest / 1e3


def _matmul(device: str, dtype: str, seconds: float) -> float:
    """TFLOP/s of a square matmul of random numbers."""
    size = SQUARE[device]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device) for _ in "ab")
    if dtype == "int8":
        (a, _), (b, _) = _narrow(a, torch.int8), _narrow(b, torch.int8)
        calls = {"matmul": lambda _: torch._int_mm(a, b.t())}
    elif dtype == "float8_e4m3fn":
        (a, a_scale), (b, b_scale) = (_narrow(x, torch.float8_e4m3fn) for x in (a, b))
        calls = {"matmul": lambda _: scaled_mm(a, b, a_scale, b_scale)}
    else:
        a, b = a.to(DTYPES[dtype]), b.to(DTYPES[dtype])
        calls = {"matmul": lambda _: torch.mm(a, b.t())}
    times = interleave(calls, seconds=seconds, device=device)
    return 2 * size**3 / median(times["matmul"]) / 1e6


def _narrow(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bits, row by row, and its scales."""
    from inductor_sparse.bench.quantized import quantize_rows

    return quantize_rows(x, dtype)


def scaled_mm(
    x_MK: Tensor, w_NK: Tensor, x_scale_M: Tensor, w_scale_N: Tensor
) -> Tensor:
    """Torch's own fp8 product with a scale per row of either side, bfloat16 out."""
    return torch._scaled_mm(
        x_MK,
        w_NK.t(),
        x_scale_M[:, None],
        w_scale_N[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
