"""Where the elements of a product ``[M, N]`` lie in the tensors an epilogue touches.

A pointwise node that Inductor fused behind the product iterates over ranges of its own:
other factors of ``M * N``, another order.  A thread of the kernel holds the elements
``(m, n)`` and ``(m, n + 1)``, ``n`` even, so the node's iteration variables are solved
for from where it reads the product; everything else follows by substitution.

Shape legend: ``M`` rows, ``N`` columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import sympy
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

m = sympy.Symbol("m", integer=True, nonnegative=True)
n = sympy.Symbol("n", integer=True, nonnegative=True)


class Unsupported(Exception):
    """An epilogue that cannot be printed; it becomes a kernel of its own."""


@dataclasses.dataclass(frozen=True)
class Location:
    """Where in memory this thread's element ``(m, n)`` of one buffer is."""

    index: sympy.Expr


class Space:
    """The index space of a product of ``M`` rows and ``N`` columns."""

    def __init__(self, M: sympy.Expr, N: sympy.Expr) -> None:
        self.M, self.N = sympy.sympify(M), sympy.sympify(N)
        # As Inductor writes indices: a dimension of one element has no part in them.
        row = m if self.M != 1 else sympy.Integer(0)
        column = n if self.N != 1 else sympy.Integer(0)
        self.row_major = Location(self.N * row + column)
        self.transposed = Location(self.M * column + row)

    def simplify(self, index: sympy.Expr) -> sympy.Expr:
        """``index`` with what follows from ``m < M`` and ``n < N``."""
        ranges = {m: self.M, n: self.N}
        return V.graph.sizevars.simplify_with_ranges(sympy.expand(index), ranges)

    def covers(self, ranges: Sequence[sympy.Expr]) -> bool:
        """Whether iterating over ``ranges`` meets as many elements as there are."""
        return known_equal(sympy.prod(ranges), self.M * self.N)

    def is_row_major(self, location: Location) -> bool:
        """Whether the buffer lies in memory like the product."""
        return known_equal(location.index, self.row_major.index)

    def _digits(self, location: Location) -> tuple[sympy.Expr, ...]:
        """(minor, its extent, major, its extent) of a location without gaps."""
        if self.is_row_major(location):
            return n, self.N, m, self.M
        if known_equal(location.index, self.transposed.index):
            return m, self.M, n, self.N
        raise Unsupported(f"a read of a buffer at {location.index}")

    def solve(
        self,
        variables: dict[sympy.Symbol, sympy.Expr],
        index: sympy.Expr,
        location: Location,
    ) -> dict[sympy.Symbol, sympy.Expr]:
        """The iteration variables at which ``index`` is ``location``.

        Args:
            variables: each iteration variable and its range.
            index: what the node reads, as a function of the variables.
            location: of what it reads.

        Raises:
            Unsupported: ``index`` does not meet every element once, densely.
        """
        minor, minor_end, major, major_end = self._digits(location)
        solution = {v: sympy.Integer(0) for v, r in variables.items() if r == 1}
        step, inside = sympy.Integer(1), True
        for variable in _by_stride(variables, index):
            if inside and known_equal(step, minor_end):
                step, inside = sympy.Integer(1), False
            size = variables[variable]
            part, end = (minor, minor_end) if inside else (major, major_end)
            if inside and _passes(step * size, minor_end):
                part, end = location.index, self.M * self.N
            last = known_equal(step * size, end)
            digit = ModularIndexing(part, step, size)
            solution[variable] = self.simplify(FloorDiv(part, step) if last else digit)
            step = step * size
        return solution


def _passes(reach: sympy.Expr, extent: sympy.Expr) -> bool:
    """Whether a variable that reaches that far leaves the innermost dimension."""
    return not V.graph.sizevars.statically_known_leq(reach, extent)


def known_equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether two sizes or indices are the same whatever the symbols are."""
    difference = sympy.expand(V.graph.sizevars.simplify(left - right))
    return difference == 0


def _by_stride(
    variables: dict[sympy.Symbol, sympy.Expr], index: sympy.Expr
) -> list[sympy.Symbol]:
    """The variables from the innermost outwards; each must start where one ended."""
    index = sympy.expand(index)
    if (
        index.has(FloorDiv, ModularIndexing)
        or index.subs(dict.fromkeys(variables, 0)) != 0
    ):
        raise Unsupported(f"a read at {index}")
    strides = {v: sympy.diff(index, v) for v, size in variables.items() if size != 1}
    ordered: list[sympy.Symbol] = []
    expected: sympy.Expr = sympy.Integer(1)
    while strides:
        found = [v for v, stride in strides.items() if known_equal(stride, expected)]
        if len(found) != 1:
            raise Unsupported(f"a read at {index}")
        ordered += found
        expected = expected * variables[found[0]]
        del strides[found[0]]
    return ordered


def next_column(index: sympy.Expr) -> sympy.Expr:
    """``index`` of the right element of a pair."""
    return index.subs(n, n + 1)


def adjacent(index: sympy.Expr) -> bool:
    """Whether the pair of every even ``n`` is one aligned access of two elements."""
    if sympy.expand(next_column(index) - index) != 1:
        return False
    half = sympy.Symbol("half", integer=True, nonnegative=True)
    even = sympy.expand(index.subs(n, 2 * half))
    return V.graph.sizevars.statically_known_multiple_of(even, 2)


def text(index: sympy.Expr) -> str:
    """C++ of an index; every term is ``long long`` and not negative.

    Raises:
        Unsupported: it has a function that no index needs.
    """
    if isinstance(index, sympy.Symbol):
        return index.name
    if isinstance(index, sympy.Integer):
        return f"{int(index)}LL"
    parts = [text(argument) for argument in index.args]
    if isinstance(index, sympy.Add):
        return f"({' + '.join(parts)})"
    if isinstance(index, sympy.Mul):
        return f"({' * '.join(parts)})"
    if isinstance(index, FloorDiv):
        return f"({parts[0]} / {parts[1]})"
    if isinstance(index, ModularIndexing):
        return f"({parts[0]} / {parts[1]} % {parts[2]})"
    if isinstance(index, sympy.Pow) and index.exp in (2, 3, 4):
        return f"({' * '.join(parts[:1] * int(index.exp))})"
    raise Unsupported(f"the index {index}")
