"""What the eager definitions accept: activations, dtypes, shapes.

Shape legend: as in :mod:`inductor_sparse.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inductor_sparse.errors import SparseShapeError

DTYPES: tuple[torch.dtype, ...] = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)
"""The dtypes of activations and weights for which the ops are defined."""

QUANTIZED_LIMITS: dict[torch.dtype, float] = {
    torch.float8_e4m3fn: 448.0,
    torch.int8: 127.0,
}
"""The 8-bit dtypes, and the magnitude that the largest value of a row becomes."""

SELECTS: tuple[str, ...] = ("largest", "largest_abs")
"""How 2:4 selection compares: by value (non-negative input) or by magnitude."""

GROUP = 4
KEPT = 2
BLOCK = 64

INT8_MAX_K = (2**31 - 1) // 128**2 * GROUP // KEPT
"""Columns of a packed int8 operand whose products add up to an int32 in any case."""


def _relu2(z: Tensor) -> Tensor:
    return torch.relu(z).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "relu2": _relu2,
}
"""The activations by name; every one maps zero to zero and NaN to NaN."""


def check_activation(op: str, activation: str) -> None:
    """Raise :class:`SparseShapeError` unless ``activation`` is a key of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise SparseShapeError(
            f"{op}: unknown activation {activation!r}; use one of "
            f"{', '.join(ACTIVATIONS)}"
        )


def check_select(op: str, select: str) -> None:
    """Raise :class:`SparseShapeError` unless ``select`` is one of :data:`SELECTS`."""
    if select not in SELECTS:
        raise SparseShapeError(
            f"{op}: unknown select {select!r}; use one of {', '.join(SELECTS)}"
        )


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Raise :class:`SparseShapeError` unless all have one and the same of DTYPES."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    for name, tensor in tensors.items():
        if tensor.dtype.is_complex:
            raise SparseShapeError(
                f"{op}: {name} is {tensor.dtype}, and ReLU has no meaning for complex "
                f"numbers; pass real tensors ({names}) or keep the dense matmul"
            )
        if tensor.dtype not in DTYPES:
            raise SparseShapeError(
                f"{op}: {name} is {tensor.dtype}, supported are {names}; convert it, "
                f"e.g. {name}.to(torch.float32), or keep the dense matmul"
            )
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise SparseShapeError(f"{op}: dtypes differ ({found}); cast them to one dtype")


