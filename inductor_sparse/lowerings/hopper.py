"""What the lowerings and the kernel texts for Hopper share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jinja2
import sympy
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.virtualized import V

from inductor_sparse import _compat, templates
from inductor_sparse.runtime.tensor_map import MAX_DIMENSION

SHARED_BYTES = 232_448
"""Dynamic shared memory that a block may have on sm_90 (227 KiB)."""

MAX_SIZE = MAX_DIMENSION
"""Sizes are 32-bit in the kernels, where whole tiles reach beyond them."""

ALIGNMENT = 16
"""Bytes that TMA fetches at a time: operands and their rows begin at a multiple."""

_ANY_M = 8192
"""Rows assumed where nothing is known about them."""


class Refused(Exception):
    """There is no kernel of ours for a call; the message says why."""


def render(path: str, **symbols: Any) -> str:
    """CUDA C++ of the template at ``path``, with the symbols that all of them have."""
    return _template(path).render(
        **symbols,
        hopper=templates.load("cuda/hopper.cuh"),
        shared_bytes=SHARED_BYTES,
        # ptxas gives 168 registers to each of 384 threads; the consumers take what
        # the producer does not need.
        consumer_registers=232,
        producer_registers=40,
    )


@functools.cache
def _template(path: str) -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    return environment.from_string(templates.load(path))


def is_aligned(node: ir.IRNode) -> bool:
    """Whether a node in memory starts at a multiple of :data:`ALIGNMENT` bytes."""
    offset = sympy.sympify(node.get_layout().offset * node.get_dtype().itemsize)
    known = V.graph.sizevars.statically_known_multiple_of(offset, ALIGNMENT)
    return bool(known) and node.get_name() not in V.graph.unaligned_buffers


def rows(M: Any) -> int:
    """A number of rows, or what it was when the graph was traced."""
    return int(V.graph.sizevars.optimization_hint(M, fallback=_ANY_M))


def is_measured(operands: Sequence[ir.IRNode]) -> bool:
    """Whether autotuning chooses among the kernels for these operands.

    Not if it was told not to measure, nor for one tensor in two roles, which it merges.
    """
    tuning = inductor_config.max_autotune or inductor_config.max_autotune_gemm
    distinct = len({node.get_name() for node in operands}) == len(operands)
    return bool(tuning and distinct and not _compat.is_deterministic())
