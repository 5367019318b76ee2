"""``activation_spmm`` on a CPU: a C++ template with Inductor's epilogues in it.

On a GPU it is :mod:`inductor_sparse.lowerings.activation_spmm_cuda`.  Elsewhere, and
for dtypes the templates do not know (on a CPU rows of 8 bits too), the op itself runs.

Shape legend: ``B`` batches, ``M`` rows (tokens), ``K`` reduction, ``N`` outputs.
"""

from __future__ import annotations

from torch._inductor import ir
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import cexpr_index
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import realize_inputs

from inductor_sparse import profitability
from inductor_sparse.lowerings import activation_spmm_cuda, common
from inductor_sparse.lowerings.spmm_template import SpmmTemplate

OP = common.op("activation_spmm")


def tuned_activation_spmm(
    z: ir.TensorBox,
    w: ir.TensorBox,
    activation: str,
    counters: ir.TensorBox | None = None,
    w_scale: ir.TensorBox | None = None,
) -> ir.TensorBox:
    """Lower ``activation_spmm``; a batch becomes the rows of one product."""
    if w_scale is not None:
        if activation_spmm_cuda.takes_scaled(z, w, w_scale):
            return activation_spmm_cuda.product(z, w, activation, counters, w_scale)
        return common.fallback(OP)(z, w, activation, counters, w_scale)
    if activation_spmm_cuda.takes(z, w):
        return activation_spmm_cuda.product(z, w, activation, counters)
    if not common.has_cpp_kernel(z, w):
        return common.fallback(OP)(z, w, activation)
    if len(z.get_size()) == 2:
        return _product(z, w, activation, counters, batches=1)
    view = lowerings[common.aten.view.default]
    B, M, K = z.get_size()
    N = w.get_size()[-1]
    z_2d = view(z, [B * M, K])
    w_2d = view(w, [B * K, N])
    return view(_product(z_2d, w_2d, activation, counters, batches=B), [B, M, N])


def _product(
    z: ir.TensorBox,
    w: ir.TensorBox,
    activation: str,
    counters: ir.TensorBox | None,
    batches: object,
) -> ir.TensorBox:
    """``act(z) @ w`` where ``z [batches * M, K]`` and ``w [batches * K, N]``."""
    z, w = realize_inputs(z, w)
    z, w = common.require_contiguous(z), common.require_contiguous(w)
    dtype = z.get_dtype()
    layout = ir.FixedLayout(z.get_device(), dtype, [z.get_size()[0], w.get_size()[1]])

    def batches_text(kernel: CppTemplateKernel) -> str:
        return cexpr_index(kernel.rename_indexing(batches))

    name = str(dtype).removeprefix("torch.")
    template = SpmmTemplate(
        "activation_spmm",
        {"Z": z, "W": w},
        layout,
        counters,
        activation=activation,
        batches=batches_text,
        stream_reads=profitability.stream_reads(name),
        dense_density=_dense_density(name),
    )
    return common.choose(template)


def _dense_density(dtype: str) -> str:
    """The density above which a call of ``rows`` rows multiplies densely, in C++."""
    few, many = (
        profitability.dense_call_density(tokens, dtype)
        for tokens in (profitability.FEW_TOKENS, None)
    )
    return f"(rows <= {profitability.FEW_TOKENS} ? {few} : {many})"


def register() -> None:
    """Register the lowering with Inductor; calling it again changes nothing."""
    common.register(OP, tuned_activation_spmm)
