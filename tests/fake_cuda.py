"""CUDA code without a GPU: what Inductor would generate, and what becomes of it.

:func:`generate` takes a function through our passes (if asked), Inductor's lowerings,
its scheduler and its code generation as if a GPU of the given compute capability were
there, and returns the wrapper's text.  :func:`compile_triton` and :func:`compile_cuda`
turn kernels of that text into machine code, which nothing here can run.

While :func:`fake_cuda` is active torch believes in one GPU; afterwards everything,
memoised answers included, is as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import re
import subprocess
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import view_to_reshape
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves

from inductor_sparse import _compat, lowerings
from inductor_sparse.decisions import Decision, GraphDecisions

Capability = tuple[int, int]

# Name, multiprocessors, threads per multiprocessor, shared bytes a block may ask for,
# shared bytes of a multiprocessor, bytes of L2 cache.
_DEVICES: dict[Capability, tuple[str, int, int, int, int, int]] = {
    (8, 0): ("NVIDIA A100-SXM4-80GB", 108, 2048, 166912, 167936, 40 << 20),
    (8, 9): ("NVIDIA L40S", 142, 1536, 101376, 102400, 96 << 20),
    (9, 0): ("NVIDIA H100 80GB HBM3", 132, 2048, 232448, 233472, 50 << 20),
    (10, 0): ("NVIDIA B200", 148, 2048, 232448, 233472, 126 << 20),
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


@dataclasses.dataclass(frozen=True)
class Generated:
    """What became of one function.

    ``code`` is the Python wrapper's text, kernels included; ``decisions`` are those of
    our passes (empty if they did not run); ``graph`` is Inductor's graph after
    scheduling; ``fx_graph`` the graph that was lowered.
    """

    code: str
    decisions: tuple[Decision, ...]
    graph: GraphLowering
    fx_graph: torch.fx.GraphModule

    @property
    def triton_kernels(self) -> tuple[str, ...]:
        """The names of the Triton kernels the wrapper defines, in order."""
        return tuple(_triton_sources(self.code))

    @property
    def cuda_kernels(self) -> tuple[str, ...]:
        """The names of the CUDA C++ kernels the wrapper defines, in order."""
        return tuple(cuda_sources(self.code))

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of every generated kernel."""
        return self.triton_kernels + self.cuda_kernels


def generate(
    fn: Callable[..., Any] | nn.Module,
    *inputs: Tensor,
    capability: Capability = (9, 0),
    dynamic: int | Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
    static: Sequence[int] | None = None,
    inductor: Mapping[str, Any] | None = None,
) -> Generated:
    """Everything Inductor does for ``fn(*inputs)`` on CUDA, up to the wrapper's text.

    Args:
        fn: a function or a module; a module's parameters and buffers come first among
            the graph's inputs.
        inputs: tensors on any device, e.g. ``torch.empty(64, 64, device="meta")``: only
            their sizes, strides and dtypes count.
        capability: compute capability of the GPU, one of sm_80, 89, 90 and 100.
        dynamic: sizes that are symbolic; every dimension of an input (not of a
            parameter) that has one of these sizes is the same symbol.
        options: ``sparse.*`` options without prefix; with None our passes do not run.
        static: positions of the inputs that are weights: by default a module's
            parameters, or for a function every input but the first.
        inductor: options of Inductor's own, e.g. ``{"cpp_wrapper": True}``.
    """
    sizes = (dynamic,) if isinstance(dynamic, int) else tuple(dynamic)
    lowerings.register_all()
    chosen = {**_compat.epilogue_fusion_options(), **(inductor or {})}
    with fake_cuda(capability), inductor_config.patch(chosen):
        shape_env = ShapeEnv()
        mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
        symbols = {size: _symbol(shape_env, size) for size in sizes}
        function, weights = _functional(fn)
        with mode:
            fakes = [_fake(tensor, {}) for tensor in weights]
            fakes += [_fake(tensor, symbols) for tensor in inputs]
        if static is None:
            static = range(len(weights)) if weights else range(1, len(inputs))
        with torch.no_grad(), tracing(TracingContext(mode)), V.set_fake_mode(mode):
            with mode:
                gm = _trace_for_cuda(function, fakes, symbolic=bool(sizes))
            made = _run_passes(gm, options, static) if options is not None else ()
            return _lower(gm, fakes, shape_env, made)


