"""Pointwise nodes behind a CUDA C++ product, printed into its kernel.

The contract with a kernel text.  Where the kernel holds two adjacent elements of the
product it provides, in any scope:

* ``long long m, n``: row and column of the left element; ``n`` is even;
* ``float acc0, acc1``: the two elements, scaled, not rounded;
* ``bool ok0, ok1``: whether they lie inside the output; ``ok1`` implies ``ok0``.

There it puts ``body``: declarations of variables ``x<number>`` and stores, so the scope
must hold no such names and be entered once per pair.  ``params`` are appended to the
kernel's parameters (names ``in_ptr<i>``, ``out_ptr<i>``, ``ks<i>``), ``signature`` and
``arguments`` to those of its launch.  ``code`` goes before the kernel, at namespace
scope; it declares only ``namespace epilogue``.

If ``out_dtype`` is not None, the kernel stores one output itself: the 16-bit values
``primary0, primary1`` (float expressions, valid after ``body``, meaningless where not
``ok``) of the buffer ``primary_buffer``.  That lies in memory as ``[M, N]``, or as
``[N, M]`` if the product is transposed, and its rows are a multiple of 16 bytes.  Every
other store is in ``body``.

Values are computed in float32, the product as it was accumulated: as in Inductor's own
fused kernels, only what is stored is rounded.  With ``emulate_precision_casts``
Inductor rounds what a node reads, too, as every step in eager mode is.  Outside the
output, values are those of some element inside.

An in-kernel value is used only where a node reads exactly this thread's element; a node
that reads another one, or has an op that cannot be printed, is refused and runs
afterwards as a kernel of its own.

Shape legend: ``M`` rows, ``N`` columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen.common import Kernel
from torch._inductor.ops_handler import DefaultHandler
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.virtualized import V

from inductor_sparse import templates
from inductor_sparse.lowerings import cuda_epilogue_index as where
from inductor_sparse.lowerings.cuda_epilogue_index import Location, Space, Unsupported
from inductor_sparse.lowerings.cuda_epilogue_ops import (
    MEMORY_TYPES,
    Pair,
    PairOps,
    compute_dtype,
)

HELPERS = "cuda/epilogue.cuh"
"""The template with the device functions that printed text calls."""

_BULK_DTYPES = (torch.bfloat16, torch.float16)
_BULK_BYTES = 16


@dataclasses.dataclass(frozen=True)
class PrintedEpilogue:
    """What a kernel needs to know of its epilogue; see the head of this module.

    Attributes:
        out_dtype: dtype of the output the kernel stores itself, or None.
        primary_buffer: name of that output's buffer.
        primary0: its left element.
        primary1: its right element.
        code: device functions.
        params: C++ declarations of the parameters.
        signature: kind of each parameter: ``"pointer"`` or ``"int64"``.
        arguments: name of the buffer, or size, for each parameter.
        body: statements.
    """

    out_dtype: torch.dtype | None
    primary_buffer: str | None = None
    primary0: str = "acc0"
    primary1: str = "acc1"
    code: str = ""
    params: tuple[str, ...] = ()
    signature: tuple[str, ...] = ()
    arguments: tuple[str | sympy.Expr, ...] = ()
    body: str = ""


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A value of this kernel that some buffer keeps, and where."""

    value: Pair
    location: Location


