"""The Hopper kernel of ``sparse24_mm`` called by itself, and what it takes.

:func:`sparse24_mm` is the op on CUDA, outside of compiled code: the kernel, ours or a
vendor's, where there is one for the device and the shapes, the dense product of the
unpacked operand else.  Autotuning measures the same kernels through :func:`launch`.

Shape legend: ``M`` rows, ``N`` columns, ``K`` reduction, ``S`` packed reduction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from inductor_sparse import formats, ops, profitability, reference
from inductor_sparse.lowerings import sparse24_kernel, tile_model, vendor24
from inductor_sparse.lowerings.hopper import ALIGNMENT, MAX_SIZE
from inductor_sparse.lowerings.sparse24_kernel import DTYPE_NAMES, TileConfig
from inductor_sparse.runtime import cuda_driver, cuda_kernel
from inductor_sparse.runtime.cuda_kernel import CudaKernel, TensorMap

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes in which the kernel stores a product."""


def size_refusal(
    dtype: torch.dtype, out_dtype: torch.dtype, sizes: Sequence[int]
) -> str | None:
    """Why there is no kernel for a product, whatever the strides, or None.

    Args:
        dtype: of the operands.
        out_dtype: of the result.
        sizes: those of M, N and K that are known.
    """
    if dtype not in DTYPE_NAMES:
        return f"no sparse tensor core multiplies {dtype}"
    if out_dtype not in OUT_DTYPES:
        return f"the kernel does not store {out_dtype}"
    if any(size == 0 for size in sizes):
        return "the product is empty"
    if any(size > MAX_SIZE for size in sizes):
        return f"a size is over {MAX_SIZE}"
    return None


def kernel_of(
    arch: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    sizes: tuple[int, int, int],
    *,
    scaled: bool,
) -> str:
    """Whose kernel the op takes: ``own``, ``cutlass``, ``cusparselt`` or ``dense``.

    Args:
        arch: as :func:`profitability.architecture` names it.
        dtype: of the operands.
        out_dtype: of the result.
        sizes: M, N and K.
        scaled: whether there are scales.
    """
    route = profitability.ROUTES.get(arch, "dense")
    if route == "dense" or size_refusal(dtype, out_dtype, sizes) is not None:
        return "dense"
    if route == "own":
        return route
    refusal = getattr(vendor24, f"{route}_refusal")
    refused = refusal(dtype, out_dtype, sizes[1], scaled=scaled)
    return route if refused is None else "dense"


def weight_order(
    size: Sequence[int], stride: Sequence[int], itemsize: int
) -> str | None:
    """How ``w [K, N]`` lies in memory, if TMA can fetch it from there.

    Returns:
        ``"k"`` if its columns are contiguous, as of ``linear.weight.t()``; ``"n"`` if
        its rows are (16-bit only: ``wgmma`` transposes nothing narrower); None if it
        has to be copied.
    """
    K, N = size
    along_k, along_n = stride
    step = ALIGNMENT // itemsize
    if (along_k == 1 or K == 1) and along_n >= K and along_n % step == 0:
        return "k"
    rows = (along_n == 1 or N == 1) and along_k >= N and along_k % step == 0
    return "n" if rows and itemsize == 2 else None