def _symbol(shape_env: ShapeEnv, size: int) -> torch.SymInt:
    source = ConstantSource(f"__size_{size}")
    symbol = shape_env.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=size, source=source)


def _fake(tensor: Tensor, symbols: Mapping[int, torch.SymInt]) -> Tensor:
    """A fake CUDA tensor like ``tensor`` with symbols for the sizes that have one."""
    size = [symbols.get(n, n) for n in tensor.shape]
    stride = [_symbolic_stride(tensor, at, size) for at in range(tensor.dim())]
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device="cuda:0")


def _symbolic_stride(tensor: Tensor, at: int, size: Sequence[Any]) -> Any:
    """The stride of a dimension as the product of the sizes inside it."""
    inside = [
        d
        for d in range(tensor.dim())
        if (tensor.stride(d), -d) < (tensor.stride(at), -at)
    ]
    dense = 1
    for d in inside:
        dense *= tensor.shape[d]
    if dense != tensor.stride(at):
        return tensor.stride(at)
    return functools.reduce(lambda product, d: product * size[d], inside, 1)


def _functional(
    fn: Callable[..., Any] | nn.Module,
) -> tuple[Callable[..., Any], list[Tensor]]:
    """``fn`` as a function of its weights and its inputs, and the weights."""
    if not isinstance(fn, nn.Module):
        return fn, []
    named = dict(itertools.chain(fn.named_parameters(), fn.named_buffers()))

    def call(*args: Tensor) -> Any:
        weights = dict(zip(named, args[: len(named)], strict=True))
        return torch.func.functional_call(fn, weights, args[len(named) :])

    return call, [tensor.detach() for tensor in named.values()]


_NO_GPU = ("not linked with support for cuda", "CUDA driver", "CUDA-capable device")


def _trace_for_cuda(
    fn: Callable[..., Any], fakes: Sequence[Tensor], *, symbolic: bool
) -> torch.fx.GraphModule:
    """The aten graph of ``fn`` on CUDA.

    Without a GPU some methods of such tensors cannot be called, ``contiguous`` among
    them; then the graph is that of CPU tensors, moved.
    """
    try:
        return _trace(fn, fakes, symbolic=symbolic)
    except RuntimeError as error:
        if not any(complaint in str(error) for complaint in _NO_GPU):
            raise
    on_cpu = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
        for t in fakes
    ]
    return _moved_to_cuda(_trace(fn, on_cpu, symbolic=symbolic), fakes)


def _moved_to_cuda(
    gm: torch.fx.GraphModule, fakes: Sequence[Tensor]
) -> torch.fx.GraphModule:
    for node in gm.graph.nodes:
        if "device" in node.kwargs:
            device = torch.device("cuda:0")
            node.kwargs = {**node.kwargs, "device": device}
    FakeTensorProp(gm, detect_fake_mode(list(fakes))).propagate_dont_convert_inputs(
        *fakes
    )
    gm.recompile()
    return gm


def _trace(
    fn: Callable[..., Any], fakes: Sequence[Tensor], *, symbolic: bool
) -> torch.fx.GraphModule:
    """The aten graph as AOTAutograd would hand it to Inductor."""

    def flat(*args: Tensor) -> tuple[Any, ...]:
        return tuple(tree_leaves(fn(*args)))

    functional = torch.func.functionalize(flat, remove="mutations")
    mode = "symbolic" if symbolic else "real"
    gm = make_fx(functional, select_decomp_table(), tracing_mode=mode)(*fakes)
    for node, fake in zip(gm.graph.find_nodes(op="placeholder"), fakes, strict=True):
        node.meta["val"] = fake
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _run_passes(
    gm: torch.fx.GraphModule, options: Mapping[str, Any], static: Sequence[int]
) -> tuple[Decision, ...]:
    from inductor_sparse import passes
    from inductor_sparse.passes.base import PassContext

    inputs = gm.graph.find_nodes(op="placeholder")
    record = GraphDecisions("fake_cuda")
    weights = frozenset(inputs[position].name for position in static)
    passes.run(gm, PassContext(options, record, static_inputs=weights))
    return tuple(record.decisions)


