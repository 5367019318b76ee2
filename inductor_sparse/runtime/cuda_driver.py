"""The few calls of the CUDA driver that launching a kernel takes.

They go through ``cuda.bindings``, except that a tensor map has to lie at an aligned
address, which an object of the bindings does not: of that function only the entry point
comes from there.

Every function raises :class:`SparseKernelError` with the driver's own words.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from inductor_sparse.errors import SparseKernelError

_ENTRY_POINT_VERSION = 12000

_EncodeTiled = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,  # the map
    ctypes.c_int,  # element type
    ctypes.c_uint32,  # number of axes
    ctypes.c_void_p,  # address of the tensor
    ctypes.POINTER(ctypes.c_uint64),  # sizes
    ctypes.POINTER(ctypes.c_uint64),  # strides in bytes, without the first
    ctypes.POINTER(ctypes.c_uint32),  # box
    ctypes.POINTER(ctypes.c_uint32),  # strides in elements
    *[ctypes.c_int] * 4,  # interleave, swizzle, L2 promotion, fill
)


@functools.cache
def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise SparseKernelError(
            f"the Python package cuda-bindings is missing ({error}); install it with: "
            "pip install 'inductor-sparse[cuda]'"
        ) from None


def message(code: int) -> str:
    """The name and the description of a result of the driver."""
    driver = _bindings()
    result = driver.CUresult(code)
    _, name = driver.cuGetErrorName(result)
    _, text = driver.cuGetErrorString(result)
    return " ".join((part or b"?").decode() for part in (name, text))


def _checked(what: str, result: tuple[Any, ...]) -> Any:
    """The values behind the status of a call of the bindings."""
    if int(result[0]) != 0:
        raise SparseKernelError(f"{what}: {message(int(result[0]))}")
    return result[1] if len(result) == 2 else result[1:]


@functools.cache
def _encoder() -> Callable[..., int]:
    address, _ = _checked(
        "looking up cuTensorMapEncodeTiled",
        _bindings().cuGetProcAddress(
            b"cuTensorMapEncodeTiled", _ENTRY_POINT_VERSION, 0
        ),
    )
    return _EncodeTiled(int(address))


@functools.cache
def version() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows, such as ``(13, 0)``; None without one."""
    try:
        number = int(_checked("asking", _bindings().cuDriverGetVersion()))
    except Exception:  # whatever a loader of libraries may raise
        return None
    return number // 1000, number % 1000 // 10


def launcher() -> Callable[..., tuple[Any]]:
    """``cuLaunchKernel``; it returns its status in a tuple."""
    return _bindings().cuLaunchKernel


def stream_handle(stream: int) -> Any:
    """A stream as :func:`launcher` takes it most quickly."""
    return _bindings().CUstream(stream)


def encode_tiled(
    map_address: int,
    element_type: int,
    tensor_address: int,
    sizes: tuple[int, int],
    stride_bytes: int,
    box: tuple[int, int],
    modes: tuple[int, int, int, int],
) -> None:
    """Write the map of a matrix to an aligned address.

    Args:
        map_address: where to.
        element_type: a ``CUtensorMapDataType``.
        tensor_address: of the first element.
        sizes: along the contiguous axis, then along the other.
        stride_bytes: from row to row.
        box: what one copy moves, in the order of ``sizes``.
        modes: interleave, swizzle, L2 promotion and fill, by their numbers.
    """
    code = _encoder()(
        map_address,
        element_type,
        2,
        tensor_address,
        (ctypes.c_uint64 * 2)(*sizes),
        (ctypes.c_uint64 * 1)(stride_bytes),
        (ctypes.c_uint32 * 2)(*box),
        (ctypes.c_uint32 * 2)(1, 1),
        *modes,
    )
    if code:
        raise SparseKernelError(f"the driver rejected the tensor map: {message(code)}")


def current_device() -> int:
    """The device that CUDA calls of this thread go to."""
    return torch._C._cuda_getDevice()


def on_device(device: int) -> AbstractContextManager[Any]:
    """Send the CUDA calls of this thread to another device, for a ``with`` block."""
    return torch.cuda.device(device)


def multiprocessors(device: int | torch.device) -> int:
    """How many multiprocessors (compute units) a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def architecture(device: int) -> str:
    """What a device runs, such as ``"sm_90"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def make_context_current(device: int) -> None:
    """Give this thread a context: one in which torch has not run yet has none."""
    driver = _bindings()
    if int(_checked("reading the context", driver.cuCtxGetCurrent())) == 0:
        handle = _checked("finding the device", driver.cuDeviceGet(device))
        context = _checked(
            "opening the device", driver.cuDevicePrimaryCtxRetain(handle)
        )
        _checked("setting the context", driver.cuCtxSetCurrent(context))


def load(name: str, cubin: bytes, shared_bytes: int) -> Any:
    """Load a cubin into the current context and return its kernel for a launch.

    It stays loaded for the life of the process.  Loading is allowed while a CUDA graph
    is being captured, because it enqueues nothing.

    Args:
        name: of the kernel, as ``extern "C"`` has it.
        cubin: machine code.
        shared_bytes: dynamic shared memory that it will be launched with.
    """
    driver = _bindings()
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    mode = _checked("capture mode", driver.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        module = _checked("loading", driver.cuModuleLoadData(cubin))
        function = _checked(
            "finding it in its module",
            driver.cuModuleGetFunction(module, name.encode()),
        )
        attribute = driver.CUfunction_attribute
        _checked(
            f"asking for {shared_bytes} bytes of shared memory",
            driver.cuFuncSetAttribute(
                function,
                attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared_bytes,
            ),
        )
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)
    return function