def fetchable(w: Tensor) -> tuple[Tensor, str]:
    """``w`` and its order, or a copy of it that TMA can fetch, and ``"k"``."""
    order = weight_order(w.shape, w.stride(), w.element_size())
    if order is not None and w.data_ptr() % ALIGNMENT == 0:
        return w, order
    K, N = w.shape
    step = ALIGNMENT // w.element_size()
    copy = w.new_empty(N, -(-K // step) * step)[:, :K]
    return copy.copy_(w.t()).t(), "k"


def stores_through_tma(out_dtype: torch.dtype, N: int) -> bool:
    """Whether TMA can store a row-major result: 16 bits, rows of 16 bytes or more."""
    return out_dtype.itemsize == 2 and N % 8 == 0


@functools.lru_cache(maxsize=256)
def plain_kernel(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    tile: TileConfig,
    b_order: str,
    *,
    tma_store: bool,
    has_row_scale: bool,
    has_col_scale: bool,
) -> CudaKernel:
    """The kernel that stores the scaled product itself; compiled when first run."""
    # Any width of rows that does, or does not, suit TMA.
    epilogue = sparse24_kernel.plain_epilogue(out_dtype, 8 if tma_store else 1)
    scales = {"has_row_scale": has_row_scale, "has_col_scale": has_col_scale}
    name = f"sparse24_mm_{DTYPE_NAMES[dtype]}"
    source = sparse24_kernel.kernel_source(
        name, dtype, tile, epilogue, b_order=b_order, **scales
    )
    boxes = sparse24_kernel.map_boxes(dtype, tile, epilogue, b_order)
    return CudaKernel(
        name,
        source,
        signature=(
            *sparse24_kernel.signature(epilogue, **scales),
            *("pointer" for _ in epilogue.params),
        ),
        maps=tuple(TensorMap(**box) for box in boxes),
        threads=tile.threads,
        cluster=tile.cluster,
        shared_bytes=tile.shared_bytes(dtype.itemsize),
        grid="persistent",
    )


def launch(
    tile: TileConfig,
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Multiply with one tile into ``out [M, N]``, row-major, on the current stream.

    ``w`` must be :func:`fetchable`, the scales float32 and contiguous.

    Raises:
        SparseKernelError: the kernel cannot be compiled or launched.
    """
    (K, N), M = w.shape, values.shape[0]
    b_order = weight_order(w.shape, w.stride(), w.element_size())
    tma_store = stores_through_tma(out.dtype, N)
    kernel = plain_kernel(
        values.dtype,
        out.dtype,
        tile,
        b_order or "k",
        tma_store=tma_store,
        has_row_scale=row_scale is not None,
        has_col_scale=col_scale is not None,
    )
    before, after = ((out,), ()) if tma_store else ((), (out,))
    scales = [scale for scale in (row_scale, col_scale) if scale is not None]
    with torch.cuda.device(values.device):
        stream = torch.cuda.current_stream().cuda_stream
        kernel.run(
            values, w, *before, metadata, *scales, M, N, K, *after, stream=stream
        )


def sparse24_mm(
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``sparse24_mm`` on CUDA; arguments and result are those of the op.

    Raises:
        SparseShapeError: shapes or dtypes do not fit.
        SparseKernelError: the kernel cannot be compiled or launched.
    """
    reference.check_sparse24_mm(values, w, row_scale, col_scale, out_dtype)
    formats.check_packed(values, metadata, w.shape[0])
    (K, N), M = w.shape, values.shape[0]
    out = reference.result_dtype24(values.dtype, out_dtype)
    arch = profitability.architecture(values.device)
    scaled = row_scale is not None or col_scale is not None
    kernel = kernel_of(arch, values.dtype, out, (M, N, K), scaled=scaled)
    if kernel == "dense" or (kernel == "own" and not cuda_kernel.available()):
        return vendor24.masked_dense(
            values, metadata, w, row_scale, col_scale, out_dtype=out_dtype
        )
    w, b_order = fetchable(w)
    operands = _aligned(values.contiguous()), _aligned(metadata.contiguous()), w
    scales = _scale(row_scale), _scale(col_scale)
    if kernel != "own":
        return getattr(vendor24, kernel)(*operands, *scales, out_dtype=out_dtype)
    result = values.new_empty(M, N, dtype=out)
    processors = cuda_driver.multiprocessors(values.device)
    tile = tile_model.best_tile(M, N, K, values.dtype, b_order, processors)
    launch(tile, *operands, *scales, result)
    return result


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _scale(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.float().contiguous()


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
_library.impl("sparse24_mm", sparse24_mm, "CUDA")
