"""Epilogues in another order than the product, and those that are refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_cuda_op
import sympy
import torch
from fake_cuda import cuda_sources, generate
from small_cuda_op import mm
from torch import Tensor
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import ModularIndexing

from inductor_sparse.lowerings.cuda_epilogue import EpiloguePrinter
from inductor_sparse.lowerings.cuda_epilogue_index import (
    Location,
    Space,
    Unsupported,
    adjacent,
    m,
    n,
)

Function = Callable[..., Any]

small_cuda_op.register()


def inputs(*shapes: tuple[int, ...], M: int = 6, N: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in ((M, 4), (4, N), *shapes)]


def check(fn: Function, folder: Path, *given: Tensor, **options: Any) -> str:
    """One kernel computes ``fn``; returns its text."""
    generated = generate(fn, *given, **options)
    assert len(generated.kernels) == len(generated.cuda_kernels) == 1
    exact = fn(*given)
    exact = exact if isinstance(exact, tuple) else (exact,)
    actual = small_cuda_op.on_cpu(generated, folder, *given)
    for ours, wanted in zip(actual, exact, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    return generated.code


@pytest.mark.parametrize("dynamic", [(), (2,), (2, 3)])
def test_three_dimensions(dynamic: tuple[int, ...], tmp_path: Path) -> None:
    def fn(a: Tensor, b: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = mm(a.view(-1, 4), b).view(residual.shape)
        return (y + bias).relu() * residual

    a, *given = inputs((8,), (2, 3, 8))
    code = check(fn, tmp_path, a.view(2, 3, 4), *given, dynamic=dynamic)
    assert code.count("epilogue::load2(in_ptr") == 2


def test_what_the_rows_of_a_batch_share(tmp_path: Path) -> None:
    def fn(a: Tensor, b: Tensor, of_batch: Tensor, of_row: Tensor) -> Tensor:
        return mm(a, b).view(2, 3, 8) * of_batch + of_row

    check(fn, tmp_path, *inputs((2, 1, 1), (3, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 6, 8])
def test_a_copy_of_the_transposed_result(
    M: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    def fn(a: Tensor, b: Tensor, residual: Tensor, of_row: Tensor) -> Tensor:
        y = mm(a, b) * of_row + residual
        return y.relu().t().contiguous()

    given = [x.round().to(dtype) for x in inputs((M, 8), (M, 1), M=M)]
    code = check(fn, tmp_path, *given)
    # What the kernel stores itself has 16 bits, in rows of 16 bytes.
    own = dtype == torch.bfloat16 and M != 6
    assert ("primary" in code) == own


@pytest.mark.parametrize("M", [6, 8])
def test_a_transposed_result(M: int, tmp_path: Path) -> None:
    def fn(a: Tensor, b: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = mm(a, b)
        return y.t() + residual, y * 2

    check(fn, tmp_path, *inputs((8, M), M=M))


def test_a_transposed_residual(tmp_path: Path) -> None:
    def fn(a: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        return mm(a, b) + residual.t()

    check(fn, tmp_path, *inputs((8, 6)))


def test_one_row_and_one_column(tmp_path: Path) -> None:
    def fn(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return mm(a, b) + bias

    check(fn, tmp_path, *inputs((8,), M=1))
    check(fn, tmp_path, *inputs((1,), N=1))


def test_the_product_is_kept_for_other_readers(tmp_path: Path) -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = mm(a, b)
        z = y.relu()
        return y, z.square(), (z + 1).half()

    check(fn, tmp_path, *inputs())


def test_what_shares_an_operand_with_the_epilogue_joins_it(tmp_path: Path) -> None:
    def fn(a: Tensor, b: Tensor, bias: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return mm(a, b) + bias, other * bias

    check(fn, tmp_path, *inputs((8,), (6, 8)))


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What printers refuse, in order."""
    refused: list[str] = []
    fuse = EpiloguePrinter.fuse

    def spy(printer: EpiloguePrinter, node: Any) -> bool:
        fused = fuse(printer, node)
        if not fused:
            refused.append(printer.refusals[node.get_name()])
        return fused

    monkeypatch.setattr(EpiloguePrinter, "fuse", spy)
    return refused


def small_then_triton(fn: Function, *given: Tensor) -> str:
    """The wrapper of ``fn``, of which a second kernel computes a part."""
    generated = generate(fn, *given)
    assert len(generated.cuda_kernels) == 1
    assert len(generated.triton_kernels) >= 1
    call = generated.code[generated.code.index("def call") :]
    assert call.index("small_mm_") < call.index("triton_poi_fused")
    return call


def test_an_unknown_op_is_refused(refusals: list[str]) -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.special.i0(mm(a, b)) * 2

    call = small_then_triton(fn, *inputs())
    assert refusals == ["the op i0 of torch.float32"]
    assert call.index("buf0 = empty") < call.index("small_mm_") < call.index("del buf0")