class EpiloguePrinter:
    """Prints the nodes fused behind ``product``, one :meth:`fuse` at a time.

    Args:
        kernel: whose arguments are the epilogue's parameters.
        product: the kernel's own output, ``[M, N]`` row-major.
        unreadable: names of buffers that the kernel fills besides.
        transposed: whether ``product`` is ``[N, M]`` row-major instead.
    """

    def __init__(
        self,
        kernel: Kernel,
        product: ir.Buffer,
        unreadable: Set[str] = frozenset(),
        *,
        transposed: bool = False,
    ) -> None:
        self.kernel = kernel
        rows, self._row = product.get_size()
        self.space = Space(self._row, rows) if transposed else Space(rows, self._row)
        self._place = self.space.transposed if transposed else self.space.row_major
        self.device = product.get_device()
        self.ops = _NodeOps(self)
        self.refusals: dict[str, str] = {}
        self.product = product.get_name()
        self.stored = {self.product: _Stored(self._plain(), self._place)}
        self._refused = set(unreadable)

    def fuse(self, node: SchedulerNode) -> bool:
        """Print ``node``; False, with the reason in ``refusals``, if it is refused."""
        arguments = self.kernel.args
        printed = self.ops.state()
        inputs, sizes = dict(arguments.input_buffers), dict(arguments.sizevars)
        stored = dict(self.stored)
        try:
            self._print(node)
        except Unsupported as refusal:
            arguments.input_buffers, arguments.sizevars = inputs, sizes
            self.stored = stored
            self.ops.restore(printed)
            self.refusals[node.get_name()] = str(refusal)
            self._refused |= set(node.get_buffer_names())
            return False
        return True

    def _print(self, node: SchedulerNode) -> None:
        ranges, reduced = node.get_ranges()
        if reduced or not self.space.covers(ranges):
            raise Unsupported(f"ranges {ranges}, {reduced}")
        missing = {dep.name for dep in node.read_writes.reads} & self._refused
        if missing:
            raise Unsupported(f"reads {sorted(missing)}, which is not complete yet")
        for buffer in node.get_outputs():
            if not isinstance(buffer.node.get_output_spec(), ir.FixedLayout):
                raise Unsupported(f"the layout of {buffer.get_name()}")
        variables = {
            sympy.Symbol(f"i{at}", integer=True, nonnegative=True): size
            for at, size in enumerate(ranges)
        }
        self.ops.enter(variables, *self._basis(node, variables))
        with V.set_ops_handler(self.ops):
            node._body(list(variables), [])

    def _basis(
        self, node: SchedulerNode, variables: dict[sympy.Symbol, sympy.Expr]
    ) -> tuple[sympy.Expr, Location]:
        """Which place the iteration variables are solved for: (index, location).

        That of the first read of a value of this kernel.  A node without one was fused
        for what it shares with the others; it may iterate in any order.
        """
        probe = _Reads()
        with V.set_ops_handler(probe):
            node._body(list(variables), [])
        for name, index in probe.reads:
            if name in self.stored:
                return sympy.expand(index), self.stored[name].location
        index = sympy.Integer(0)
        for variable, size in variables.items():
            index = index * size + variable
        return sympy.expand(index), self.space.row_major

    def finish(self, removed: Set[str]) -> PrintedEpilogue:
        """The printed text; stores of the buffers in ``removed`` are left out."""
        kept = {name: at for name, at in self.stored.items() if name not in removed}
        primary = next((name for name in kept if self._is_bulk(name)), None)
        stores = [self._store(name, at) for name, at in kept.items() if name != primary]
        lines = [*self.ops.lines, *stores]
        value = self.stored[primary].value if primary else self._plain()
        params, signature, arguments = self._parameters(primary)
        return PrintedEpilogue(
            out_dtype=V.graph.get_dtype(primary) if primary else None,
            primary_buffer=primary,
            primary0=value.left,
            primary1=value.right,
            code=templates.load(HELPERS) if lines else "",
            params=params,
            signature=signature,
            arguments=arguments,
            body="\n".join(lines),
        )

    def _plain(self) -> Pair:
        return Pair("acc0", "acc1", torch.float32)

    def _is_bulk(self, name: str) -> bool:
        """Whether the kernel itself stores the buffer, 16 bytes at a time or more.

        8 bits are stored by a kernel whose own product has them, and by no other.
        """
        dtype = V.graph.get_dtype(name)
        own = name == self.product and dtype.itemsize == 1
        return (
            (own or dtype in _BULK_DTYPES)
            and self.stored[name].value.dtype == torch.float32
            and where.known_equal(self.stored[name].location.index, self._place.index)
            and V.graph.sizevars.statically_known_multiple_of(
                self._row * dtype.itemsize, _BULK_BYTES
            )
        )

    def _store(self, name: str, stored: _Stored) -> str:
        left, right = stored.value.left, stored.value.right
        if V.graph.get_dtype(name).is_floating_point:
            left, right = f"(float){left}", f"(float){right}"
        pointer = self.kernel.args.output(name)
        index = stored.location.index
        if self._adjacent(name, index):
            at = self.index_text(index)
            return f"epilogue::store2({pointer}, {at}, {left}, {right}, ok1);"
        at0, at1 = self.index_text(index), self.index_text(where.next_column(index))
        return (
            f"epilogue::store({pointer}, {at0}, {left}, ok0);\n"
            f"epilogue::store({pointer}, {at1}, {right}, ok1);"
        )

    def _adjacent(self, name: str, index: sympy.Expr) -> bool:
        layout = V.graph.get_buffer(name).get_layout()
        aligned = name not in V.graph.unaligned_buffers and not isinstance(
            layout, ir.NonOwningLayout
        )
        # With odd N a row may end between the two.
        even = V.graph.sizevars.statically_known_multiple_of(self.space.N, 2)
        return aligned and even and where.adjacent(index)

    def index_text(self, index: sympy.Expr) -> str:
        """C++ of an index in ``m``, ``n`` and sizes, which become parameters."""
        return where.text(sympy.expand(self.kernel.rename_indexing(index)))

    def load(self, name: str, index: sympy.Expr) -> Pair:
        """The two elements of a tensor that other kernels made."""
        dtype = V.graph.get_dtype(name)
        compute = compute_dtype(dtype)
        declared = MEMORY_TYPES[compute]
        if V.graph.get_buffer(name).get_device() != self.device:
            raise Unsupported(f"{name} is on another device")
        pointer = self.kernel.args.input(name)
        at0 = self.index_text(index)
        if where.n not in index.free_symbols:
            value = self.ops.define(declared, f"epilogue::load({pointer}, {at0}, ok0)")
            return Pair(value, value, compute)
        if self._adjacent(name, index):
            call = f"epilogue::load2({pointer}, {at0}, ok1)"
            both = self.ops.define(f"epilogue::Two<{declared}>", call)
            return Pair(f"{both}.left", f"{both}.right", compute)
        at1 = self.index_text(where.next_column(index))
        values = [
            self.ops.define(declared, f"epilogue::load({pointer}, {at}, {ok})")
            for at, ok in ((at0, "ok0"), (at1, "ok1"))
        ]
        return Pair(values[0], values[1], compute)

    def _parameters(
        self, primary: str | None
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str | sympy.Expr, ...]]:
        """(declarations, kinds, arguments) of what the body uses besides its scope."""
        arguments = self.kernel.args
        found: list[tuple[str, str, str | sympy.Expr]] = []
        for name, inner in arguments.input_buffers.items():
            kind = MEMORY_TYPES[V.graph.get_dtype(name)]
            found.append((f"const {kind}* __restrict__ {inner}", "pointer", name))
        for name, inner in arguments.output_buffers.items():
            if isinstance(inner, str) and name != primary:
                kind = MEMORY_TYPES[V.graph.get_dtype(name)]
                found.append((f"{kind}* __restrict__ {inner}", "pointer", name))
        for size, inner in arguments.sizevars.items():
            found.append((f"const long long {inner}", "int64", size))
        return (
            tuple(declaration for declaration, _, _ in found),
            tuple(kind for _, kind, _ in found),
            tuple(argument for _, _, argument in found),
        )


