"""CUDA code without a GPU: what Inductor would generate, and what becomes of it.

:func:`generate` takes a function through our passes (if asked), Inductor's lowerings,
its scheduler and its code generation as if a GPU of the given compute capability were
there, and returns the wrapper's text.  :func:`compile_triton` and :func:`compile_cuda`
turn kernels of that text into machine code, which nothing here can run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fake_device import Capability, fake_cuda
from machine_code import (
    Compiled,
    compile_cuda,
    compile_triton,
    cuda_sources,
    triton_sources,
)
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import view_to_reshape
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves

from inductor_sparse import _compat, config, lowerings
from inductor_sparse.decisions import Decision, GraphDecisions

__all__ = [
    "Compiled",
    "Generated",
    "compile_cuda",
    "compile_triton",
    "cuda_sources",
    "fake_cuda",
    "generate",
]


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
        return tuple(triton_sources(self.code))

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
    asked = config.patch(**options) if options else contextlib.nullcontext()
    with fake_cuda(capability), inductor_config.patch(chosen), asked:
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
