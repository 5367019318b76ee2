"""``linear_sparsify24``: one kernel on Hopper, or a product and the packing behind it.

The kernel is taken where its tiles are expected to fill the GPU; with autotuning on it
is measured beside the pair.  ``linear_sparsify24_quantized``, whose scales are given
before there is anything to take them from, is the kernel or the op as it is defined.

Shape legend: ``M`` tokens, ``D`` features of the model, ``K`` neurons, ``S`` packed
neurons.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, lowerings
from torch._inductor.select_algorithm import autotune_select_algorithm, realize_inputs
from torch._inductor.virtualized import V

from inductor_sparse import _compat, formats
from inductor_sparse.lowerings import (
    candidate_check,
    common,
    hopper,
    linear_sparsify24_choices,
    linear_sparsify24_kernel,
)
from inductor_sparse.lowerings.cuda_epilogue import PrintedEpilogue
from inductor_sparse.lowerings.cuda_template import (
    CudaLaunch,
    CudaTemplateBuffer,
    wrapper_can_launch,
)
from inductor_sparse.lowerings.hopper import ALIGNMENT, Refused
from inductor_sparse.lowerings.linear_sparsify24_kernel import TileConfig
from inductor_sparse.runtime import cuda_driver

log = logging.getLogger(__name__)

OP_NAME = "linear_sparsify24"
OP = common.op(OP_NAME)
QUANTIZED = common.op("linear_sparsify24_quantized")
SPARSIFY = common.op("sparsify24")

Packed = tuple[ir.TensorBox, ir.TensorBox]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the op with its operands in memory; ``M`` may be symbolic.

    ``given`` are x, w1, bias and energy as the op got them, ``scales`` in e4m3 those of
    x, w1 and the values.
    """

    given: tuple[Any, Any, Any, Any]
    x: Any
    w1: Any
    bias: Any
    energy: Any
    activation: str
    select: str
    scales: tuple[Any, ...] = ()

    @property
    def operands(self) -> list[Any]:
        """What is read: x, w1, and the scales and the bias if there are any."""
        bias = [] if self.bias is None else [self.bias]
        return [self.x, self.w1, *self.scales, *bias]

    @property
    def sizes(self) -> tuple[Any, int, int]:
        """``M``, ``D`` and ``K``."""
        M, D = self.x.get_size()
        return M, int(D), int(self.w1.get_size()[0])

    @property
    def tokens(self) -> int:
        """``M``, or what it was when the graph was traced."""
        return hopper.rows(self.x.get_size()[0])

    @property
    def layout(self) -> ir.FixedLayout:
        """Of the values."""
        M, _, K = self.sizes
        size = list(formats.values_shape(M, K))
        return ir.FixedLayout(self.x.get_device(), self.x.get_dtype(), size)


def tuned_linear_sparsify24(
    x: ir.TensorBox,
    w1: ir.TensorBox,
    bias: ir.TensorBox | None,
    activation: str,
    select: str,
    energy: ir.TensorBox | None = None,
) -> Packed:
    """Lower ``linear_sparsify24``: ``(values, metadata)``."""
    try:
        call = _call(x, w1, bias, energy, activation, select)
    except Refused as reason:
        log.info("%s is lowered to a matmul and sparsify24: %s", OP_NAME, reason)
        return _pair(x, w1, bias, energy, activation, select)
    return _fastest(call)


def tuned_linear_sparsify24_quantized(
    x: ir.TensorBox,
    x_scale: ir.TensorBox,
    w1: ir.TensorBox,
    w1_scale: ir.TensorBox,
    bias: ir.TensorBox | None,
    row_scale: ir.TensorBox,
    activation: str,
    select: str,
    energy: ir.TensorBox | None = None,
) -> Packed:
    """Lower ``linear_sparsify24_quantized``: ``(values, metadata)``."""
    given = (x, x_scale, w1, w1_scale, bias, row_scale, activation, select, energy)
    try:
        call = _call(x, w1, bias, energy, activation, select)
    except Refused as reason:
        log.warning("%s falls back to its slow eager op: %s", QUANTIZED, reason)
        return common.fallback(QUANTIZED)(*given)
    scales = tuple(_contiguous(scale) for scale in (x_scale, w1_scale, row_scale))
    _, _, K = call.sizes
    processors = cuda_driver.multiprocessors(call.x.get_device())
    tile = linear_sparsify24_kernel.fastest_tile(call.tokens, K, processors)
    log.info("%s %d tokens, %s: %s", QUANTIZED, call.tokens, call.sizes, tile)
    return _node(dataclasses.replace(call, scales=scales), tile)


def _pair(
    x: ir.TensorBox,
    w1: ir.TensorBox,
    bias: ir.TensorBox | None,
    energy: ir.TensorBox | None,
    activation: str,
    select: str,
) -> Packed:
    """The product, rounded to its dtype, and the packing."""
    w1_DK = lowerings[common.aten.permute.default](w1, [1, 0])
    if bias is None:
        z_MK = lowerings[common.aten.mm.default](x, w1_DK)
    else:
        z_MK = lowerings[common.aten.addmm.default](bias, x, w1_DK)
    sparsify = lowerings.get(SPARSIFY) or common.fallback(SPARSIFY)
    return sparsify(z_MK, activation, select, energy)


