"""CUDA C++ to machine code with NVRTC, the compiler that torch itself depends on.

No GPU, driver, nvcc or header file is needed.  ``cuda.bindings`` finds the library of
the installed wheels; both come with a CUDA build of torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from typing import Any, NamedTuple

from inductor_sparse.errors import SparseKernelError
from inductor_sparse.runtime import cuda_driver

ARCH = "sm_90a"
"""The architecture that kernels are compiled for unless they say otherwise; ``a``
because ``wgmma`` exists on this one architecture only."""

BASE_OPTIONS = ("-std=c++17", "-default-device")

_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")

_MIN_VERSION = (12, 2)
"""The first that knows ``wgmma.mma_async.sp``."""

_INSTALL = "install them with: pip install 'inductor-sparse[cuda]'"


class Binary(NamedTuple):
    """What the compiler made: a cubin, and what it and ptxas had to say."""

    cubin: bytes
    log: str


@functools.cache
def _bindings() -> Any:
    """The module ``cuda.bindings.nvrtc``, with its library loaded."""
    module = importlib.import_module("cuda.bindings.nvrtc")
    module.nvrtcVersion()
    return module


@functools.cache
def unavailable_reason() -> str | None:
    """Why nothing can be compiled here, with the remedy; ``None`` if all is well."""
    try:
        nvrtc = _bindings()
    except ImportError as error:
        return f"the Python package cuda-bindings is missing ({error}); {_INSTALL}"
    except Exception as error:  # whatever a loader of libraries may raise
        return f"NVRTC cannot be loaded ({_first_line(error)}); {_INSTALL}"
    result, major, minor = nvrtc.nvrtcVersion()
    if int(result) != 0 or (major, minor) < _MIN_VERSION:
        wanted = ".".join(map(str, _MIN_VERSION))
        return f"NVRTC is {major}.{minor}, {wanted} is needed; {_INSTALL}"
    return _driver_refusal(major, minor)


def _driver_refusal(major: int, minor: int) -> str | None:
    """Why the driver, if there is one, loads nothing that this NVRTC makes, or None."""
    driver = cuda_driver.version()
    if driver is None or driver[0] >= major:
        return None
    return (
        f"NVRTC is {major}.{minor}, but the driver supports only CUDA "
        f"{driver[0]}.{driver[1]} and cannot load its code; update the driver, or "
        f"install the cuda-bindings and NVRTC of CUDA {driver[0]}"
    )


def available() -> bool:
    """Whether CUDA C++ can be compiled here."""
    return unavailable_reason() is None


def version() -> str:
    """The version of the compiler, such as ``"13.0"``.

    Raises:
        SparseKernelError: there is no compiler.
    """
    _, major, minor = _require().nvrtcVersion()
    return f"{major}.{minor}"


@functools.cache
def build() -> str:
    """The version with that of the installed package, which names the patch release.

    Raises:
        SparseKernelError: there is no compiler.
    """
    found = [version()]
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def options(arch: str, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """All options for compiling a kernel for ``arch``."""
    return (f"--gpu-architecture={arch}", *BASE_OPTIONS, *extra)


def compile_source(
    name: str, source: str, arch: str = ARCH, extra: tuple[str, ...] = ()
) -> Binary:
    """Compile CUDA C++ that includes nothing.

    Args:
        name: of the kernel, for messages.
        source: the text.
        arch: such as ``"sm_90a"``.
        extra: more options, such as ``"--ptxas-options=-v"``.

    Raises:
        SparseKernelError: there is no compiler, or it rejects the source.
    """
    nvrtc = _require()
    result, program = nvrtc.nvrtcCreateProgram(
        source.encode(), f"{name}.cu".encode(), 0, [], []
    )
    _check(nvrtc, name, result)
    try:
        words = [word.encode() for word in options(arch, extra)]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
        log = _log(nvrtc, program)
        if int(result) != 0:
            raise SparseKernelError(
                f"NVRTC {version()} does not compile {name} for {arch} "
                f"({result.name}):\n{log}"
            )
        result, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(nvrtc, name, result)
        cubin = bytearray(size)
        (result,) = nvrtc.nvrtcGetCUBIN(program, cubin)
        _check(nvrtc, name, result)
        return Binary(bytes(cubin), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _require() -> Any:
    reason = unavailable_reason()
    if reason is not None:
        raise SparseKernelError(f"CUDA kernels cannot be compiled: {reason}")
    return _bindings()


def _log(nvrtc: Any, program: Any) -> str:
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.rstrip(b"\0").decode(errors="replace").strip()


def _check(nvrtc: Any, name: str, result: Any) -> None:
    if int(result) != 0:
        raise SparseKernelError(
            f"NVRTC failed to compile {name} ({result.name}); if memory is short, free "
            "some and call again"
        )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
