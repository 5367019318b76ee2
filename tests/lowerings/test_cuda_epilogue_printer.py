"""What the printer decides by itself, whatever Inductor's scheduler lets through.

Nodes here are as small as the printer sees them: ranges, reads, outputs, and a body
that calls ops.  The product is ``product``, 6 x 8; ``other`` is a tensor of that shape,
``half`` one of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen.common import KernelArgs
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from inductor_sparse.lowerings.cuda_epilogue import EpiloguePrinter

M, N = 6, 8
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
Body = Callable[[Sequence[sympy.Symbol]], None]


def layout(device: torch.device = GPU) -> ir.FixedLayout:
    return ir.FixedLayout(device, torch.float32, [M, N], [N, 1])


def buffer(name: str, spec: Any = None, device: torch.device = GPU) -> Any:
    spec = spec or layout(device)
    return SimpleNamespace(
        get_name=lambda: name,
        get_dtype=lambda: torch.float32,
        get_device=lambda: device,
        get_size=lambda: [sympy.Integer(M), sympy.Integer(N)],
        get_layout=lambda: spec,
        get_output_spec=lambda: spec,
    )


BUFFERS = {name: buffer(name) for name in ("product", "other", "out", "next", "half")}
BUFFERS["on_cpu"] = buffer("on_cpu", device=CPU)


def node(
    name: str,
    body: Body,
    *,
    ranges: Sequence[int] = (M, N),
    reduced: Sequence[int] = (),
    reads: Sequence[str] = (),
    spec: Any = None,
) -> Any:
    """A node that writes ``name``."""
    made = SimpleNamespace(
        get_name=lambda: f"op_{name}",
        get_buffer_names=lambda: {name},
        get_ranges=lambda: ([sympy.Integer(size) for size in ranges], list(reduced)),
        get_outputs=lambda: [SimpleNamespace(node=buffer(name, spec), get_name=str)],
        read_writes=SimpleNamespace(reads=[SimpleNamespace(name=r) for r in reads]),
    )
    made._body = lambda variables, _: body(variables)
    return made


@pytest.fixture
def printer() -> Iterator[EpiloguePrinter]:
    graph = SimpleNamespace(
        sizevars=SizeVarAllocator(),
        get_dtype=lambda name: torch.bfloat16 if name == "half" else torch.float32,
        get_buffer=BUFFERS.__getitem__,
        unaligned_buffers=set(),
        scheduler=None,
        removed_buffers=set(),
    )
    kernel = SimpleNamespace(args=KernelArgs(), rename_indexing=lambda index: index)
    with V.set_graph_handler(graph):  # type: ignore[arg-type]
        yield EpiloguePrinter(kernel, BUFFERS["product"])  # type: ignore[arg-type]


def copy(
    *reads: str, to: str = "out", mode: str | None = None, at: int = 0, step: int = 1
) -> Body:
    """The sum of what is read in row-major order, stored so."""

    def body(variables: Sequence[sympy.Symbol]) -> None:
        i, j = variables
        index = step * (N * i + j) + at
        values = [ops.load(name, index) for name in reads]
        total = values[0]
        for value in values[1:]:
            total = ops.add(total, value)
        ops.store(to, N * i + j, total, mode=mode)

    return body


def transposed(variables: Sequence[sympy.Symbol]) -> None:
    """The product and its transpose: another thread holds the second value."""
    i, j = variables
    here, there = ops.load("product", N * i + j), ops.load("product", M * j + i)
    ops.store("out", N * i + j, ops.add(here, there))


def gather(variables: Sequence[sympy.Symbol]) -> None:
    i, j = variables
    at = ops.indirect_indexing(ops.load("other", N * i + j), M)
    ops.store("out", N * i + j, ops.load("product", N * at + j))


def odd_place(variables: Sequence[sympy.Symbol]) -> None:
    i, j = variables
    value = ops.load("product", N * i + j)
    ops.store("out", sympy.Max(N * i + j, 1), value)


def permuted(variables: Sequence[sympy.Symbol]) -> None:
    """Rows 0, 3, 1, 4, 2, 5 one after the other."""
    i, j = variables
    row = 2 * ModularIndexing(i, 1, 3) + FloorDiv(i, 3)
    ops.store("out", N * row + j, ops.load("product", N * i + j))


def flat(variables: Sequence[sympy.Symbol]) -> None:
    (i,) = variables
    ops.store("next", i, ops.load("out", i))


def refusal(printer: EpiloguePrinter, refused: Any) -> str:
    """Why the printer refuses, and that nothing of the node is left."""
    arguments, stored = printer.kernel.args, dict(printer.stored)
    before = (dict(arguments.input_buffers), list(printer.ops.lines))
    assert not printer.fuse(refused)
    assert (dict(arguments.input_buffers), printer.ops.lines) == before
    assert printer.stored == stored
    return printer.refusals[refused.get_name()]


def test_what_reads_this_thread_s_elements_is_printed(printer: EpiloguePrinter) -> None:
    assert printer.fuse(node("out", copy("product", "other")))
    assert printer.fuse(node("next", copy("out", to="next")))
    assert printer.refusals == {}
    printed = printer.finish(set())
    assert list(printer.stored) == ["product", "out", "next"]
    assert printed.signature == ("pointer",) * 4


def test_an_element_of_another_thread_is_refused(printer: EpiloguePrinter) -> None:
    assert refusal(printer, node("out", transposed)).startswith("reads product at ")


@pytest.mark.parametrize(("ranges", "reduced"), [((6, 4), ()), ((6, 8), (4,))])
def test_another_number_of_elements_is_refused(
    ranges: tuple[int, int], reduced: tuple[int, ...], printer: EpiloguePrinter
) -> None:
    reason = refusal(
        printer, node("out", copy("product"), ranges=ranges, reduced=reduced)
    )
    assert reason.startswith("ranges ")


def test_what_reads_a_refused_node_is_refused(printer: EpiloguePrinter) -> None:
    refusal(printer, node("out", transposed))
    reader = node("next", copy("product", "out", to="next"), reads=("out",))
    reason = refusal(printer, reader)
    assert reason == "reads ['out'], which is not complete yet"


def test_a_further_output_of_the_kernel_is_not_read(printer: EpiloguePrinter) -> None:
    filling = EpiloguePrinter(printer.kernel, BUFFERS["product"], {"other"})
    reader = node("out", copy("product", "other"), reads=("product", "other"))
    assert refusal(filling, reader) == "reads ['other'], which is not complete yet"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (copy("product", mode="atomic_add"), "a store of torch.float32, mode atomic_a"),
        (copy("product", "on_cpu"), "on_cpu is on another device"),
        (copy("product", at=1), "a read at "),
        (copy("product", step=2), "a read at "),
        (gather, "an index that is read from a tensor"),
        (odd_place, "the index Max("),
    ],
)
def test_what_cannot_be_printed_is_refused(
    body: Body, reason: str, printer: EpiloguePrinter
) -> None:
    assert refusal(printer, node("out", body)).startswith(reason)


def test_what_reads_rows_in_another_order_is_refused(printer: EpiloguePrinter) -> None:
    assert printer.fuse(node("out", permuted))
    reason = refusal(printer, node("next", flat, ranges=(M * N,)))
    assert reason.startswith("a read of a buffer at ")


def test_a_tensor_that_is_updated_in_place_is_refused(printer: EpiloguePrinter) -> None:
    spec = SimpleNamespace()  # anything but a layout of its own
    assert refusal(printer, node("out", copy("product"), spec=spec)) == "the layout of "


def test_half_of_a_refused_node_is_forgotten(printer: EpiloguePrinter) -> None:
    def body(variables: Sequence[sympy.Symbol]) -> None:
        copy("product", "other")(variables)
        transposed(variables)

    refusal(printer, node("out", body))
    assert printer.fuse(node("next", copy("product", to="next")))
    assert printer.finish(set()).arguments == ("product", "next")


def store_half(transposed: bool, integer: bool) -> Body:
    def body(variables: Sequence[sympy.Symbol]) -> None:
        i, j = variables
        value = ops.load("product", N * i + j)
        if integer:
            value = ops.index_expr(i, torch.int64)
        ops.store("half", M * j + i if transposed else N * i + j, value)

    return body


@pytest.mark.parametrize(
    ("transposed", "integer", "removed", "primary"),
    [
        (False, False, set(), "half"),
        (True, False, set(), None),
        (False, True, set(), None),
        (False, False, {"half"}, None),
    ],
)
def test_the_kernel_stores_floats_of_16_bits_in_rows(
    transposed: bool,
    integer: bool,
    removed: set[str],
    primary: str | None,
    printer: EpiloguePrinter,
) -> None:
    assert printer.fuse(node("half", store_half(transposed, integer)))
    printed = printer.finish(removed | {"product"})
    assert printed.primary_buffer == primary
    assert ("epilogue::store" in printed.body) is (primary is None and not removed)


def test_two_elements_are_one_access_only_where_both_are_aligned(
    printer: EpiloguePrinter,
) -> None:
    V.graph.unaligned_buffers.add("other")
    assert printer.fuse(node("out", copy("product", "other")))
    body = printer.finish({"product"}).body
    assert "epilogue::load2(" not in body
    assert body.count("epilogue::load(") == 2
    assert "epilogue::store2(" in body
