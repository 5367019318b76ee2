"""Kernels without a GPU: arguments in memory, what is done once, refusals."""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inductor_sparse.errors import SparseKernelError
from inductor_sparse.runtime import cubin_cache, cuda_driver, nvrtc, tensor_map
from inductor_sparse.runtime.cuda_kernel import ArgumentBuffer, CudaKernel, TensorMap

SIGNATURE = ("map", "pointer", "int32", "int64", "float32")
NUMBERS = (7, 2**40, 0.5)


class OnDevice:
    """A tensor, said to be on a GPU."""

    def __init__(self, tensor: torch.Tensor, device: int = 0) -> None:
        self.tensor = tensor
        self.device_index = device

    def get_device(self) -> int:
        return self.device_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


class Machine:
    """Two GPUs that remember what they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.loads: list[int] = []
        self.launches: list[tuple[Any, ...]] = []
        self.compilations: list[str] = []
        self.contexts: list[int] = []
        self.status = 0
        fakes: dict[str, Any] = {
            "current_device": lambda: self.current,
            "on_device": self.on_device,
            "make_context_current": self.contexts.append,
            "multiprocessors": lambda device: 133,
            "architecture": lambda device: "sm_90",
            "encode_tiled": lambda *args: None,
            "load": self.load,
            "launcher": lambda: self.launch,
            "stream_handle": lambda stream: stream,
            "message": lambda code: f"CUDA_ERROR_{code}",
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(cuda_driver, name, fake)
        monkeypatch.setattr(nvrtc, "build", lambda: "13.0")
        monkeypatch.setattr(nvrtc, "compile_source", self.compile)

    def compile(self, name: str, *rest: Any) -> nvrtc.Binary:
        self.compilations.append(name)
        time.sleep(0.02)  # time for another thread to come along
        return nvrtc.Binary(b"machine code", "")

    @contextlib.contextmanager
    def on_device(self, device: int) -> Any:
        outer, self.current = self.current, device
        yield
        self.current = outer

    def load(self, name: str, cubin: bytes, shared_bytes: int) -> int:
        assert cubin == b"machine code"
        self.loads.append(self.current)
        return 1000 + self.current

    def launch(self, function: int, *rest: Any) -> tuple[int]:
        assert function == 1000 + self.current
        self.launches.append(rest)
        return (self.status,)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Machine:
    monkeypatch.setenv(cubin_cache.VARIABLE, str(tmp_path))
    return Machine(monkeypatch)


def kernel(source: str = "text", **changes: Any) -> CudaKernel:
    given: dict[str, Any] = {
        "signature": SIGNATURE,
        "maps": (TensorMap((32, 8)),),
        "threads": 384,
        "cluster": 2,
        "shared_bytes": 1024,
    }
    return CudaKernel("multiply", source, **{**given, **changes})


def tensors(device: int = 0) -> tuple[OnDevice, OnDevice]:
    return OnDevice(torch.zeros(8, 32), device), OnDevice(torch.zeros(8), device)


@given(
    pointer=st.integers(0, 2**64 - 1),
    small=st.integers(-(2**31), 2**31 - 1),
    large=st.integers(-(2**63), 2**63 - 1),
    real=st.floats(width=32, allow_nan=False),
)
def test_arguments_in_memory(pointer: int, small: int, large: int, real: float) -> None:
    buffer = ArgumentBuffer(SIGNATURE)
    buffer.fill([0, pointer, small, large, real])
    types = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_int64, ctypes.c_float)
    addresses = (ctypes.c_void_p * len(SIGNATURE)).from_address(buffer.address)
    found = [
        kind.from_address(address).value
        for kind, address in zip(types, addresses[1:], strict=True)
    ]
    assert found == [pointer, small, large, real]


@pytest.mark.parametrize("values", [(0, 0, 2**31, 0, 0), (0, 0, 0.5, 0, 0)])
def test_numbers_that_do_not_fit(values: tuple[int, ...]) -> None:
    with pytest.raises(struct.error):
        ArgumentBuffer(SIGNATURE).fill(values)


def test_a_launch(machine: Machine) -> None:
    kernel().run(*tensors(), *NUMBERS, stream=55)
    ((*grid_and_block, shared, stream, address, extra),) = machine.launches
    assert grid_and_block == [132, 1, 1, 384, 1, 1]  # whole clusters of 2
    assert (shared, stream, extra) == (1024, 55, 0)
    assert address


def test_work_is_done_once(machine: Machine) -> None:
    run = kernel().run
    for device in (0, 1, 0, 1):
        run(*tensors(device), *NUMBERS, stream=0)
    assert machine.compilations == ["multiply"]
    assert machine.loads == machine.contexts == [0, 1]
    assert len(machine.launches) == 4
    assert machine.current == 0


def test_compiled_code_is_kept_in_memory(machine: Machine, tmp_path: Path) -> None:
    once = kernel()
    once.compile()
    for entry in tmp_path.iterdir():
        entry.unlink()
    once.compile()
    assert machine.compilations == ["multiply"]


def test_another_process_finds_it_on_disk(machine: Machine) -> None:
    assert kernel().compile() == kernel().compile() == b"machine code"
    kernel("another text").compile()
    kernel(arch="sm_100a").compile()
    assert len(machine.compilations) == 3


@pytest.mark.parametrize("damage", [b"", b"inductor_sparse cubin 1\n", b"\0" * 99])
def test_a_damaged_entry_is_compiled_again(
    damage: bytes, machine: Machine, tmp_path: Path
) -> None:
    kernel().compile()
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    assert kernel().compile() == b"machine code"
    assert len(machine.compilations) == 2
    assert entry.read_bytes() == whole


def test_a_folder_that_takes_no_entries_only_costs_time(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(cubin_cache.VARIABLE, str(tmp_path / "file"))
    for _ in range(2):
        kernel().run(*tensors(), *NUMBERS, stream=0)
    assert len(machine.compilations) == len(machine.launches) == 2


def test_threads_compile_and_load_once(machine: Machine) -> None:
    shared = kernel()
    threads = [
        threading.Thread(
            target=shared.run, args=(*tensors(), *NUMBERS), kwargs={"stream": i}
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert machine.compilations == ["multiply"]
    assert machine.loads == [0]
    streams = [rest[-3] for rest in machine.launches]
    assert sorted(streams) == list(range(8))


def test_a_map_that_its_cache_has_dropped_lives_until_the_launch(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[int] = []

    class Watched(tensor_map.EncodedMap):
        def __del__(self) -> None:
            freed.append(self.address)

    def launch(*args: Any) -> tuple[int]:
        assert not freed
        return Machine.launch(machine, *args)

    monkeypatch.setattr(tensor_map, "EncodedMap", Watched)
    machine.launch = launch  # type: ignore[method-assign]
    keeps_none = kernel(signature=("map", "map"), maps=(TensorMap((32, 8)),) * 2)
    for cache in keeps_none.map_caches:
        cache._limit = 0
    keeps_none.run(tensors()[0], tensors()[0], stream=0)
    assert len(machine.launches) == 1
    assert len(freed) == 2


def test_an_empty_map_launches_nothing(machine: Machine) -> None:
    _, out = tensors()
    kernel().run(OnDevice(torch.zeros(0, 32)), out, *NUMBERS, stream=0)
    assert machine.launches == []


def test_a_missing_pointer_is_null(machine: Machine) -> None:
    pointers = kernel(signature=("pointer", "pointer"), maps=())
    seen = []

    def launch(*args: Any) -> tuple[int]:
        first, _ = (ctypes.c_void_p * 2).from_address(args[-2])
        seen.append(ctypes.c_uint64.from_address(first).value)
        return (0,)

    machine.launch = launch  # type: ignore[method-assign]
    pointers.run(None, tensors()[0], stream=0)
    assert seen == [0]


def test_a_pickled_kernel_is_the_same(machine: Machine) -> None:
    copy = pickle.loads(pickle.dumps(kernel()))
    copy.run(*tensors(), *NUMBERS, stream=0)
    assert copy.__getstate__() == kernel().__getstate__()
    assert len(machine.launches) == 1


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ((), "takes 5 arguments"),
        ((torch.zeros(8, 32), None, *NUMBERS), "argument 0 is on cpu"),
        ((tensors()[0], torch.zeros(4), *NUMBERS), "argument 1 is on cpu"),
        ((*tensors(), 2**31, 0, 0.0), "format requires"),
        ((OnDevice(torch.zeros(8, 33)), None, *NUMBERS), "argument 0 has rows 132"),
    ],
)
def test_refused_arguments(
    machine: Machine, args: tuple[Any, ...], problem: str
) -> None:
    with pytest.raises(SparseKernelError) as caught:
        kernel().run(*args, stream=0)
    assert problem in str(caught.value)
    assert str(caught.value).startswith("kernel multiply: ")


def test_a_map_of_another_device_is_refused(machine: Machine) -> None:
    mixed = kernel(signature=("pointer", "map"))
    with pytest.raises(SparseKernelError, match="multiply: argument 1 is on "):
        mixed.run(tensors(0)[1], tensors(1)[0], stream=0)
    assert machine.launches == []


def test_a_failed_launch_names_kernel_shapes_and_remedy(machine: Machine) -> None:
    machine.status = 719
    pointers = kernel(signature=("pointer", "int32"), maps=())
    odd = torch.zeros(8, 32).bfloat16().t()
    odd.get_device = lambda: 0  # type: ignore[method-assign]
    with pytest.raises(SparseKernelError) as caught:
        pointers.run(odd, 3, stream=0)
    assert str(caught.value).splitlines() == [
        "kernel multiply: launch failed: CUDA_ERROR_719",
        "arguments: 0: bfloat16[32, 8] strides (1, 32), 1: 3",
        'options={"sparse.activation_format": "exact"} does without this kernel',
    ]


def test_another_architecture_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "architecture", lambda device: "sm_80")
    with pytest.raises(SparseKernelError) as caught:
        kernel().run(*tensors(), *NUMBERS, stream=0)
    problem, arguments, remedy = str(caught.value).splitlines()
    assert problem.startswith(
        "kernel multiply: was compiled for sm_90a, but device 0 is sm_80; "
    )
    assert arguments.startswith("arguments: 0: ")
    assert "does without this kernel" in remedy
    assert machine.compilations == []


def test_a_failed_compilation_names_kernel_shapes_and_remedy(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> nvrtc.Binary:
        raise SparseKernelError("NVRTC does not compile it")

    monkeypatch.setattr(nvrtc, "compile_source", fail)
    x = torch.zeros(8, 32)
    x.get_device = lambda: 0  # type: ignore[method-assign]
    pointers = kernel(signature=("pointer", "int32"), maps=())
    with pytest.raises(SparseKernelError) as caught:
        pointers.run(x, 3, stream=0)
    assert str(caught.value).splitlines() == [
        "kernel multiply: NVRTC does not compile it",
        "arguments: 0: float32[8, 32], 1: 3",
        'options={"sparse.activation_format": "exact"} does without this kernel',
    ]
    assert machine.launches == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"signature": ("tensor",)}, r"unknown kinds of arguments \['tensor'\]"),
        ({"maps": ()}, "1 arguments are maps, 0 are described"),
        ({"signature": ("int32",), "maps": ()}, "no argument is a tensor"),
        ({"grid": "wide"}, "a number or 'persistent', not 'wide'"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SparseKernelError, match=f"kernel multiply: .*{problem}"):
        kernel(**changes)