def test_float64_is_refused(refusals: list[str]) -> None:
    small_then_triton(lambda a, b: mm(a, b).double().exp(), *inputs())
    assert refusals == ["values of torch.float64"]


def square_plus_transpose(a: Tensor, b: Tensor) -> Tensor:
    y = mm(a, b)
    return y + y.t()


def transposed_and_read(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = mm(a, b) * 2
    return y.t().contiguous(), y


def moved_heads(a: Tensor, b: Tensor) -> Tensor:
    return (mm(a, b) * 2).view(8, 2, 4).transpose(0, 1).contiguous()


@pytest.mark.parametrize(
    "fn",
    [square_plus_transpose, moved_heads],
    ids=lambda f: f.__name__,
)
def test_other_orders_than_the_product_s_are_other_kernels(fn: Function) -> None:
    small_then_triton(fn, *inputs(M=8))


def test_a_second_result_in_another_order_is_stored_as_such() -> None:
    # By another kernel, or, as newer schedulers exchange the loops of a copy, by ours.
    generated = generate(transposed_and_read, *inputs(M=8))
    (source,) = cuda_sources(generated.code).values()
    own = "epilogue::store(out_ptr2, (m + (8LL * n)), (float)x0, ok0);" in source
    assert len(generated.triton_kernels) == (0 if own else 1)


@pytest.fixture
def sizes() -> Iterator[None]:
    """Inductor's knowledge of sizes: none."""
    graph = SimpleNamespace(sizevars=SizeVarAllocator())
    with V.set_graph_handler(graph):  # type: ignore[arg-type]
        yield


def solve(strides: dict[int, int], *, transposed: bool = False) -> None:
    """Solve for the iteration variables of the ranges ``strides``, and check them.

    At every ``(m, n)`` of ``[6, 8]`` the read must hit the element's place in memory.
    """
    space = Space(6, 8)
    variables = {
        sympy.Symbol(f"i{at}", integer=True, nonnegative=True): sympy.Integer(size)
        for at, size in enumerate(strides)
    }
    index = sum(v * s for v, s in zip(variables, strides.values(), strict=True))
    location = Location(6 * n + m) if transposed else space.row_major
    solution = space.solve(variables, index, location)
    for row, column in itertools.product(range(6), range(8)):
        element = {m: row, n: column}
        values = {v: solution[v].subs(element) for v in variables}
        assert all(0 <= values[v] < variables[v] for v in variables)
        assert index.subs(values) == location.index.subs(element)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(
    "strides",
    [
        *({48: 1}, {6: 8, 8: 1}, {8: 1, 6: 8}, {1: 0, 6: 8, 8: 1}),
        *({2: 24, 3: 8, 8: 1}, {3: 8, 8: 1, 2: 24}, {4: 1, 6: 8, 2: 4}),
        *({12: 4, 4: 1}, {3: 16, 16: 1}),  # the end of a row is inside a range
    ],
)
def test_iteration_variables_are_solved_for(strides: dict[int, int]) -> None:
    solve(strides)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("strides", [{6: 1, 8: 6}, {48: 1}, {4: 12, 2: 6, 6: 1}])
def test_in_a_transposed_buffer(strides: dict[int, int]) -> None:
    solve(strides, transposed=True)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("strides", [{6: 16, 8: 1}, {6: 8, 8: 2}, {6: 0, 8: 1}])
def test_reads_with_gaps_are_refused(strides: dict[int, int]) -> None:
    with pytest.raises(Unsupported, match="a read at"):
        solve(strides)


@pytest.mark.usefixtures("sizes")
def test_pairs_that_are_one_access() -> None:
    assert adjacent(8 * m + n)
    assert adjacent(n)
    assert not adjacent(9 * m + n)
    assert not adjacent(8 * m + n + 1)
    assert not adjacent(8 * m + 2 * n)
    assert not adjacent(6 * n + m)
    assert not adjacent(ModularIndexing(n, 1, 4))


def test_what_reads_a_refused_node_runs_after_it(refusals: list[str]) -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = mm(a, b)
        odd = torch.special.i0(y)
        return y * 2, odd, odd.relu() + y

    call = small_then_triton(fn, *inputs())
    assert len(refusals) >= 1
    assert "the op i0 of torch.float32" in refusals
    assert all("is not complete yet" in refusal for refusal in refusals[1:])
    assert call.count("del buf0") == 1


def test_a_gather_from_the_product_is_refused() -> None:
    def fn(a: Tensor, b: Tensor, at: Tensor) -> Tensor:
        return mm(a, b)[at] + 1

    small_then_triton(fn, *inputs(), torch.arange(6))
