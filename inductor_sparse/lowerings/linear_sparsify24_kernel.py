"""The Hopper kernel of ``linear_sparsify24``: its tiles, what it takes, its launch.

:func:`linear_sparsify24` is the op on CUDA: the kernel where there is one for the
device and the operands, else the product and the packing one after the other.  With
operands in e4m3 it is the kernel of ``linear_sparsify24_quantized``.

Shape legend: ``M`` tokens, ``D`` features of the model, ``K`` neurons, ``S`` packed
neurons.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from inductor_sparse import formats, ops, profitability, reference
from inductor_sparse.lowerings import hopper
from inductor_sparse.lowerings.hopper import ALIGNMENT, MAX_SIZE
from inductor_sparse.lowerings.hopper import SHARED_BYTES as SHARED_BYTES
from inductor_sparse.runtime import cuda_driver, cuda_kernel
from inductor_sparse.runtime.cuda_kernel import CudaKernel, TensorMap

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3",
}
"""Dtypes of the operands, and what PTX calls them."""

ACTIVATIONS = ("relu", "relu2")
"""Their values are never negative, so both ways to select are the same."""

_PACK_BYTES = 2 * 16 * 128


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a CTA tiles the product.

    ``consumers`` warpgroups compute ``m64`` blocks of 64 tokens each, all of them
    ``block_k`` neurons; a ``cluster`` of CTAs, adjacent along M, shares each tile of
    the weight; ``stages`` tiles are in flight; ``group`` rows of clusters go through
    the neurons together.
    """

    consumers: int = 2
    m64: int = 1
    block_k: int = 256
    stages: int = 4
    cluster: int = 2
    group: int = 8

    @property
    def block_m(self) -> int:
        """Tokens of a tile."""
        return 64 * self.consumers * self.m64

    @property
    def threads(self) -> int:
        """Threads of a CTA: the consumers and one warpgroup that produces."""
        return 128 * (self.consumers + 1)

    @property
    def shared_bytes(self) -> int:
        """Bytes of dynamic shared memory: ring, packing, bias, barriers, alignment.

        Operands of 8 bits take no more: their scales lie where they pack less at once.
        """
        ring = self.stages * (self.block_m + self.block_k) * 128
        consumer = 4 * _PACK_BYTES + self.block_k * 2
        return ring + self.consumers * consumer + 16 * self.stages + 1024

    def __str__(self) -> str:
        """As in ``128x256 cluster 2 stages 4``."""
        return (
            f"{self.block_m}x{self.block_k} cluster {self.cluster} stages {self.stages}"
        )


TILES: dict[TileConfig, float] = {
    TileConfig(): 1.0,
    TileConfig(m64=2, block_k=192, stages=3, group=4): 1.02,
    TileConfig(cluster=1): 0.96,
    TileConfig(block_k=128, stages=6): 0.95,
}
"""The tiles there are, and their rates relative to the first on an H200 with settled
clocks (512 to 32768 tokens, 4096 -> 16384 to 8192 -> 28672): the second 1.015 to 1.03
where all waves are full, and more where power is left; the third 0.92 to 1.01, the more
the fewer tokens; the last 0.90 to 0.98."""

PAIR_RATE = 0.93
"""The rate of cuBLAS and the packing behind it in bf16, likewise: 0.89 to 0.97."""


