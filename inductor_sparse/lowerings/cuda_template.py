"""A CUDA C++ kernel as a node of Inductor's graph, with epilogues fused into it.

:class:`CudaTemplateBuffer` is the result of a kernel whose text a function renders once
Inductor has settled what is fused behind it.  The generated wrapper builds one
:class:`~inductor_sparse.runtime.cuda_kernel.CudaKernel` per text and runs it.

Inductor lets a template bring its own kernel object; the hooks it calls on it changed
between releases, and both sets are here.  Nothing of Inductor's is replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen.common import IndentedBuffer, Kernel, OpOverrides
from torch._inductor.lowering import empty_strided
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from inductor_sparse.lowerings.cuda_epilogue import EpiloguePrinter, PrintedEpilogue
from inductor_sparse.runtime.cuda_kernel import PERSISTENT, TensorMap

Argument = ir.IRNode | str | sympy.Expr | int | float
"""Of a launch: a tensor, a buffer by its name, a size, or a number."""

_IMPORT = "from inductor_sparse.runtime.cuda_kernel import CudaKernel, TensorMap"


def wrapper_can_launch() -> bool:
    """Whether the wrapper being generated is Python, and so can launch our kernels.

    Where it is not (AOTInductor, ``cpp_wrapper``) a lowering must call the op itself.
    """
    return not (
        V.graph.cpp_wrapper or V.graph.aot_mode or getattr(V.graph, "fx_wrapper", False)
    )


@dataclasses.dataclass(frozen=True)
class CudaLaunch:
    """A rendered kernel and how it is launched; as for ``CudaKernel``.

    ``signature`` and ``arguments`` are those before the epilogue's, which are appended.
    """

    name: str
    source: str
    signature: tuple[str, ...]
    arguments: tuple[Argument, ...]
    threads: int
    maps: tuple[TensorMap, ...] = ()
    cluster: int = 1
    shared_bytes: int = 0
    grid: int | str = PERSISTENT

    def constructor(self, epilogue: PrintedEpilogue) -> str:
        """Python text that makes the kernel.

        The name in the source stays: equal texts of two graphs are compiled once.
        """
        kinds = (*self.signature, *epilogue.signature)
        return (
            f"CudaKernel({self.name!r}, r'''{self.source}''', signature={kinds!r}, "
            f"maps={self.maps!r}, threads={self.threads}, cluster={self.cluster}, "
            f"shared_bytes={self.shared_bytes}, grid={self.grid!r})"
        )


Render = Callable[[PrintedEpilogue], CudaLaunch]
"""Makes the kernel once its epilogue is known."""


def allocate(
    device: torch.device, dtype: torch.dtype, size: Sequence[sympy.Expr | int]
) -> ir.TensorBox:
    """A contiguous buffer without contents, for a kernel's further output."""
    stride = ir.FlexibleLayout.contiguous_strides(list(size))
    made = empty_strided(size, stride, dtype=dtype, device=device)
    made.realize()
    return made


