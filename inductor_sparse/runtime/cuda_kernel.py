"""A CUDA C++ kernel in generated code: compiled when first run, launched cheaply.

The text is compiled by NVRTC for one architecture (:mod:`.nvrtc`), or read from the
cache on disk (:mod:`.cubin_cache`); it is loaded once for each device.  Nothing here
synchronises or allocates device memory, so a launch can be captured into a CUDA graph.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from inductor_sparse.errors import SparseKernelError
from inductor_sparse.runtime import cubin_cache, cuda_driver, nvrtc
from inductor_sparse.runtime.nvrtc import available, unavailable_reason
from inductor_sparse.runtime.tensor_map import MapCache, TensorMap

__all__ = ["CudaKernel", "TensorMap", "available", "unavailable_reason"]

PERSISTENT = "persistent"
"""A grid of one block for each multiprocessor, in whole clusters."""

# Every argument gets a slot of 8 bytes; that of a map holds an address nobody reads.
_SLOTS = {
    "map": "Q",
    "pointer": "Q",
    "int32": "i4x",
    "int64": "q",
    "float32": "f4x",
}


class ArgumentBuffer:
    """The arguments of one launch at a time, laid out as ``cuLaunchKernel`` wants them.

    ``parameters`` is an array of addresses: of the slot of each number or pointer, and
    for a map of the map itself.
    """

    def __init__(self, signature: Sequence[str]) -> None:
        self._slots = ctypes.create_string_buffer(8 * max(1, len(signature)))
        first = ctypes.addressof(self._slots)
        addresses = [first + 8 * i for i in range(len(signature))]
        self.parameters = (ctypes.c_void_p * max(1, len(signature)))(*addresses)
        self.address = ctypes.addressof(self.parameters)
        self._pack = struct.Struct(
            "<" + "".join(_SLOTS[kind] for kind in signature)
        ).pack_into

    def fill(self, values: Sequence[int | float]) -> None:
        """Store one number for each argument.

        Raises:
            struct.error: a number does not fit its type.
        """
        self._pack(self._slots, 0, *values)


class _Launcher:
    """A kernel on one device, with the buffer of one thread."""

    def __init__(self, kernel: CudaKernel, device: int, function: Any) -> None:
        self.kernel = kernel
        self.device = device
        self._buffer = ArgumentBuffer(kernel.signature)
        block = (kernel.threads, 1, 1)
        grid = (kernel.blocks(device), 1, 1)
        self._shape = (function, *grid, *block, kernel.shared_bytes)
        self._launch = cuda_driver.launcher()
        self._streams: dict[int, Any] = {}
        self._pointers = kernel.positions("pointer")
        self._maps = tuple(zip(kernel.positions("map"), kernel.map_caches, strict=True))

    def __call__(self, args: tuple[Any, ...], stream: int) -> None:
        values = list(args)
        kernel, device, buffer = self.kernel, self.device, self._buffer
        for i in self._pointers:
            tensor = values[i]
            if tensor is None:
                values[i] = 0
            elif tensor.get_device() != device:
                raise kernel.error(args, f"argument {i} is on {tensor.device}")
            else:
                values[i] = tensor.data_ptr()
        held = []
        for i, cache in self._maps:
            tensor = values[i]
            if tensor.numel() == 0:
                return
            if tensor.get_device() != device:
                raise kernel.error(args, f"argument {i} is on {tensor.device}")
            try:
                encoded = cache.get(tensor)
            except SparseKernelError as error:
                raise kernel.error(args, f"argument {i} {error}") from None
            held.append(encoded)  # the cache may drop it before the launch
            values[i] = buffer.parameters[i] = encoded.address
        try:
            buffer.fill(values)
        except struct.error as error:
            raise kernel.error(args, f"{error} ({kernel.signature})") from None
        handle = self._streams.get(stream)
        if handle is None:
            handle = self._streams[stream] = cuda_driver.stream_handle(stream)
        (status,) = self._launch(*self._shape, handle, buffer.address, 0)
        if int(status) != 0:
            problem = f"launch failed: {cuda_driver.message(int(status))}"
            raise kernel.error(args, problem)


class _PerThread(threading.local):
    """The launchers of this thread, by device."""

    def __init__(self) -> None:
        self.launchers: dict[int, _Launcher] = {}


class CudaKernel:
    """A kernel, its text, and everything needed to launch it.

    ``signature`` names the kind of each argument: ``"map"`` (a tensor, given to the
    kernel as a tensor map by value, made as the next of ``maps`` says), ``"pointer"``
    (a tensor or None), ``"int32"``, ``"int64"`` or ``"float32"``.

    Args:
        name: of the ``extern "C"`` kernel in ``source``.
        source: CUDA C++ that includes nothing.
        signature: see above.
        maps: one for each ``"map"``.
        threads: of a block.
        cluster: blocks of a cluster, as ``__cluster_dims__`` of the source has it.
        shared_bytes: dynamic shared memory of a block.
        grid: number of blocks, or ``"persistent"``.
        arch: what it is compiled for.
        options: more options of the compiler.

    Raises:
        SparseKernelError: the parts do not fit together.
    """

    def __init__(
        self,
        name: str,
        source: str,
        *,
        signature: tuple[str, ...],
        maps: tuple[TensorMap, ...] = (),
        threads: int,
        cluster: int = 1,
        shared_bytes: int = 0,
        grid: int | str = PERSISTENT,
        arch: str = nvrtc.ARCH,
        options: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.source = source
        self.signature = signature
        self.maps = maps
        self.threads = threads
        self.cluster = cluster
        self.shared_bytes = shared_bytes
        self.grid = grid
        self.arch = arch
        self.options = options
        self._check()
        self._reset()

    def _check(self) -> None:
        unknown = [kind for kind in self.signature if kind not in _SLOTS]
        wanted = self.signature.count("map")
        if unknown:
            problem = f"unknown kinds of arguments {unknown}; known: {list(_SLOTS)}"
        elif wanted != len(self.maps):
            problem = f"{wanted} arguments are maps, {len(self.maps)} are described"
        elif not {"map", "pointer"} & set(self.signature):
            problem = "no argument is a tensor"
        elif self.grid != PERSISTENT and not isinstance(self.grid, int):
            problem = f"the grid is a number or {PERSISTENT!r}, not {self.grid!r}"
        else:
            return
        raise SparseKernelError(f"kernel {self.name}: {problem}")

    def _reset(self) -> None:
        tensors = (*self.positions("pointer"), *self.positions("map"))
        self._tensor_positions = sorted(tensors)
        self.map_caches = tuple(MapCache(spec) for spec in self.maps)
        self._functions: dict[int, Any] = {}
        self._cubin: bytes | None = None
        self._lock = threading.Lock()
        self._here = _PerThread()

    def __getstate__(self) -> dict[str, Any]:
        names = ("name", "source", "signature", "maps", "threads", "cluster")
        names += ("shared_bytes", "grid", "arch", "options")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def positions(self, kind: str) -> tuple[int, ...]:
        """Where in the signature a kind of argument stands."""
        return tuple(i for i, k in enumerate(self.signature) if k == kind)

    def run(self, *args: Any, stream: int) -> None:
        """Launch the kernel; nothing happens if a tensor given as a map is empty.

        Args:
            args: one for each of the signature.
            stream: the CUDA stream, as a number.

        Raises:
            SparseKernelError: it cannot be compiled, loaded or launched, or no map can
                be made of an argument; names the kernel, the shapes, and the remedy.
        """
        if len(args) != len(self.signature):
            raise self.error(args, f"takes {len(self.signature)} arguments")
        device = self._device(args)
        launch = self._here.launchers.get(device)
        if launch is not None and cuda_driver.current_device() == device:
            launch(args, stream)
            return
        with cuda_driver.on_device(device):
            if launch is None:
                launch = self._prepare(args, device)
            launch(args, stream)

    def _device(self, args: tuple[Any, ...]) -> int:
        for i in self._tensor_positions:
            tensor = args[i]
            if tensor is not None:
                device = tensor.get_device()
                if device < 0:
                    raise self.error(args, f"argument {i} is on {tensor.device}")
                return device
        raise self.error(args, "no argument is a tensor")

    def compile(self) -> bytes:
        """The machine code: what is compiled already, in the cache, or compiled now.

        Raises:
            SparseKernelError: there is no compiler, or it rejects the source.
        """
        with self._lock:
            if self._cubin is None:
                self._cubin = self._from_cache_or_compiler()
            return self._cubin

    def _from_cache_or_compiler(self) -> bytes:
        options = nvrtc.options(self.arch, self.options)
        key = cubin_cache.key(self.source, options, nvrtc.build())
        cubin = cubin_cache.load(key)
        if cubin is None:
            binary = nvrtc.compile_source(
                self.name, self.source, self.arch, self.options
            )
            cubin = binary.cubin
            cubin_cache.store(key, cubin)
        return cubin

    def blocks(self, device: int) -> int:
        """Blocks of the grid on a device."""
        if isinstance(self.grid, int):
            return self.grid
        return cuda_driver.multiprocessors(device) // self.cluster * self.cluster

    def _prepare(self, args: tuple[Any, ...], device: int) -> _Launcher:
        """Make this thread ready to launch on the device, which is the current one."""
        try:
            cuda_driver.make_context_current(device)
            function = self._function(device)
            launcher = _Launcher(self, device, function)
        except SparseKernelError as error:
            raise self.error(args, str(error)) from error
        self._here.launchers[device] = launcher
        return launcher

    def _function(self, device: int) -> Any:
        function = self._functions.get(device)
        if function is not None:
            return function
        self._check_architecture(device)
        cubin = self.compile()
        with self._lock:
            if device not in self._functions:
                self._functions[device] = cuda_driver.load(
                    self.name, cubin, self.shared_bytes
                )
            return self._functions[device]

    def _check_architecture(self, device: int) -> None:
        found = cuda_driver.architecture(device)
        if self.arch.removesuffix("a") != found:
            raise SparseKernelError(
                f"was compiled for {self.arch}, but device {device} is {found}; "
                "compile the model on the device it is to run on"
            )

    def error(self, args: Sequence[Any], problem: str) -> SparseKernelError:
        """An error that names the kernel, what went wrong, and the arguments."""
        shown = itertools.starmap(_shown, enumerate(args))
        return SparseKernelError(
            f"kernel {self.name}: {problem}\n"
            f"arguments: {', '.join(shown) or 'none'}\n"
            'options={"sparse.activation_format": "exact"} does without this kernel'
        )


def _shown(position: int, value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        text = f"{kind}{list(value.shape)}"
        if not value.is_contiguous():
            text += f" strides {value.stride()}"
        return f"{position}: {text}"
    return f"{position}: {value}"