def rate(M: int, K: int, tile: TileConfig, processors: int) -> float:
    """The expected rate of a tile, relative to one that fills every wave of CTAs."""
    tokens = tile.block_m * tile.cluster
    clusters = -(-M // tokens) * -(-K // tile.block_k)
    at_once = processors // tile.cluster
    computed = -(-clusters // at_once) * at_once * tokens * tile.block_k
    used = at_once * tile.cluster / processors
    return TILES[tile] * used * M * K / computed


def fastest_tile(M: int, K: int, processors: int) -> TileConfig:
    """The tile for a size."""
    return max(TILES, key=lambda tile: rate(M, K, tile, processors))


def best_tile(M: int, K: int, processors: int) -> TileConfig | None:
    """The tile for a size, or None where the pair is expected to be faster."""
    tile = fastest_tile(M, K, processors)
    return tile if rate(M, K, tile, processors) >= PAIR_RATE else None


def kernel_source(
    name: str,
    dtype: torch.dtype,
    tile: TileConfig,
    *,
    activation: str = "relu2",
    has_bias: bool = False,
    has_energy: bool = False,
) -> str:
    """CUDA C++ of one kernel.

    Args:
        name: name of the kernel.
        dtype: of the operands; a key of :data:`DTYPE_NAMES`.
        tile: how it tiles the product.
        activation: one of :data:`ACTIVATIONS`.
        has_bias: whether there is a bias.
        has_energy: whether it counts what is kept of what energy.
    """
    return hopper.render(
        "cuda/linear_sparsify24.cu.jinja",
        **dataclasses.asdict(tile),
        name=name,
        dtype=DTYPE_NAMES[dtype],
        square=activation == "relu2",
        has_bias=has_bias,
        has_energy=has_energy,
    )


@functools.lru_cache(maxsize=64)
def kernel(
    dtype: torch.dtype,
    activation: str,
    has_bias: bool,
    has_energy: bool,
    tile: TileConfig,
) -> CudaKernel:
    """The kernel, compiled when it first runs.

    Its arguments are x, w1, in e4m3 the scales of their rows and those of the values,
    the bias and the energy if there are any, values, metadata, then M, D and K.
    """
    name = f"linear_sparsify24_{DTYPE_NAMES[dtype]}"
    source = kernel_source(
        name,
        dtype,
        tile,
        activation=activation,
        has_bias=has_bias,
        has_energy=has_energy,
    )
    scales = 3 if dtype == torch.float8_e4m3fn else 0
    pointers = 2 + scales + has_bias + has_energy
    inner = 128 // dtype.itemsize
    return CudaKernel(
        name,
        source,
        signature=("map",) * 2 + ("pointer",) * pointers + ("int32",) * 3,
        maps=(
            TensorMap(box=(inner, tile.block_m), swizzle=128),
            TensorMap(box=(inner, tile.block_k // tile.cluster), swizzle=128),
        ),
        threads=tile.threads,
        cluster=tile.cluster,
        shared_bytes=tile.shared_bytes,
        grid="persistent",
    )


def refusal(x: Tensor, w1: Tensor, activation: str) -> str | None:
    """Why the kernel does not take these operands of one dtype, or None."""
    unknown = kind_refusal(x.device, x.dtype, activation)
    if unknown is not None:
        return unknown
    if (x.data_ptr() | w1.data_ptr()) % ALIGNMENT:
        return f"an operand does not start at a multiple of {ALIGNMENT} bytes"
    return layout_refusal(x.shape, x.stride(), x.itemsize) or layout_refusal(
        w1.shape, w1.stride(), w1.itemsize
    )


def kind_refusal(
    device: torch.device, dtype: torch.dtype, activation: str
) -> str | None:
    """Why there is no kernel, whatever the sizes, or None."""
    arch = profitability.architecture(device)
    if profitability.ROUTES.get(arch) != "own":
        return f"it is for sm_90, this is {arch}"
    if dtype not in DTYPE_NAMES:
        return f"it has no code for {dtype}"
    if activation not in ACTIVATIONS:
        return f"values of {activation!r} may be negative"
    return cuda_kernel.unavailable_reason()


def layout_refusal(
    size: tuple[int, ...], stride: tuple[int, ...], itemsize: int = 2
) -> str | None:
    """Why TMA cannot fetch a matrix of this layout, or None."""
    if 0 in size or max(size) > MAX_SIZE:
        return f"a size of {tuple(size)} is 0 or over {MAX_SIZE}"
    if stride[1] != 1 or stride[0] < size[1] or stride[0] * itemsize % ALIGNMENT:
        return f"rows with strides {tuple(stride)} are not aligned to {ALIGNMENT} B"
    return None


def launch(
    tile: TileConfig,
    x: Tensor,
    w1: Tensor,
    bias: Tensor | None,
    activation: str,
    energy: Tensor | None,
    scales: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """``(values, metadata)`` of operands that are not refused, on the current stream.

    ``scales`` are those of x, w1 and the values in e4m3; they and bias are contiguous.

    Raises:
        SparseKernelError: the kernel cannot be compiled or launched.
    """
    (M, D), K = x.shape, w1.shape[0]
    values = x.new_empty(formats.values_shape(M, K))
    metadata = x.new_empty(formats.metadata_shape(M, K), dtype=torch.int32)
    run = kernel(x.dtype, activation, bias is not None, energy is not None, tile).run
    optional = [t for t in (*scales, bias, energy) if t is not None]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        run(x, w1, *optional, values, metadata, M, D, K, stream=stream)
    return values, metadata


def linear_sparsify24(
    x: Tensor,
    w1: Tensor,
    bias: Tensor | None,
    activation: str,
    select: str,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear_sparsify24`` on CUDA; arguments and results are those of the op.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, or an unknown name.
        SparseKernelError: the kernel cannot be compiled or launched.
    """
    ops.check_energy("linear_sparsify24", energy)
    reference.check_linear_sparsify24(x, w1, bias, activation, select)
    if refusal(x, w1, activation) is None:
        processors = cuda_driver.multiprocessors(x.device)
        tile = best_tile(x.shape[0], w1.shape[0], processors)
        if tile is not None:
            bias = None if bias is None else bias.contiguous()
            return launch(tile, x, w1, bias, activation, energy)
    return ops.linear_sparsify24(x, w1, bias, activation, select, energy)


def linear_sparsify24_quantized(
    x: Tensor,
    x_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    activation: str,
    select: str,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear_sparsify24_quantized`` on CUDA; as the op, by its definition if refused.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, or an unknown name.
        SparseKernelError: the kernel cannot be compiled or launched.
    """
    operands = (x, x_scale, w1, w1_scale, bias, row_scale)
    ops.check_energy("linear_sparsify24_quantized", energy)
    reference.check_linear_sparsify24_quantized(*operands, activation, select)
    if refusal(x, w1, activation) is not None:
        return ops.linear_sparsify24_quantized(*operands, activation, select, energy)
    processors = cuda_driver.multiprocessors(x.device)
    tile = fastest_tile(x.shape[0], w1.shape[0], processors)
    bias = None if bias is None else bias.contiguous()
    scales = [scale.contiguous() for scale in (x_scale, w1_scale, row_scale)]
    return launch(tile, x, w1, bias, activation, energy, scales)


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
_library.impl("linear_sparsify24_quantized", linear_sparsify24_quantized, "CUDA")
_library.impl("linear_sparsify24", linear_sparsify24, "CUDA")
