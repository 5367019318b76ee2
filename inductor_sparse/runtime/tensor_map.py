"""Tensor maps: how the tensor memory accelerator of a GPU is told about a tensor.

A map is 128 bytes that the driver makes from address, sizes, strides and the box that
one copy moves.  A kernel takes it by value.  Making one takes microseconds, and most
are the same at every launch (a weight always is), so each argument of a kernel keeps
those it saw last.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from inductor_sparse.errors import SparseKernelError
from inductor_sparse.runtime import cuda_driver

BYTES = 128
ALIGNMENT = 128
"""What the driver of CUDA 13 asks for; 64 was enough before."""

MAX_KEPT = 256
"""Maps kept for one argument: more than a model has layers that share a kernel."""

_U8, _I32, _F16, _F32, _BF16 = 0, 3, 6, 7, 9
ELEMENT_TYPES: dict[torch.dtype, int] = {
    torch.uint8: _U8,
    torch.int8: _U8,
    torch.float8_e4m3fn: _U8,
    torch.float8_e5m2: _U8,
    torch.int32: _I32,
    torch.float16: _F16,
    torch.float32: _F32,
    torch.bfloat16: _BF16,
}
"""dtype -> ``CUtensorMapDataType``; bytes of any meaning are moved as such."""

SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
"""Bytes of the swizzle pattern -> ``CUtensorMapSwizzle``."""

_NO_INTERLEAVE, _L2_128_BYTES, _OUTSIDE_IS_ZERO = 0, 2, 0
_MAX_BOX = 256
MAX_DIMENSION = 2**30
"""A quarter of what a map can tell: kernels compute coordinates in 32 bits, up to the
end of a tile that begins inside the tensor."""
_MAX_STRIDE_BYTES = 2**40


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """How a kernel moves one of its tensors.

    Attributes:
        box: elements of one copy along the contiguous axis, and along the other.
        swizzle: bytes of the pattern in shared memory: 0 (none), 32, 64 or 128.
        transposed: whether the map is made of ``tensor.t()``.
    """

    box: tuple[int, int]
    swizzle: int = 0
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.swizzle not in SWIZZLES:
            raise SparseKernelError(
                f"a tensor map swizzles {tuple(SWIZZLES)} bytes, not {self.swizzle}"
            )
        if len(self.box) != 2 or not all(1 <= n <= _MAX_BOX for n in self.box):
            raise SparseKernelError(
                f"a box of a tensor map is two numbers from 1 to {_MAX_BOX}, not "
                f"{self.box}"
            )

    def layout(self, tensor: Tensor) -> Layout:
        """What the driver is told about ``tensor``, checked against what it accepts.

        A contiguous tensor of more axes is the matrix of its last axis.

        Raises:
            SparseKernelError: no map can be made of the tensor; says what to change.
        """
        if tensor.dim() > 2 and tensor.is_contiguous():
            tensor = tensor.flatten(0, -2)
        if tensor.dim() != 2:
            raise SparseKernelError(f"is {tensor.dim()}-D; a matrix is needed")
        if tensor.dtype not in ELEMENT_TYPES:
            raise SparseKernelError(f"has dtype {tensor.dtype}, which no map describes")
        (outer, inner), (stride, step) = tuple(tensor.shape), tensor.stride()
        if self.transposed:
            (outer, inner), (stride, step) = (inner, outer), (step, stride)
        size = tensor.element_size()
        self._check_box(size)
        if inner > 1 and step != 1:
            raise SparseKernelError(
                f"has strides {tensor.stride()}: axis {0 if self.transposed else 1} "
                f"must be contiguous; {self._remedy()}"
            )
        # The stride of a single row is never used, and torch lets it be anything.
        stride_bytes = stride * size if outer > 1 else -(-inner * size // 16) * 16
        layout = Layout(tensor.data_ptr(), inner, outer, stride_bytes)
        self._check_memory(layout, inner * size)
        return layout

    def _check_memory(self, layout: Layout, row_bytes: int) -> None:
        if layout.stride_bytes % 16 or layout.stride_bytes < row_bytes:
            raise SparseKernelError(
                f"has rows {layout.stride_bytes} bytes apart: a multiple of 16 not "
                f"below {row_bytes} is needed; pad it, or {self._remedy()}"
            )
        if layout.address % 16:
            raise SparseKernelError(
                f"starts {layout.address % 16} bytes past a 16-byte boundary; clone it"
            )
        too_long = max(layout.inner, layout.outer) > MAX_DIMENSION
        if too_long or layout.stride_bytes >= _MAX_STRIDE_BYTES:
            raise SparseKernelError(
                f"is too large for a kernel, with {layout.outer} rows of "
                f"{layout.inner} elements {layout.stride_bytes} bytes apart: at most "
                f"{MAX_DIMENSION} of either, less than {_MAX_STRIDE_BYTES} bytes "
                "apart; split it"
            )

    def _check_box(self, element_size: int) -> None:
        width = self.box[0] * element_size
        if width % 16 or (self.swizzle and width > self.swizzle):
            limit = f" and at most {self.swizzle}" if self.swizzle else ""
            raise SparseKernelError(
                f"has elements of {element_size} bytes: a box of {self.box[0]} is "
                f"{width} bytes wide, a multiple of 16{limit} is needed"
            )

    def _remedy(self) -> str:
        if self.transposed:
            return "make it column-major with .t().contiguous().t()"
        return "make it .contiguous()"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A matrix in memory: ``outer`` rows of ``inner`` elements."""

    address: int
    inner: int
    outer: int
    stride_bytes: int


class EncodedMap:
    """The bytes of one map, in memory aligned as the driver wants it."""

    __slots__ = ("_memory", "address")

    def __init__(self, spec: TensorMap, tensor: Tensor) -> None:
        layout = spec.layout(tensor)
        self._memory = ctypes.create_string_buffer(BYTES + ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address = start + -start % ALIGNMENT
        cuda_driver.encode_tiled(
            self.address,
            ELEMENT_TYPES[tensor.dtype],
            layout.address,
            (layout.inner, layout.outer),
            layout.stride_bytes,
            spec.box,
            (_NO_INTERLEAVE, SWIZZLES[spec.swizzle], _L2_128_BYTES, _OUTSIDE_IS_ZERO),
        )


class MapCache:
    """The maps of one argument of a kernel: those used last, at most ``limit``."""

    def __init__(self, spec: TensorMap, limit: int = MAX_KEPT) -> None:
        self.spec = spec
        self._limit = limit
        self._kept: OrderedDict[Any, EncodedMap] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, tensor: Tensor) -> EncodedMap:
        """The map of a tensor; the caller holds it until its kernel is launched.

        Raises:
            SparseKernelError: no map can be made of the tensor.
        """
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        found = self._kept.get(key)
        if found is None:
            return self._make(key, tensor)
        try:
            self._kept.move_to_end(key)
        except KeyError:  # another thread has just dropped it
            self._kept[key] = found
        return found

    def _make(self, key: Any, tensor: Tensor) -> EncodedMap:
        made = self._kept[key] = EncodedMap(self.spec, tensor)
        while len(self._kept) > self._limit:
            try:
                self._kept.popitem(last=False)
            except KeyError:  # other threads have emptied it
                break
        return made
