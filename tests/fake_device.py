"""A GPU that torch and Triton can ask about, and cannot use.

While :func:`fake_cuda` is active torch believes in one GPU; afterwards everything,
memoised answers included, is as it was.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo import device_interface
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import joint_graph
from torch._inductor.runtime import triton_helpers

Capability = tuple[int, int]

# Name, multiprocessors, threads per multiprocessor, shared bytes a block may ask for,
# shared bytes of a multiprocessor, bytes of L2 cache.
_DEVICES: dict[Capability, tuple[str, int, int, int, int, int]] = {
    (8, 0): ("NVIDIA A100-SXM4-80GB", 108, 2048, 166912, 167936, 40 << 20),
    (8, 6): ("NVIDIA A10", 72, 1536, 101376, 102400, 6 << 20),
    (8, 9): ("NVIDIA L40S", 142, 1536, 101376, 102400, 96 << 20),
    (9, 0): ("NVIDIA H100 80GB HBM3", 132, 2048, 232448, 233472, 50 << 20),
    (10, 0): ("NVIDIA B200", 148, 2048, 232448, 233472, 126 << 20),
    (12, 0): ("NVIDIA GeForce RTX 5090", 170, 1536, 101376, 102400, 96 << 20),
}


def properties(capability: Capability) -> types.SimpleNamespace:
    """What ``torch.cuda.get_device_properties`` says of a GPU of that capability."""
    name, count, threads, shared_block, shared, l2 = _DEVICES[capability]
    return types.SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=count,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared_block,
        shared_memory_per_multiprocessor=shared,
        regs_per_multiprocessor=65536,
        warp_size=32,
        L2_cache_size=l2,
        total_memory=80 << 30,
        gcnArchName="",
        uuid="GPU-none",
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
    )


class _TritonDriver:
    """What Triton asks its driver while compiling."""

    def __init__(self, capability: Capability) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> Capability:
        return self.capability

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda:0")


def _forget_the_device() -> None:
    """Clear torch's memoised answers about the GPU; others stay."""
    from torch._inductor import utils
    from torch._inductor.kernel import mm
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    for module in (utils, _triton):
        for name, member in vars(module).items():
            about_device = re.search(
                "triton|gpu|sms|b200|tflops|dram|stages|device|tma|fp8", name
            )
            if about_device and hasattr(member, "cache_clear"):
                member.cache_clear()
    for member in (DeviceProperties.create, getattr(mm, "_is_sm7x_or_older_gpu", None)):
        if hasattr(member, "cache_clear"):
            member.cache_clear()


def _torch_patches(capability: Capability) -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, value) of everything that asks torch for a GPU."""
    device = properties(capability)
    answers: dict[str, Any] = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_properties": device,
        "get_device_capability": capability,
        "get_device_name": device.name,
        "is_initialized": False,
        "is_tf32_supported": True,
        "synchronize": None,
        "_lazy_init": None,
    }
    for name, value in answers.items():
        yield torch.cuda, name, _answer(value)
    interface = device_interface.CudaInterface
    for name in (
        "is_available",
        "current_device",
        "device_count",
        "get_device_properties",
    ):
        yield interface, name, staticmethod(_answer(answers[name]))
    for name in ("current_device", "get_device_properties"):
        yield interface.Worker, name, staticmethod(_answer(answers[name]))
    number = 10 * capability[0] + capability[1]
    yield interface, "get_compute_capability", staticmethod(_answer(number))
    yield torch.version, "cuda", "13.0"
    yield torch.utils._triton, "triton_hash_with_backend", _answer("none")
    fake_tensor = torch._subclasses.fake_tensor
    if hasattr(fake_tensor, "init_gpu_context"):
        yield fake_tensor, "init_gpu_context", _answer(None)
    yield joint_graph, "lazy_init", _answer(None)
    yield triton_helpers, "set_driver_to_gpu", _answer(None)
    from triton.runtime import driver

    yield driver, "_active", _TritonDriver(capability)


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


_QUIET = {
    "compile_threads": 1,
    "force_disable_caches": True,
    # Patterns are traced, and uniform constants computed, on the GPU.
    "pattern_matcher": False,
    "joint_graph_constant_folding": False,
    "triton.unique_kernel_names": True,
    "use_static_triton_launcher": False,
}


@contextlib.contextmanager
def fake_cuda(capability: Capability = (9, 0)) -> Iterator[None]:
    """Let torch believe in one GPU; it can be asked about but not used."""
    if not device_interface._device_initialized:
        device_interface.init_device_reg()
    cuda = device_interface.CudaInterface
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_the_device)
        for owner, name, value in _torch_patches(capability):
            stack.enter_context(patch.object(owner, name, value))
        registered = {"cuda": cuda, "cuda:0": cuda}
        stack.enter_context(patch.dict(device_interface.device_interfaces, registered))
        stack.enter_context(inductor_config.patch(_QUIET))
        _forget_the_device()
        yield
