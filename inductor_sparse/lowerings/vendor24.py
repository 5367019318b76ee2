"""``sparse24_mm`` by the kernels of others: dense, cuSPARSELt, and torch's CUTLASS op.

All of them take the operands of ``sparse24_mm`` and give its result up to rounding:

- :func:`masked_dense` unpacks and multiplies densely; it always works;
- :func:`cusparselt` unpacks, compresses into cuSPARSELt's own format, and multiplies
  with it (hipSPARSELt under ROCm);
- :func:`cutlass` multiplies with ``torch._sparse_semi_structured_mm``, which takes our
  values as they are and the words of the metadata in another order.

Shape legend: ``M`` rows, ``N`` columns, ``K`` reduction, ``S`` packed reduction, ``R``
and ``C`` blocks of 64 rows and of 64 columns of the packed operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._inductor.select_algorithm import ExternKernelChoice

from inductor_sparse import formats, ops, reference
from inductor_sparse.formats import BLOCK
from inductor_sparse.runtime import triton_text

_WIDE = (torch.bfloat16, torch.float16)
_NARROW = (torch.float8_e4m3fn, torch.int8)

_BITS = {1: torch.uint8, 2: torch.int16}
_UNPACK_ROWS, _UNPACK_COLUMNS = 8, 256


def masked_dense(
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Unpack and multiply densely, with the fastest dense kernel that takes the shapes.

    Args:
        values: ``[M, S]``.
        metadata: ``[R, C, 128]`` int32.
        w: ``[K, N]``, the dtype of ``values``, any strides.
        row_scale: ``[M]`` or None.
        col_scale: ``[N]`` or None.
        out_dtype: dtype of the result, see :func:`reference.result_dtype24`.

    Raises:
        SparseShapeError: shapes or dtypes do not fit.
    """
    dtype, out = values.dtype, reference.result_dtype24(values.dtype, out_dtype)
    if (
        values.is_cuda
        and dtype in _WIDE + _NARROW
        and 0 not in (*values.shape, *w.shape)
    ):
        dense = unpack(values, metadata, w.shape[0])
        exact = row_scale is None and col_scale is None and out == dtype
        product = torch.mm(dense, w) if exact else _dense_product(dense, w)
        if product is not None:
            return _scaled(product, row_scale, col_scale, out)
    return ops.sparse24_mm(
        values, metadata, w, row_scale, col_scale, out_dtype=out_dtype
    )


