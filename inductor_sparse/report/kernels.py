"""Which kernel multiplies a 2:4 site on a GPU, and how near it comes to the peak.

Rates count the operations of the dense product, of which 2:4 does half: the peak of the
sparse tensor cores is twice that of the dense ones in the same count.

Shape legend: ``M`` rows, ``N`` columns, ``K`` reduction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_sparse import profitability, reference
from inductor_sparse.lowerings import sparse24_gemm, tile_model
from inductor_sparse.lowerings.sparse24_kernel import DTYPE_NAMES

_TFLOPS_16_BIT = {"sm_80": 312.0 / 108, "sm_90": 989.4 / 132}
"""Dense 16-bit rate of one multiprocessor at the boost clock, by NVIDIA's data sheets
of the A100 and the H100; 8 bits are twice as fast."""

_REPEATS = 5
_HEAD_START_CYCLES = 2_000_000
"""About a millisecond."""


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """A product on a GPU: its kernel and tile, its rate, and the rates of the device.

    ``packed_by`` is the op that packs its left operand, empty if that is not known.
    ``dense_peak`` and ``sparse_peak`` are None for a device whose peak is not known.
    """

    kernel: str
    tflops: float
    dense_peak: float | None = None
    sparse_peak: float | None = None
    packed_by: str = ""

    def __str__(self) -> str:
        """Both kernels, as in ``sparsify24, sparse24_mm_bf16 128x256``."""
        return ", ".join(name for name in (self.packed_by, self.kernel) if name)


def measure(
    compute: Callable[[], Any], args: tuple[Any, ...], packed_by: str = ""
) -> KernelUse:
    """Time a ``sparse24_mm`` on a GPU that was just run once.

    Args:
        compute: runs it again.
        args: those of the op.
        packed_by: the op that packed its left operand.
    """
    values, _, w = args[:3]
    device = torch.cuda.get_device_properties(values.device)
    arch = profitability.architecture(values.device)
    (K, N), M = w.shape, values.shape[0]
    count = device.multi_processor_count
    scaled = any(scale is not None for scale in args[3:])
    dense = dense_peak(arch, values.dtype, count)
    return KernelUse(
        kernel=name(values, w, arch, count, scaled=scaled),
        tflops=2 * M * N * K / _seconds(compute) / 1e12,
        dense_peak=dense,
        sparse_peak=None if dense is None else 2 * dense,
        packed_by=packed_by,
    )


def dense_peak(arch: str, dtype: torch.dtype, multiprocessors: int) -> float | None:
    """TFLOP/s of the dense tensor cores of a device, None if not known."""
    one = _TFLOPS_16_BIT.get(arch)
    if one is None:
        return None
    return one * multiprocessors * (2 if dtype.itemsize == 1 else 1)


def name(
    values: Tensor, w: Tensor, arch: str, multiprocessors: int, *, scaled: bool = False
) -> str:
    """The kernel that the op takes for these operands, and its tile if it is ours.

    Autotuning, where it is on, may choose another tile.
    """
    (K, N), M, dtype = w.shape, values.shape[0], values.dtype
    out = reference.result_dtype24(dtype, None)
    kernel = sparse24_gemm.kernel_of(arch, dtype, out, (M, N, K), scaled=scaled)
    if kernel != "own":
        return "masked dense" if kernel == "dense" else kernel
    order = sparse24_gemm.weight_order(w.shape, w.stride(), w.element_size()) or "k"
    tile = tile_model.best_tile(M, N, K, dtype, order, multiprocessors)
    return f"sparse24_mm_{DTYPE_NAMES[dtype]} {tile}"


def _seconds(compute: Callable[[], Any]) -> float:
    """The shortest of a few runs.

    The device is kept busy until all of a run is queued, so that what the host takes to
    call an op is not counted: generated code takes less.
    """
    times = []
    for _ in range(_REPEATS):
        torch.cuda._sleep(_HEAD_START_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        compute()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)