def _lower(
    gm: torch.fx.GraphModule,
    fakes: Sequence[Tensor],
    shape_env: ShapeEnv,
    made: tuple[Decision, ...],
) -> Generated:
    joint_graph.joint_graph_passes(gm)
    view_to_reshape(gm)
    post_grad_passes(gm, is_inference=True)
    graph = GraphLowering(
        gm,
        example_inputs=fakes,
        shape_env=shape_env,
        is_inference=True,
        graph_id=0,
        cpp_wrapper=inductor_config.cpp_wrapper,
    )
    with (
        V.set_graph_handler(graph),
        V.set_extern_kernel_nodes([]),
        DebugContext(),
    ):
        graph.run(*fakes)
        text, *_ = graph.codegen()
    return Generated(getattr(text, "value", text), made, graph, gm)


_TRITON = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.S)
_CUDA = re.compile(r"(\w+) = CudaKernel\(\s*'\w+',\s*r'''(.*?)'''", re.S)


def _triton_sources(code: str) -> dict[str, str]:
    return dict(_TRITON.findall(code))


def cuda_sources(code: str) -> dict[str, str]:
    """The CUDA C++ text of each kernel in a wrapper, by the name it has there."""
    return dict(_CUDA.findall(code))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel: bytes per block (shared) and per thread (local).

    ``local`` counts the stack, and with it what registers were spilled to.
    """

    registers: int
    local: int
    shared: int
    ptx: str
    log: str = ""


def compile_triton(
    generated: Generated | str, folder: Path, capability: Capability = (9, 0)
) -> dict[str, Compiled]:
    """Every Triton kernel of a wrapper compiled by its first configuration.

    ``folder`` receives the kernels' files, e.g. pytest's ``tmp_path``.
    """
    code = generated.code if isinstance(generated, Generated) else generated
    compiled = {}
    with fake_cuda(capability), patch.dict("os.environ", TRITON_CACHE_DIR=str(folder)):
        for name, source in _triton_sources(code).items():
            tuner = _load(name, source, folder)
            result = tuner._precompile_config(tuner.configs[0])
            kernel = getattr(result, "kernel", result)
            compiled[name] = _from_cubin(
                kernel.asm["cubin"], kernel.asm["ptx"], kernel.metadata.shared, folder
            )
    return compiled


def _load(name: str, source: str, folder: Path) -> Any:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"fake_cuda_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _from_cubin(cubin: bytes, ptx: str, shared: int, folder: Path) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    said = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", path],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", said)}
    local = used["STACK"] + used["LOCAL"]
    return Compiled(used["REG"], local, max(shared, used["SHARED"]), ptx, said)


def compile_cuda(source: str, folder: Path, arch: str = "sm_90a") -> Compiled:
    """Compile CUDA C++ with NVRTC; ``log`` is what ``ptxas -v`` has to say.

    Raises:
        AssertionError: it does not compile; the message is the compiler's.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={arch}", "-std=c++17", "--ptxas-options=-v"]
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    )
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.decode().rstrip("\0")
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, text
    cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    nvrtc.nvrtcGetCUBIN(program, cubin)
    ptx = bytearray(_checked(nvrtc.nvrtcGetPTXSize(program)))
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    made = _from_cubin(bytes(cubin), ptx.decode().rstrip("\0"), 0, folder)
    return dataclasses.replace(made, log=text)


def _checked(answer: tuple[Any, ...]) -> Any:
    from cuda.bindings import nvrtc

    status, *values = answer
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
    return values[0]