class _NodeOps(PairOps):
    """:class:`PairOps` with the loads and stores of one node after the other."""

    def __init__(self, printer: EpiloguePrinter) -> None:
        super().__init__()
        self.printer = printer

    def enter(
        self,
        variables: dict[sympy.Symbol, sympy.Expr],
        index: sympy.Expr,
        location: Location,
    ) -> None:
        """Begin a node of which ``index`` shall be ``location``."""
        self._basis_index, self._basis = index, location
        self._solution = self.printer.space.solve(variables, index, location)

    def _locate(self, index: sympy.Expr) -> sympy.Expr:
        """An index in iteration variables as one in ``m`` and ``n``."""
        if where.known_equal(index, self._basis_index):
            return self._basis.index
        return self.printer.space.simplify(index.subs(self._solution))

    def load(self, name: str, index: sympy.Expr) -> Pair:
        """An element of another kernel's tensor, or this thread's of this kernel's."""
        at = self._locate(index)
        mine = self.printer.stored.get(name)
        if mine is None:
            return self.printer.load(name, at)
        if not where.known_equal(at, mine.location.index):
            raise Unsupported(f"reads {name} at {at}, not at {mine.location.index}")
        return mine.value

    def store(
        self, name: str, index: sympy.Expr, value: Pair, mode: Any = None
    ) -> None:
        """Remember what a buffer keeps; it is printed if the buffer stays."""
        dtype = V.graph.get_dtype(name)
        if mode is not None or dtype not in MEMORY_TYPES:
            raise Unsupported(f"a store of {dtype}, mode {mode}")
        at = self._locate(index)
        where.text(at)  # refused now, not when it is printed
        self.printer.stored[name] = _Stored(value, Location(at))

    def index_expr(self, expr: sympy.Expr, dtype: torch.dtype) -> Pair:
        """The value of an index."""
        at = self._locate(expr)
        left = self.printer.index_text(at)
        right = self.printer.index_text(where.next_column(at))
        return self._cast(Pair(left, right, torch.int64), compute_dtype(dtype))


class _Reads(DefaultHandler):
    """Collects what a node reads, in order."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, sympy.Expr]] = []

    def load(self, name: str, index: sympy.Expr) -> str:
        """Note the read."""
        self.reads.append((name, index))
        return name

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "indirect_indexing":
            raise Unsupported("an index that is read from a tensor")
        return name
