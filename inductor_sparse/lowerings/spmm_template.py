"""The C++ template that both sparse products share: rendering and epilogue fusion.

Inductor asks a template to render itself with the pointwise nodes that it fused behind
it.  The kernels here sum one group of columns at a time into a float buffer ``sums``;
``store_sums`` prints the code that applies the epilogue to that buffer and stores it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp import get_export_declaration
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import (
    CppTemplateKernel,
    parse_expr_with_index_symbols,
)
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V

from inductor_sparse import templates

Range = tuple[str, str]

WIDTH = "group_cols"
"""The name in a template of the columns of its ``sums`` buffer, which is row-major."""


class SpmmTemplate(CppTemplate):
    """A sparse product ``[M, N]`` whose kernel text is a file in ``templates/cpp``.

    ``inputs`` maps the names used in the template to buffers, in argument order; behind
    them come the ``counters``, if there are any, as ``C``.
    ``symbols`` are handed to the template as they are; a callable among them is called
    with the kernel first, because names of sizes exist only while rendering.
    """

    def __init__(
        self,
        name: str,
        inputs: dict[str, ir.IRNode],
        layout: ir.Layout,
        counters: ir.TensorBox | None = None,
        **symbols: Any,
    ) -> None:
        if counters is not None:
            inputs = {**inputs, "C": realize_inputs(counters)}
        super().__init__(name, list(inputs.values()), layout, parallel_num_threads())
        self.inputs = inputs
        self.symbols = symbols

    def render(  # type: ignore[override]
        self,
        kernel: CppTemplateKernel,
        template_buffer_node: ir.CppTemplateBuffer | None = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[ir.IRNode] | None = None,
        **_: Any,
    ) -> str:
        """The C++ text, with ``epilogue_nodes`` applied where the sums are stored."""
        product = template_buffer_node or self.output_node
        product_is_used = bool(flag_template_buffer_has_other_users)
        epilogue = _Epilogue(product, list(epilogue_nodes or []), product_is_used)
        text = templates.load(f"cpp/{self.name}.cpp.jinja")
        with contextlib.ExitStack() as stack:
            for buffer in epilogue.local:
                # The graph is asked for their dtypes, and knows them only while this
                # renders: they are no buffers of the program.
                V.graph.name_to_buffer[buffer.get_name()] = buffer
                stack.callback(V.graph.name_to_buffer.pop, buffer.get_name())
            symbols = {
                name: symbol(kernel) if callable(symbol) else symbol
                for name, symbol in self.symbols.items()
            }
            return self._template_from_string(text).render(
                kernel=kernel,
                template=self,
                aliases=epilogue.aliases,
                Y=epilogue.output,
                store_sums=epilogue.store_sums(kernel),
                row_lists=templates.load("cpp/row_lists.h"),
                num_threads=self.num_threads,
                export_declaration=get_export_declaration(),
                **self.inputs,
                **symbols,
            )


class _Epilogue:
    """The pointwise nodes fused behind a product, and where their result goes."""

    def __init__(
        self, product: ir.Buffer, nodes: list[ir.IRNode], product_is_used: bool
    ) -> None:
        self.output = product
        self.view = product
        self.sums_of = product
        self.nodes = nodes
        self.reindexers: list[Callable[[list[Any]], list[Any]] | None] = []
        self.aliases: dict[str, str] = {}
        self.local: list[ir.Buffer] = []
        if not nodes:
            return
        self.output = nodes[-1]
        if product_is_used:
            self._also_store(product)
        else:
            self.aliases[product.get_name()] = self.output.get_name()
        fused = nodes[1:] if product_is_used else nodes
        self.view, self.reindexers = gen_2d_view_of_epilogue_buf(
            self.output,
            product,
            fused,
            self.reindexers,
            default_reindexers=[None] * len(fused),
        )

    def _also_store(self, product: ir.Buffer) -> None:
        # Others read the bare product too: a first node copies the sums to it.
        sums = ir.Buffer(name=f"{product.get_name()}_sums", layout=product.layout)
        load = sums.make_loader()
        copy = ir.Pointwise(
            device=product.get_device(),
            dtype=product.layout.dtype,
            inner_fn=lambda index: load(index),
            ranges=product.get_size(),
        )
        node = ir.ComputedBuffer(
            name=product.get_name(), layout=product.layout, data=copy
        )
        self.nodes.insert(0, node)
        self.reindexers.append(None)
        self.local.append(sums)
        self.aliases[sums.get_name()] = self.output.get_name()
        self.sums_of = sums

    def store_sums(self, kernel: CppTemplateKernel) -> Callable[[Range, Range], str]:
        """A function of the ranges of rows and columns that prints the store."""

        def store(rows: Range, cols: Range) -> str:
            size = parse_expr_with_index_symbols([f"{rows[1]} - {rows[0]}", WIDTH])
            layout = ir.FixedLayout(torch.device("cpu"), torch.float, size)
            sums = kernel.local_buffers["sums"] = ir.Buffer(name="sums", layout=layout)
            spans = [("0", f"{end} - {start}") for start, end in (rows, cols)]
            return kernel.store_output(
                kernel.slice_nd(self.view, [rows, cols]),
                kernel.slice_nd(sums, spans),
                self.sums_of,
                self.nodes or None,
                offsets=[rows[0], cols[0]],
                reindexers=self.reindexers,
            )

        return store
