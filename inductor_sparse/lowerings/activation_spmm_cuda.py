"""``activation_spmm`` of few tokens on a GPU: one Triton kernel with its epilogue.

The rows of ``w`` are dealt to so many programs that every multiprocessor has some to
read, whatever the density; the last program of a tile adds up what all have summed.
Nothing depends on the data but how many rows are read, so graphs can be captured.

Shape legend: ``B`` batches, ``M`` rows (tokens), ``K`` reduction, ``N`` outputs.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.lowering import empty_strided, lowerings
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

from inductor_sparse import templates
from inductor_sparse.lowerings import common

MAX_BLOCK_M = 16
"""Tokens of a program; more of them are the business of more programs."""

SHARED_TICKETS = 4096
"""Tiles of one product up to which it uses the tickets of its graph."""

DOT_DTYPES = {
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.float32: "tl.float32",
}
"""The dtypes the kernels take, and what they multiply in."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a product is cut into programs; the names are those of the template."""

    BM: int
    BN: int
    SPLITS: int
    LOCAL: int
    ROWS: int
    STAGES: int
    AT_ONCE: int
    num_warps: int


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def choose_tile(
    tokens: int | None, K: int, N: int, dtype: torch.dtype, processors: int
) -> Tile:
    """The tile for ``tokens`` rows, or for an unknown number of them (None).

    Args:
        tokens: rows of one product.
        K: reduction.
        N: columns of ``w``.
        dtype: of the operands.
        processors: multiprocessors of the GPU.
    """
    block = MAX_BLOCK_M if tokens is None else min(MAX_BLOCK_M, power_of_2(tokens))
    columns = 256 if block == 1 else 128
    if dtype.itemsize == 4:
        columns //= 2
    tiles = -(-N // columns) * (1 if tokens is None else -(-tokens // block))
    splits = max(1, min(-(-K // 16), 4 * processors // tiles))
    share = -(-K // (16 * splits)) * 16
    return Tile(
        BM=block,
        BN=columns,
        SPLITS=splits,
        LOCAL=max(16, min(power_of_2(share), 2048 // block)),
        ROWS=16 if block == 1 else 32,
        STAGES=1,
        AT_ONCE=max(1, min(power_of_2(splits), 16 // block)),
        num_warps=4,
    )


@SymbolicGridFn
def _grid(*size: Any, cdiv: Any) -> tuple[Any, Any, Any]:
    *batch, m, n, meta = size
    blocks = cdiv(m, meta["BM"])
    return (cdiv(n, meta["BN"]), meta["SPLITS"], blocks * (batch[0] if batch else 1))


def text(name: str, *helpers: str) -> str:
    """A file of ``templates/triton`` with the functions that it calls behind it."""
    parts = (name, "activation_spmm_activate", *helpers)
    return "\n\n".join(templates.load(f"triton/{part}.py.jinja") for part in parts)


def helper_text() -> str:
    """The functions of the kernel: plain Triton, nothing of Inductor in it."""
    return text("activation_spmm_helpers")


TEMPLATE = TritonTemplate(
    name="activation_spmm",
    grid=_grid,
    source=text("activation_spmm", "activation_spmm_helpers"),
)


def takes(*tensors: ir.TensorBox) -> bool:
    """Whether the kernels take these operands: not empty, on a GPU, one dtype."""
    dtype = tensors[0].get_dtype()
    return (
        dtype in DOT_DTYPES
        and not V.graph.cpp_wrapper
        and all(
            t.get_device().type == "cuda"
            and t.get_dtype() == dtype
            and 0 not in t.get_size()
            for t in tensors
        )
    )


def product(z: ir.TensorBox, w: ir.TensorBox, activation: str) -> ir.TensorBox:
    """``act(z) @ w`` for ``z [M, K]``, or ``[B, M, K]``, and ``w`` likewise."""
    z, w = realize_inputs(z, w)
    w = common.require_contiguous(w)
    *batch, M, K = z.get_size()
    N = w.get_size()[-1]
    device, dtype = z.get_device(), z.get_dtype()
    tile = choose_tile(
        static_size(M), size_hint(K), size_hint(N), dtype, processors(device)
    )
    blocks = CeilDiv(M, tile.BM) * sympy.prod(batch)
    share = CeilDiv(CeilDiv(CeilDiv(K, 16), tile.SPLITS) * 16, tile.LOCAL) * tile.LOCAL
    scratch = [
        _scratch(blocks * tile.SPLITS * share, torch.int32, device),
        _scratch(sympy.prod(batch) * tile.SPLITS * M * N, torch.float32, device),
        _tickets(blocks * CeilDiv(N, tile.BN), device),
    ]
    inputs = [z, w, *scratch]
    layout = ir.FixedLayout(device, dtype, [*batch, M, N])
    return choose(
        TEMPLATE,
        inputs,
        layout,
        mutated_inputs=scratch,
        BATCHED=bool(batch),
        ACTIVATION=repr(activation),
        DOT_DTYPE=DOT_DTYPES[dtype],
        num_stages=max(1, tile.STAGES),
        **dataclasses.asdict(tile),
    )


def choose(
    template: TritonTemplate,
    inputs: list[ir.IRNode],
    layout: ir.Layout,
    **options: Any,
) -> ir.TensorBox:
    """The output of a template's only choice; nothing is benchmarked.

    Raises:
        NotImplementedError: Inductor cannot generate the kernel.
    """
    choices: list[Any] = []
    error = template.maybe_append_choice(
        choices, input_nodes=tuple(inputs), layout=layout, **options
    )
    if error is not None:
        raise error
    chosen = autotune_select_algorithm(template.name, choices, inputs, layout)
    return chosen[0] if isinstance(chosen, tuple) else chosen


def static_size(size: Any) -> int | None:
    """A size if it is a number, None for a symbol."""
    return int(size) if isinstance(size, (int, sympy.Integer)) else None


def size_hint(size: Any) -> int:
    """A size, or what it was when the graph was traced."""
    return int(V.graph.sizevars.optimization_hint(size, fallback=4096))


def processors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _scratch(count: Any, dtype: torch.dtype, device: torch.device) -> ir.IRNode:
    return realize_inputs(empty_strided([count], [1], dtype=dtype, device=device))


def _zeros(count: Any, device: torch.device) -> ir.IRNode:
    full = lowerings[common.aten.full.default]
    return realize_inputs(full([count], 0, dtype=torch.int32, device=device))


_tickets_of_graph: weakref.WeakKeyDictionary[GraphLowering, dict[Any, ir.IRNode]]
_tickets_of_graph = weakref.WeakKeyDictionary()


def _tickets(count: Any, device: torch.device) -> ir.IRNode:
    """Zeros that every kernel leaves zero: one buffer for the products of a graph."""
    number = static_size(count)
    if number is None or number > SHARED_TICKETS:
        return _zeros(count, device)
    shared = _tickets_of_graph.setdefault(V.graph, {})
    if device not in shared:
        shared[device] = _zeros(SHARED_TICKETS, device)
    return shared[device]