class CudaTemplateBuffer(ir.TemplateBuffer):
    """The ``[M, N]`` row-major output of a CUDA C++ kernel.

    If it is ``transposed`` it is ``[N, M]`` instead, row-major: Inductor fuses behind
    it what reads it in that order.

    Args:
        layout: of the output, fixed.
        inputs: every tensor the kernel reads or writes, realized.
        render: makes the kernel's text from its epilogue.
        written: those of ``inputs`` that are further outputs: made by :func:`allocate`
            and filled by the kernel.
        transposed: whether rows of the output are columns of the product.
    """

    def __init__(
        self,
        layout: ir.Layout,
        inputs: Sequence[ir.IRNode],
        render: Render,
        written: Sequence[ir.IRNode] = (),
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__(layout, inputs, make_kernel_render=_make_kernel_render)
        self.render = render
        self.transposed = transposed
        device = layout.device
        self.mutated_inputs = list(written) or None
        self.mutation_outputs = [
            ir.MutationOutput(ir.NoneLayout(device=device), buffer, self)
            for buffer in written
        ]

    def get_outputs(self) -> list[ir.Buffer]:
        """The output, and one mark for each further output."""
        return [self, *self.mutation_outputs]

    def get_allowed_prologue_inps(self) -> OrderedSet[str]:
        """Nothing can be fused in front: the kernel fetches its operands by TMA."""
        return OrderedSet()


def _make_kernel_render(
    buffer: CudaTemplateBuffer, hint_override: int | None = None
) -> tuple[CudaTemplateKernel, Callable[[], str]]:
    return CudaTemplateKernel(buffer), lambda: ""


class CudaTemplateKernel(Kernel):
    """What Inductor's scheduling talks to while it generates one such kernel."""

    overrides = OpOverrides  # type: ignore[assignment]

    def __init__(self, buffer: CudaTemplateBuffer) -> None:
        super().__init__()
        self.buffer = buffer
        self.prologue_fused_inputs: OrderedSet[str] = OrderedSet()
        self.named_input_nodes: dict[str, ir.IRNode] = {}
        self.refusals: dict[str, str] = {}
        self._unfused: list[Any] = []
        self._scheduling: Any = None
        self._launch: CudaLaunch | None = None
        self._epilogue = PrintedEpilogue(None)

    def _render(self, scheduling: Any, epilogue_nodes: Sequence[Any]) -> str:
        self._scheduling = scheduling
        written = [*(self.buffer.mutated_inputs or ()), *self.buffer.mutation_outputs]
        names = {buffer.get_name() for buffer in written}
        printer = EpiloguePrinter(
            self, self.buffer, names, transposed=self.buffer.transposed
        )
        with self:
            self._unfused = [n for n in epilogue_nodes if not printer.fuse(n)]
            for name in printer.stored:
                self.args.output(name)
                self.store_buffer_names.add(name)
        self.refusals = printer.refusals
        self._epilogue = printer.finish(self.removed_buffers)
        self._launch = self.buffer.render(self._epilogue)
        # The scheduling tells kernels apart by their text alone.
        launch = dataclasses.replace(self._launch, source="", arguments=())
        return f"// {launch}\n{self._launch.source}"

    def codegen_template_body(
        self,
        scheduling: Any,
        template_node: Any,
        epilogue_nodes: Sequence[Any],
        *_: Any,
    ) -> str:
        """The kernel's text (newer torch)."""
        return self._render(scheduling, epilogue_nodes)

    def get_unfused_epilogues(self) -> list[Any]:
        """The nodes that become kernels of their own (newer torch)."""
        return self._unfused

    def codegen_template_override(
        self,
        scheduling: Any,
        template_node: Any,
        epilogue_nodes: Sequence[Any],
        prologue_nodes: Sequence[Any],
        buffer_to_prologues: Any,
        preserves_zero_mask: Any,
        render: Any,
        only_gen_src_code: bool,
    ) -> str | CudaTemplateKernel:
        """The kernel's text, or this kernel defined in the wrapper (older torch)."""
        source = self._render(scheduling, epilogue_nodes)
        if only_gen_src_code:
            return source
        nodes = [template_node, *epilogue_nodes]
        with V.set_kernel_handler(self):
            for node in nodes:
                if all(node is not unfused for unfused in self._unfused):
                    node.mark_run()
        self.kernel_name = scheduling.define_kernel(source, nodes, self)
        return self

    def emit_kernel_override(
        self,
        wrapper: Any,
        src_code: str,
        kernel_name: str,
        node_schedule: Sequence[Any],
        kernel_path: str,
        get_kernel_metadata: Callable[..., tuple[str, str]],
    ) -> bool:
        """Define the kernel in the wrapper, as a variable named after it."""
        assert self._launch is not None
        name = f"{self._launch.name}_{kernel_name.rsplit('_', 1)[-1]}"
        _names(wrapper)[kernel_name] = name
        origins, detailed = get_kernel_metadata(node_schedule, wrapper)
        wrapper.add_import_once(_IMPORT)
        text = self._launch.constructor(self._epilogue)
        wrapper.define_kernel(name, text, f"{origins}\n{detailed}")
        return True

    def call_kernel(
        self, name: str, node: Any = None, deallocate_ws: bool = True
    ) -> None:
        """Write the launch, and behind it what could not be fused."""
        assert self._launch is not None
        wrapper = V.graph.wrapper_code
        index = self.buffer.get_device().index
        stream = wrapper.write_get_raw_stream(index, V.graph.name)
        arguments = (*self._launch.arguments, *self._epilogue.arguments)
        texts = ", ".join(_argument(argument) for argument in arguments)
        wrapper.writeline(f"{_names(wrapper)[name]}.run({texts}, stream={stream})")
        self._codegen_unfused()

    def _codegen_unfused(self) -> None:
        # Each of them ends with the freeing of what waits for it, and what waits now is
        # freed when nobody reads it after all of them: it is put back for that.
        waiting = V.graph.scheduler.buffer_names_to_free
        names = OrderedSet(waiting)
        waiting.clear()
        for node in self._unfused:
            self._scheduling.codegen_node(node)
        waiting.update(names)

    def estimate_kernel_num_bytes(self) -> int:
        """Bytes moved: unknown; ``config.benchmark_kernel`` cannot run this kernel."""
        return 0

    def imports_for_benchmark_kernel(self) -> str:
        """Nothing to import for a benchmark there is not."""
        return ""

    def codegen_kernel_benchmark(self, num_gb: float) -> IndentedBuffer:
        """No benchmark."""
        return IndentedBuffer()


def _names(wrapper: Any) -> dict[str, str]:
    """Inductor's names of the kernels of a wrapper, and ours.

    The branches of a control-flow op have wrappers of their own in one module.
    """
    while getattr(wrapper, "parent_wrapper", None) is not None:
        wrapper = wrapper.parent_wrapper
    return wrapper.__dict__.setdefault("_inductor_sparse_kernels", {})


def _argument(argument: Argument) -> str:
    if isinstance(argument, ir.IRNode):
        return argument.codegen_reference()
    if isinstance(argument, sympy.Expr):
        return V.graph.wrapper_code.codegen_python_sizevar(argument)
    return argument if isinstance(argument, str) else repr(argument)