def unpack(values: Tensor, metadata: Tensor, features: int) -> Tensor:
    """:func:`inductor_sparse.formats.unpack`, on a GPU by one kernel."""
    if (
        not values.is_cuda
        or values.dtype.itemsize not in _BITS
        or not triton_text.available()
    ):
        return formats.unpack(values, metadata, features)
    formats.check_packed(values, metadata, features)
    bits = _BITS[values.dtype.itemsize]
    M = values.shape[0]
    dense = values.new_empty(M, features)
    values, metadata = values.contiguous(), metadata.contiguous()
    grid = (-(-M // _UNPACK_ROWS), -(-features // _UNPACK_COLUMNS))
    if 0 in grid:
        return dense
    with torch.cuda.device(values.device):
        triton_text.load("unpack24").unpack24_kernel[grid](
            values.view(bits),
            metadata,
            dense.view(bits),
            M,
            features,
            values.stride(0),
            WIDE=values.dtype.itemsize == 2,
            BLOCK_M=_UNPACK_ROWS,
            BLOCK_K=_UNPACK_COLUMNS,
        )
    return dense


def _dense_product(dense: Tensor, w: Tensor) -> Tensor | None:
    """``dense @ w`` in float32 or int32; None where no fast kernel takes the shapes."""
    (M, K), N = dense.shape, w.shape[1]
    if dense.dtype == torch.float8_e4m3fn and not _multiplies_e4m3(dense.device):
        dense, w = dense.half(), w.half()  # which hold every value of e4m3
    if dense.dtype in _WIDE:
        return torch.mm(dense, w, out_dtype=torch.float32)
    if K % 16 or N % 16 or M <= 16:
        return None
    if dense.dtype == torch.int8:
        return torch._int_mm(dense, w)
    one = torch.ones((), device=dense.device)
    by_column = w if w.stride(0) == 1 else w.t().contiguous().t()
    return torch._scaled_mm(dense, by_column, one, one, out_dtype=torch.float32)


def _multiplies_e4m3(device: torch.device) -> bool:
    """Whether ``torch._scaled_mm`` runs there: from sm_89 on."""
    if torch.version.hip:
        return False  # the GPUs that we know have another format of 8 bits
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _scaled(
    product: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``product`` scaled in float32, then rounded once."""
    if row_scale is None and col_scale is None:
        return product.to(out_dtype)
    product = product.float()
    if row_scale is not None:
        product = product * row_scale.float().unsqueeze(1)
    if col_scale is not None:
        product = product * col_scale.float()
    return product.to(out_dtype)


def cusparselt_refusal(
    dtype: torch.dtype, out_dtype: torch.dtype, N: int, *, scaled: bool
) -> str | None:
    """Why cuSPARSELt cannot compute a product, or None."""
    if not torch.backends.cusparselt.is_available():
        return "torch has no cuSPARSELt"
    dtypes = _WIDE + _NARROW
    return _refusal("cuSPARSELt", dtypes, dtype, out_dtype, N, scaled=scaled)


def cusparselt(
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Unpack, compress into cuSPARSELt's format, multiply; arguments as above.

    Ask :func:`cusparselt_refusal` first.  The algorithm of a shape is searched for when
    it is first seen.
    """
    M, K = values.shape[0], w.shape[0]
    out = reference.result_dtype24(values.dtype, out_dtype)
    dense = unpack(values, metadata, 2 * values.shape[1])
    dense = torch.nn.functional.pad(dense, (0, 0, 0, -M % 32))
    if dense.shape[1] != K:
        w = torch.nn.functional.pad(w, (0, 0, 0, dense.shape[1] - K))
    if not w.is_contiguous() or w.dtype in _NARROW:
        # Anything else than row-major is taken for the transpose of row-major.
        w = w.t().contiguous().t()
    compressed = torch._cslt_compress(dense)
    product_dtype = None
    if values.dtype in _NARROW:
        narrow = torch.int32 if values.dtype == torch.int8 else torch.float32
        product_dtype = narrow
    algorithm = _cusparselt_algorithm(compressed, w, product_dtype)
    product = torch._cslt_sparse_mm(
        compressed, w, out_dtype=product_dtype, **algorithm._asdict()
    )
    return _scaled(product[:M], row_scale, col_scale, out)


class _Algorithm(NamedTuple):
    """How cuSPARSELt multiplies: its number, and how it splits the reduction."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


_algorithms: dict[tuple[object, ...], _Algorithm] = {}


def _cusparselt_algorithm(
    compressed: Tensor, w: Tensor, out_dtype: torch.dtype | None
) -> _Algorithm:
    """The fastest algorithm for these operands; while capturing a graph the default."""
    key = (compressed.shape, w.shape, w.stride(), w.dtype, out_dtype, w.device)
    if key not in _algorithms:
        if torch.cuda.is_current_stream_capturing():
            return _Algorithm()
        search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
        found = search(compressed, w, None, None, out_dtype, False)
        _algorithms[key] = _Algorithm(*map(int, found[:3]))
    return _algorithms[key]


def cutlass_refusal(
    dtype: torch.dtype, out_dtype: torch.dtype, N: int, *, scaled: bool
) -> str | None:
    """Why torch's CUTLASS op cannot compute a product, or None."""
    dtypes = (*_WIDE, torch.int8)
    return _refusal("torch's CUTLASS op", dtypes, dtype, out_dtype, N, scaled=scaled)


def _refusal(
    kernel: str,
    dtypes: tuple[torch.dtype, ...],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    N: int,
    *,
    scaled: bool,
) -> str | None:
    """Why a vendor's kernel for ``dtypes`` cannot compute a product, or None."""
    if dtype not in dtypes:
        return f"{kernel} does not multiply {dtype}"
    if dtype in _WIDE and (scaled or out_dtype != dtype):
        return f"{kernel} gives no {dtype} product before it is rounded"
    columns = 8 if dtype in _WIDE else 16
    if N % columns:
        return f"{kernel} needs N to be a multiple of {columns}, not {N}"
    return None


def cutlass_metadata(metadata: Tensor, dtype: torch.dtype) -> Tensor:
    """The words of ``metadata`` in the order torch's CUTLASS op reads them.

    CUTLASS interleaves the rows of a block of 32 (16-bit values) or 16 (8-bit), swaps
    the off-diagonal elements of every 2 x 2, and stores the columns in pairs.  Both
    orders follow the lanes of ``mma.sp``, so only whole axes trade places.

    Args:
        metadata: ``[R, C, 128]`` int32 in fragment order.
        dtype: of the values.

    Returns:
        ``[64 * R, 4 * C]`` int16 for 16-bit values, each element the groups of 16
        columns; ``[64 * R, 2 * C]`` int32 for 8-bit values, of 32 columns.
    """
    R, C, _ = metadata.shape
    if dtype.itemsize == 1:
        return metadata.transpose(0, 1).reshape(R * BLOCK, 2 * C)
    # (R, C, warp pair, warp, row, column pair, column, row + 8)
    axes = metadata.contiguous().view(torch.int16).view(R, C, 2, 2, 8, 2, 2, 2)
    return axes.permute(1, 5, 0, 2, 4, 3, 6, 7).reshape(R * BLOCK, 4 * C)


def cutlass(
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply with ``torch._sparse_semi_structured_mm``; arguments as above.

    Ask :func:`cutlass_refusal` first; only some devices have the kernel.  In 8 bits it
    takes nothing but columns of ``w`` that are contiguous.
    """
    M, S = values.shape
    rows = metadata.shape[0] * BLOCK
    values = torch.nn.functional.pad(values, (0, 0, 0, rows - M))
    if w.shape[0] != 2 * S:
        w = torch.nn.functional.pad(w.t(), (0, 2 * S - w.shape[0])).t()
    if 1 not in w.stride() or (w.itemsize == 1 and w.stride(0) != 1):
        w = w.t().contiguous().t()
    words = cutlass_metadata(metadata, values.dtype)
    wide = torch.int32 if values.dtype == torch.int8 else None
    product = torch._sparse_semi_structured_mm(values, words, w, out_dtype=wide)
    out = reference.result_dtype24(values.dtype, out_dtype)
    return _scaled(product[:M], row_scale, col_scale, out)


def _extern(kernel: Callable[..., Tensor], name: str) -> ExternKernelChoice:
    """A choice called ``extern_kernels.inductor_sparse_<name>`` in generated code.

    Generated code passes those scales there are, and says which by ``row`` and ``col``.
    """

    def call(
        values: Tensor,
        metadata: Tensor,
        w: Tensor,
        *scales: Tensor,
        row: bool = False,
        col: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        given = iter(scales)
        row_scale = next(given) if row else None
        col_scale = next(given) if col else None
        return kernel(values, metadata, w, row_scale, col_scale, out_dtype=out_dtype)

    made = f"inductor_sparse_{name}"
    return ExternKernelChoice(call, name=made, has_out_variant=False)


MASKED_DENSE = _extern(masked_dense, "masked_dense")
CUSPARSELT = _extern(cusparselt, "cusparselt")
CUTLASS = _extern(cutlass, "cutlass")