def check_shape(op: str, name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raise :class:`SparseShapeError` unless ``tensor`` has the ``expected`` shape.

    An ``int`` must be met; a ``str`` names a size that may be anything.
    """
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(
        not isinstance(want, str) and got != want
        for got, want in zip(shape, expected, strict=True)
    ):
        wanted = ", ".join(str(size) for size in expected)
        raise SparseShapeError(f"{op}: {name} has shape {shape}, expected [{wanted}]")


def _check_scaled_rows(op: str, z: Tensor, w: Tensor, w_scale: Tensor | None) -> None:
    """Raise :class:`SparseShapeError` unless ``w_scale`` is what ``w [K, N]`` needs."""
    if w_scale is None:
        raise SparseShapeError(
            f"{op}: w is {w.dtype} and has no w_scale; pass the scales of its rows, "
            "which quantize_rows returns with them"
        )
    if w.dtype not in QUANTIZED_LIMITS:
        names = ", ".join(str(known) for known in QUANTIZED_LIMITS)
        raise SparseShapeError(
            f"{op}: w is {w.dtype} and has a w_scale, which only {names} take; leave "
            "it out, or multiply w by it"
        )
    check_dtypes(op, z=z)
    check_shape(op, "z", z, "M", "K")  # a batch of matrices has no 8-bit form
    check_shape(op, "w_scale", w_scale, z.shape[1])
    if w_scale.dtype != torch.float32:
        raise SparseShapeError(
            f"{op}: w_scale is {w_scale.dtype}, expected torch.float32; convert it"
        )


def check_activation_spmm(
    z: Tensor, w: Tensor, activation: str, w_scale: Tensor | None = None
) -> None:
    """Raise :class:`SparseShapeError` outside the domain of :func:`activation_spmm`."""
    op = "activation_spmm"
    check_activation(op, activation)
    if w_scale is not None or w.dtype in QUANTIZED_LIMITS:
        _check_scaled_rows(op, z, w, w_scale)
    else:
        check_dtypes(op, z=z, w=w)
    if z.ndim == 3:
        check_shape(op, "z", z, "B", "M", "K")
        check_shape(op, "w", w, z.shape[0], z.shape[2], "N")
    elif z.ndim == 2:
        check_shape(op, "w", w, z.shape[1], "N")
    else:
        raise SparseShapeError(
            f"{op}: z has shape {tuple(z.shape)}, expected [M, K] or [B, M, K]; "
            f"flatten the leading axes, e.g. z.flatten(0, -2)"
        )


def check_glu_spmm(
    gate: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, activation: str
) -> None:
    """Raise :class:`SparseShapeError` outside the domain of :func:`glu_spmm`."""
    op = "glu_spmm"
    check_activation(op, activation)
    check_dtypes(op, gate=gate, x=x, w_up=w_up, w_down=w_down)
    check_shape(op, "gate", gate, "M", "F")
    check_shape(op, "x", x, gate.shape[0], "D")
    check_shape(op, "w_up", w_up, gate.shape[1], x.shape[1])
    check_shape(op, "w_down", w_down, gate.shape[1], "N")


def _check_activated(
    op: str, x: Tensor, activation: str, select: str, up: Tensor | None
) -> None:
    """What the ops that select among ``act(x) * up`` have in common."""
    check_activation(op, activation)
    check_select(op, select)
    check_dtypes(op, x=x, **({} if up is None else {"up": up}))
    check_shape(op, "x", x, "M", "K")
    if up is not None:
        check_shape(op, "up", up, *x.shape)


def check_sparsify24(
    x: Tensor, activation: str, select: str, up: Tensor | None = None
) -> None:
    """Raise :class:`SparseShapeError` outside the domain of :func:`sparsify24`."""
    _check_activated("sparsify24", x, activation, select, up)


def check_quantized(op: str, dtype: torch.dtype) -> None:
    """Raise :class:`SparseShapeError` unless it is one of QUANTIZED_LIMITS."""
    if dtype not in QUANTIZED_LIMITS:
        names = ", ".join(str(known) for known in QUANTIZED_LIMITS)
        raise SparseShapeError(f"{op}: dtype is {dtype}; use one of {names}")


def check_quantize_rows(x: Tensor, dtype: torch.dtype) -> None:
    """Raise :class:`SparseShapeError` outside the domain of :func:`quantize_rows`."""
    op = "quantize_rows"
    check_dtypes(op, x=x)
    check_shape(op, "x", x, "M", "K")
    check_quantized(op, dtype)


def check_sparsify24_quantized(
    x: Tensor,
    activation: str,
    select: str,
    dtype: torch.dtype,
    up: Tensor | None = None,
) -> None:
    """Raise :class:`SparseShapeError` outside the domain of the op of that name."""
    op = "sparsify24_quantized"
    _check_activated(op, x, activation, select, up)
    check_quantized(op, dtype)


def check_linear_sparsify24(
    x: Tensor, w1: Tensor, bias: Tensor | None, activation: str, select: str
) -> None:
    """Raise :class:`SparseShapeError` outside the domain of the op of that name."""
    op = "linear_sparsify24"
    check_activation(op, activation)
    check_select(op, select)
    check_dtypes(op, x=x, w1=w1, **({} if bias is None else {"bias": bias}))
    check_shape(op, "x", x, "M", "D")
    check_shape(op, "w1", w1, "K", x.shape[1])
    if bias is not None:
        check_shape(op, "bias", bias, w1.shape[0])


def check_linear_sparsify24_quantized(
    x: Tensor,
    x_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    activation: str,
    select: str,
) -> None:
    """Raise :class:`SparseShapeError` outside the domain of the op of that name."""
    op = "linear_sparsify24_quantized"
    check_activation(op, activation)
    check_select(op, select)
    check_shape(op, "x", x, "M", "D")
    check_shape(op, "w1", w1, "K", x.shape[1])
    check_shape(op, "x_scale", x_scale, x.shape[0])
    check_shape(op, "w1_scale", w1_scale, w1.shape[0])
    check_shape(op, "row_scale", row_scale, x.shape[0])
    e4m3, wide = torch.float8_e4m3fn, torch.float32
    expected = {"x": (x, e4m3), "w1": (w1, e4m3), "x_scale": (x_scale, wide)}
    expected |= {"w1_scale": (w1_scale, wide), "row_scale": (row_scale, wide)}
    if bias is not None:
        check_shape(op, "bias", bias, w1.shape[0])
        expected["bias"] = (bias, torch.bfloat16)
    for name, (tensor, dtype) in expected.items():
        if tensor.dtype != dtype:
            raise SparseShapeError(f"{op}: {name} is {tensor.dtype}, expected {dtype}")


def _check_operands24(op: str, x24: Tensor, w: Tensor) -> None:
    """As :func:`check_dtypes`, for which the 8-bit dtypes are fine as well."""
    for name, tensor in (("values", x24), ("w", w)):
        if tensor.dtype not in QUANTIZED_LIMITS:
            check_dtypes(op, **{name: tensor})
    if x24.dtype != w.dtype:
        raise SparseShapeError(
            f"{op}: dtypes differ (values {x24.dtype}, w {w.dtype}); cast them to one "
            f"dtype"
        )


def check_sparse24_mm(
    x24: Tensor,
    w: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise :class:`SparseShapeError` outside the domain of :func:`sparse24_mm`.

    Only the number of rows of ``x24`` is looked at, so the stored values do as well.
    """
    op = "sparse24_mm"
    _check_operands24(op, x24, w)
    check_shape(op, "values", x24, "M", "S")
    check_shape(op, "w", w, "K", "N")
    if w.dtype == torch.int8 and isinstance(w.shape[0], int):
        _check_int32_sums(op, w.shape[0])
    scales = {
        "row_scale": (row_scale, x24.shape[0]),
        "col_scale": (col_scale, w.shape[1]),
    }
    for name, (scale, size) in scales.items():
        if scale is not None:
            check_dtypes(op, **{name: scale})
            check_shape(op, name, scale, size)
    if out_dtype is not None and out_dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise SparseShapeError(f"{op}: out_dtype is {out_dtype}; use one of {names}")


def _check_int32_sums(op: str, K: int) -> None:
    """Raise where sums of the products of kept int8 may not fit int32."""
    if K > INT8_MAX_K:
        raise SparseShapeError(
            f"{op}: w has {K} rows, and sums over more than {INT8_MAX_K} of int8 may "
            "overflow int32; split the product, or use torch.float8_e4m3fn"
        )


def result_dtype24(
    values_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of the result of ``sparse24_mm``: asked for, or that of the values.

    Products of 8-bit values are bfloat16 unless something else is asked for.
    """
    if out_dtype is not None:
        return out_dtype
    return torch.bfloat16 if values_dtype in QUANTIZED_LIMITS else values_dtype


def activation(z: Tensor, name: str) -> Tensor:
    """``act(z)``, rounded to ``z.dtype``; NaN stays NaN.

    Args:
        z: any shape, one of :data:`DTYPES`.
        name: ``identity``, ``relu`` or ``relu2`` (``relu(z) ** 2``, So et al.,
            "Primer", 2021, https://arxiv.org/abs/2109.08668).

    Raises:
        SparseShapeError: ``name`` is unknown, or the dtype is not supported.

    Example:
        >>> activation(torch.tensor([-2.0, 0.5, 3.0]), "relu2")
        tensor([0.0000, 0.2500, 9.0000])
    """
    check_activation("activation", name)
    check_dtypes("activation", z=z)
    return ACTIVATIONS[name](z)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of products of ``dtype`` are accumulated."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def strided_extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements of memory from the first to the last element, both included."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def check_window(
    weight: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int
) -> None:
    """Raise :class:`SparseShapeError` unless the window lies within the weight."""
    op = "row_major_weight"
    if len(size) != len(stride):
        raise SparseShapeError(
            f"{op}: size {list(size)} and stride {list(stride)} differ in length"
        )
    if any(number < 0 for number in (*size, *stride, storage_offset)):
        raise SparseShapeError(
            f"{op}: size {list(size)}, stride {list(stride)} and offset "
            f"{storage_offset} must not be negative"
        )
    extent = strided_extent(size, stride)
    have = strided_extent(weight.shape, weight.stride())
    if storage_offset + extent > have:
        raise SparseShapeError(
            f"{op}: a window of size {list(size)}, stride {list(stride)} at offset "
            f"{storage_offset} needs {storage_offset + extent} elements, the weight "
            f"spans {have}; pass the tensor that the window was taken from"
        )
