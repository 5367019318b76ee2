"""``activation_spmm`` of few tokens on a GPU: two Triton kernels.

The rows of ``w`` are dealt to so many programs that every multiprocessor has some to
read, whatever the density.  What each of them has summed is added up, always in the
same order, by a second kernel, which also does what Inductor fuses behind the product:
that is faster than letting the last program of a tile do it.  Nothing depends on the
data but how many rows are read, so graphs can be captured.

Shape legend: ``B`` batches, ``M`` rows (tokens), ``K`` reduction, ``N`` outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import empty_strided
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

from inductor_sparse import templates
from inductor_sparse.lowerings import common, dependent_launch
from inductor_sparse.runtime import cuda_driver

MAX_TOKENS = 8
"""Tokens of a program; more of them are the business of more programs."""

DOT_DTYPES = {
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.float32: "tl.float32",
}
"""The dtypes the kernels take, and what they multiply in."""

DOT_TOKENS = 4
"""From so many tokens on 16-bit products are the business of tensor cores."""

_DOT_COLUMNS = 128
"""Of a warp that uses tensor cores; half of them if ``w`` has 8 bits, because
converting takes registers."""

WARP_BYTES = 512
"""Of a row of ``w`` that any other warp loads: 16 of each lane."""

SCALED_DOT_DTYPE = "tl.bfloat16"
"""What 8-bit rows are multiplied in: it holds each of their values, and the range of
an activation that was multiplied by a scale."""

_RESIDENT_WARPS = {1: 16, 2: 16, 4: 16, 8: 12}
"""Tokens of a program -> warps that a multiprocessor has registers for.  All have to
run at once: the first thing each of them does is to wait for memory three times."""

_SCALED_RESIDENT_WARPS = _RESIDENT_WARPS | {8: 8}
"""The same for ``w`` of 8 bits, by the registers that the compiler takes."""

_MAX_LOCAL = 1024


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a product is cut into programs; the names are those of the template."""

    TOKENS: int
    BN: int
    SPLITS: int
    LOCAL: int
    ROWS: int
    DOT: bool
    num_warps: int


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def choose_tile(
    tokens: int | None,
    K: int,
    N: int,
    dtype: torch.dtype,
    processors: int,
    *,
    scaled: bool = False,
) -> Tile:
    """The tile for up to ``tokens`` rows, or for an unknown number of them (None).

    Args:
        tokens: rows of one product.
        K: reduction.
        N: columns of ``w``.
        dtype: of the operands; of ``act(z)`` if the rows of ``w`` have 8 bits.
        processors: multiprocessors of the GPU.
        scaled: whether the rows of ``w`` have 8 bits.
    """
    block = MAX_TOKENS if tokens is None else min(MAX_TOKENS, power_of_2(tokens))
    dot = block >= DOT_TOKENS and dtype.itemsize == 2
    # Whole warps side by side in one row: no sum crosses them.
    columns = _DOT_COLUMNS // 2 if scaled else _DOT_COLUMNS
    a_warp = columns if dot else WARP_BYTES // dtype.itemsize
    warps = min(8 if dot else 4, power_of_2(-(-N // a_warp)))
    in_registers = _SCALED_RESIDENT_WARPS if scaled else _RESIDENT_WARPS
    resident = 16 if dot else in_registers[block]
    tiles = -(-N // (warps * a_warp)) * (1 if tokens is None else -(-tokens // block))
    most_splits = min(-(-K // 32), 2 * processors)
    splits = max(1, min(most_splits, resident * processors // (warps * tiles)))
    share = -(-K // (16 * splits)) * 16
    return Tile(
        TOKENS=block,
        BN=warps * a_warp,
        SPLITS=splits,
        LOCAL=min(power_of_2(share), _MAX_LOCAL),
        ROWS=16 if dot or (scaled and block == 1) else 4 if block == 4 else 8,
        DOT=dot,
        num_warps=warps,
    )


SUM_COLUMNS = 32
"""Columns of a program of the second kernel, for one row."""

MAX_AT_ONCE = 128
"""Splits of which the second kernel loads the sums together."""


@SymbolicGridFn
def _grid(splits: Any, *size: Any, cdiv: Any) -> tuple[Any, ...]:
    *batch, m, n, meta = size
    blocks = cdiv(m, meta["TOKENS"])
    return (cdiv(n, meta["BN"]), splits, blocks * (batch[0] if batch else 1))


@SymbolicGridFn
def _sum_grid(*size: Any, cdiv: Any) -> tuple[Any, ...]:
    *batch, m, n, meta = size
    return (cdiv(n, meta["BN"]), m * (batch[0] if batch else 1), 1)


def text(name: str, *helpers: str) -> str:
    """A file of ``templates/triton`` with the functions that it calls behind it."""
    parts = (name, "activation_spmm_activate", *helpers)
    return "\n\n".join(templates.load(f"triton/{part}.py.jinja") for part in parts)


def helper_text() -> str:
    """The functions of the kernel: plain Triton, nothing of Inductor in it."""
    return text("activation_spmm_helpers", "activation_spmm_sum_helpers")


TEMPLATE = TritonTemplate(
    name="activation_spmm",
    grid=_grid,
    source=text("activation_spmm", "activation_spmm_helpers"),
)

SUM_TEMPLATE = TritonTemplate(
    name="activation_spmm_sum",
    grid=_sum_grid,
    source=text("activation_spmm_sum", "activation_spmm_sum_helpers"),
)


MOST_ROWS = 65535
"""Rows of all batches together: CUDA bounds the second dimension of a grid."""


def takes(*tensors: ir.TensorBox) -> bool:
    """Whether the kernels take these operands: on a GPU, one dtype, few enough rows.

    Not for a single result: Inductor drops the mask of a store to one element, to which
    every column of a tile would then be stored.

    A symbolic number of rows is guarded to stay on its side of the limit, unless it is
    known to; one that comes out of data has no kernel.
    """
    dtype = tensors[0].get_dtype()
    rows = sympy.prod(tensors[0].get_size()[:-1])
    single = rows == 1 and any(t.get_size()[-1] == 1 for t in tensors)
    return (
        dtype in DOT_DTYPES
        and not single
        and not V.graph.cpp_wrapper
        and all(
            t.get_device().type == "cuda"
            and t.get_dtype() == dtype
            and 0 not in t.get_size()
            for t in tensors
        )
        and V.graph.sizevars.guard_or_false(sympy.Le(rows, MOST_ROWS))
    )


def takes_scaled(z: ir.TensorBox, w: ir.TensorBox, w_scale: ir.TensorBox) -> bool:
    """Whether the kernels take these 8-bit rows and the scales of them."""
    if not takes(z) or 0 in w.get_size() or w.get_size()[1] == 1:
        return False
    devices = {tensor.get_device() for tensor in (z, w, w_scale)}
    # The compiler has no e4m3 before sm_89.
    return len(devices) == 1 and (
        w.get_dtype() == torch.int8 or _has_e4m3(z.get_device())
    )


def _has_e4m3(device: torch.device) -> bool:
    return torch.version.hip is None and (
        torch.cuda.get_device_capability(device) >= (8, 9)
    )


def product(
    z: ir.TensorBox,
    w: ir.TensorBox,
    activation: str,
    counters: ir.TensorBox | None = None,
    w_scale: ir.TensorBox | None = None,
) -> ir.TensorBox:
    """``act(z) @ w`` for ``z [M, K]``, or ``[B, M, K]``, and ``w`` likewise.

    With ``w_scale [K]`` the rows of ``w [K, N]`` have 8 bits and a scale each.  The
    first kernel adds to ``counters``, which are :data:`ops.COUNTERS`.
    """
    z, w = realize_inputs(z, w)
    w = common.require_contiguous(w)
    *batch, M, K = z.get_size()
    N = w.get_size()[-1]
    device, dtype = z.get_device(), z.get_dtype()
    sizes, scaled = (most(M), size_hint(K), size_hint(N)), w_scale is not None
    processors = cuda_driver.multiprocessors(device)
    tile = choose_tile(*sizes, dtype, processors, scaled=scaled)
    share = CeilDiv(CeilDiv(CeilDiv(K, 16), tile.SPLITS) * 16, tile.LOCAL) * tile.LOCAL
    blocks = CeilDiv(M, tile.TOKENS) * sympy.prod(batch)
    count = blocks * tile.SPLITS * (1 + tile.TOKENS) * share
    scratch = empty_strided([count], [1], dtype=torch.int32, device=device)
    inputs = [*realize_inputs(z, w, scratch)]
    options: dict[str, Any] = {"DOT_DTYPE": DOT_DTYPES[dtype]}
    if w_scale is not None:
        inputs.append(common.require_contiguous(realize_inputs(w_scale)))
        options = {"DOT_DTYPE": SCALED_DOT_DTYPE, "SCALED": True}
    if counters is not None:
        # Not among the mutated: what the runtime keeps is added to, not replaced.
        inputs.append(realize_inputs(counters))
        options["COUNTED"] = True
    size = [tile.SPLITS, *batch, M, N]
    partials = choose(
        TEMPLATE,
        inputs,
        ir.FixedLayout(device, torch.float32, size),
        mutated_inputs=inputs[2:3],
        BATCHED=bool(batch),
        ACTIVATION=repr(activation),
        num_stages=1,
        **options,
        **dependent_launch.options(device),
        **dataclasses.asdict(tile),
    )
    return _sum(partials, tile, ir.FixedLayout(device, dtype, [*batch, M, N]))


def _sum(partials: ir.TensorBox, tile: Tile, layout: ir.Layout) -> ir.TensorBox:
    """What the splits have summed, added up, and what Inductor fuses behind it."""
    return choose(
        SUM_TEMPLATE,
        [realize_inputs(partials)],
        layout,
        BATCHED=len(layout.size) == 3,
        SPLITS=tile.SPLITS,
        BN=SUM_COLUMNS,
        AT_ONCE=min(MAX_AT_ONCE, power_of_2(tile.SPLITS)),
        num_stages=1,
        num_warps=4,
        **dependent_launch.options(layout.device),
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


def most(size: Any) -> int | None:
    """A size, or the bound of a symbolic one; None unless that is a few tokens.

    A larger bound, such as that of the grid, says nothing of how many there will be.
    """
    size = sympy.sympify(size)
    upper = V.graph.sizevars.shape_env.bound_sympy(size).upper
    return int(upper) if size.is_Integer or upper <= MAX_TOKENS else None


def size_hint(size: Any) -> int:
    """A size, or what it was when the graph was traced."""
    return int(V.graph.sizevars.optimization_hint(size, fallback=4096))
