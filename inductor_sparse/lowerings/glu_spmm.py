"""``glu_spmm`` on a CPU: up and down projections of active neurons in one kernel.

On a GPU it is :mod:`inductor_sparse.lowerings.glu_spmm_cuda`.  Elsewhere, and for
dtypes the templates do not know, the op itself runs.

Shape legend: ``M`` rows (tokens), ``D`` input features, ``F`` neurons, ``N`` outputs.
"""

from __future__ import annotations

from torch._inductor import ir
from torch._inductor.select_algorithm import realize_inputs

from inductor_sparse import profitability
from inductor_sparse.lowerings import activation_spmm_cuda, common, glu_spmm_cuda
from inductor_sparse.lowerings.spmm_template import SpmmTemplate

OP = common.op("glu_spmm")


def tuned_glu_spmm(
    gate: ir.TensorBox,
    x: ir.TensorBox,
    w_up: ir.TensorBox,
    w_down: ir.TensorBox,
    activation: str,
    counters: ir.TensorBox | None = None,
) -> ir.TensorBox:
    """Lower ``glu_spmm``: ``gate [M, F], x [M, D], w_up [F, D], w_down [F, N]``."""
    tensors = (gate, x, w_up, w_down)
    if activation_spmm_cuda.takes(*tensors):
        return glu_spmm_cuda.product(*tensors, activation, counters)
    if not common.has_cpp_kernel(*tensors):
        return common.fallback(OP)(*tensors, activation)
    inputs = [common.require_contiguous(t) for t in realize_inputs(*tensors)]
    size = [gate.get_size()[0], w_down.get_size()[1]]
    layout = ir.FixedLayout(gate.get_device(), gate.get_dtype(), size)
    names = dict(zip(("G", "X", "Wu", "Wd"), inputs, strict=True))
    template = SpmmTemplate(
        "glu_spmm",
        names,
        layout,
        counters,
        activation=activation,
        reads=profitability.glu_reads(str(gate.get_dtype()).removeprefix("torch.")),
    )
    return common.choose(template)


def register() -> None:
    """Register the lowering with Inductor; calling it again changes nothing."""
    common.register(OP, tuned_glu_spmm)