def _call(
    x: ir.TensorBox,
    w1: ir.TensorBox,
    bias: ir.TensorBox | None,
    energy: ir.TensorBox | None,
    activation: str,
    select: str,
) -> Call:
    """The operands as the kernel wants them; what it does not take is Refused."""
    if x.get_device().type != "cuda":
        raise Refused(f"no kernel for {x.get_device().type}")
    if not wrapper_can_launch():
        raise Refused("the kernel is launched from Python, the wrapper is not Python")
    refusal = linear_sparsify24_kernel.kind_refusal(
        x.get_device(), x.get_dtype(), activation
    )
    if refusal is not None:
        raise Refused(refusal)
    return Call(
        (x, w1, bias, energy),
        _rows(x),
        _rows(w1),
        _contiguous(bias),
        _contiguous(energy),
        activation,
        select,
    )


def _contiguous(tensor: ir.TensorBox | None) -> ir.IRNode | None:
    if tensor is None:
        return None
    return common.require_contiguous(realize_inputs(tensor))


def _rows(matrix: ir.TensorBox) -> ir.IRNode:
    """A matrix that TMA can fetch as it lies in memory; any other is Refused."""
    matrix = realize_inputs(matrix)
    if isinstance(matrix.get_layout(), ir.FlexibleLayout):
        # Computed in this graph: nobody has decided yet how it lies in memory.
        matrix = common.require_contiguous(matrix)
    numbers = (int, sympy.Integer)
    outer, inner = matrix.get_size()
    stride = matrix.get_stride()
    if not isinstance(inner, numbers) or not all(
        isinstance(s, numbers) for s in stride
    ):
        raise Refused(f"sizes {matrix.get_size()} with strides {stride} are dynamic")
    known = int(outer) if isinstance(outer, numbers) else 1
    refusal = linear_sparsify24_kernel.layout_refusal(
        (known, int(inner)),
        (int(stride[0]), int(stride[1])),
        matrix.get_dtype().itemsize,
    )
    if refusal is not None:
        raise Refused(refusal)
    if not hopper.is_aligned(matrix):
        raise Refused(f"{matrix.get_name()} is not {ALIGNMENT}-byte aligned")
    return matrix


def _fastest(call: Call) -> Packed:
    """The kernel or the pair: measured if Inductor autotunes, expected otherwise."""
    if hopper.is_measured(call.operands):
        measured = _measured(call)
        if measured is not None:
            return _node(call, measured.tile)
        log.warning(
            "%s %s: not enough memory to measure candidates", OP_NAME, call.sizes
        )
    _, _, K = call.sizes
    processors = cuda_driver.multiprocessors(call.x.get_device())
    tile = linear_sparsify24_kernel.best_tile(call.tokens, K, processors)
    log.info("%s %d tokens, %s: %s", OP_NAME, call.tokens, call.sizes, tile or "pair")
    return _node(call, tile)


def _node(call: Call, tile: TileConfig | None) -> Packed:
    """The kernel with a tile, or the pair for None, in the graph."""
    if tile is None:
        return _pair(*call.given, call.activation, call.select)
    M, _, K = call.sizes
    R, C, words = formats.metadata_shape(M, K)
    device = call.x.get_device()
    metadata = empty_strided(
        [R, C, words], [C * words, words, 1], dtype=torch.int32, device=device
    )
    written = [realize_inputs(metadata)]
    if call.energy is not None:
        written.append(call.energy)

    def render(printed: PrintedEpilogue) -> CudaLaunch:
        return _launch(call, tile, written[0], printed)

    inputs = [*call.operands, *written]
    buffer = CudaTemplateBuffer(call.layout, inputs, render, written)
    values = ir.TensorBox.create(buffer)
    # Lanes hold packed values: nothing can be computed from them on the way.
    V.graph.no_fuse_buffer_names.add(buffer.get_name())
    return values, metadata


def _launch(
    call: Call, tile: TileConfig, metadata: ir.IRNode, printed: PrintedEpilogue
) -> CudaLaunch:
    """The kernel's text and its arguments."""
    assert printed.primary_buffer is not None and not printed.body
    kernel = linear_sparsify24_kernel.kernel(
        call.x.get_dtype(),
        call.activation,
        call.bias is not None,
        call.energy is not None,
        tile,
    )
    optional = [t for t in (call.bias, call.energy) if t is not None]
    outputs = (printed.primary_buffer, metadata)
    return CudaLaunch(
        kernel.name,
        kernel.source,
        kernel.signature,
        (call.x, call.w1, *call.scales, *optional, *outputs, *call.sizes),
        threads=kernel.threads,
        maps=kernel.maps,
        cluster=kernel.cluster,
        shared_bytes=kernel.shared_bytes,
    )


def _measured(call: Call) -> linear_sparsify24_choices.Candidate | None:
    """The fastest of all tiles and the pair, each checked before it is timed.

    None if there was no memory to measure any.
    """
    won: list[linear_sparsify24_choices.Candidate] = []
    oracle = linear_sparsify24_choices.Oracle(call.activation)

    def candidate(tile: TileConfig | None) -> linear_sparsify24_choices.Candidate:
        def make() -> ir.TensorBox:
            # No node yet: a pair that nobody reads would add to the energy as well.
            won.append(made)
            return call.given[0]

        made = linear_sparsify24_choices.Candidate(
            tile, call.operands, call.layout, oracle, make
        )
        return made

    try:
        with _compat.measuring_in_this_process():
            autotune_select_algorithm(
                OP_NAME,
                [candidate(tile) for tile in (None, *linear_sparsify24_kernel.TILES)],
                call.operands,
                call.layout,
                return_multi_template=False,
            )
    except Exception as error:
        if candidate_check.is_out_of_memory(error):
            return None
        raise
    return None if oracle.short_of_memory and not oracle.timed else won[-1]


def register() -> None:
    """Register the lowerings with Inductor; calling it again changes nothing."""
    common.register(OP, tuned_linear_sparsify24)
    common.register(QUANTIZED, tuned_linear_sparsify24_quantized)
