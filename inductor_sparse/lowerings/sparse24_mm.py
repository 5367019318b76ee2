"""``sparse24_mm`` on a GPU: our kernel with Inductor's epilogue, or a vendor's.

On Hopper the product is a node that takes epilogues; its tile comes from a cost model,
or from measuring all of them when autotuning is on.  Other architectures get the vendor
kernel of :data:`.profitability.ROUTES` if unverified kernels are allowed.  Whatever is
not covered calls the op itself, and the log says why.

Shape legend: ``M`` rows, ``N`` columns, ``K`` reduction.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import permute, to_dtype
from torch._inductor.select_algorithm import (
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V

from inductor_sparse import _compat, config, profitability, reference
from inductor_sparse.lowerings import (
    candidate_check,
    common,
    hopper,
    sparse24_choices,
    sparse24_gemm,
    sparse24_kernel,
    tile_model,
    vendor24,
)
from inductor_sparse.lowerings.cuda_epilogue import PrintedEpilogue
from inductor_sparse.lowerings.cuda_template import (
    CudaLaunch,
    CudaTemplateBuffer,
    wrapper_can_launch,
)
from inductor_sparse.lowerings.hopper import Refused
from inductor_sparse.lowerings.result_order import is_read_transposed
from inductor_sparse.lowerings.sparse24_kernel import TileConfig
from inductor_sparse.runtime import cuda_driver, cuda_kernel
from inductor_sparse.runtime.cuda_kernel import TensorMap

log = logging.getLogger(__name__)

OP_NAME = "sparse24_mm"
OP = common.op(OP_NAME)


@dataclasses.dataclass(frozen=True)
class Product:
    """One call of the op with its operands in memory.

    ``operands`` are values, metadata, w and the scales there are; ``b_order`` is that
    of ``w`` (see :func:`.sparse24_gemm.weight_order`); ``M`` may be symbolic.  The
    result is stored as ``[N, M]`` if it is ``transposed``.
    """

    operands: list[Any]
    layout: ir.FixedLayout
    M: sympy.Expr
    N: int
    K: int
    b_order: str
    scales: tuple[bool, bool]
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of values and w."""
        return self.operands[0].get_dtype()

    @property
    def rows(self) -> int:
        """``M``, or what it was when the graph was traced."""
        return hopper.rows(self.M)


def tuned_sparse24_mm(
    values: ir.TensorBox,
    metadata: ir.TensorBox,
    w: ir.TensorBox,
    row_scale: ir.TensorBox | None = None,
    col_scale: ir.TensorBox | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> ir.TensorBox:
    """Lower ``sparse24_mm`` by what there is for the device and the shapes."""
    try:
        kernel = _kernel_route(values, w, out_dtype)
        product = _product(values, metadata, w, row_scale, col_scale, out_dtype)
        return _own(product) if kernel == "own" else _vendor(product, kernel)
    except Refused as reason:
        log.info("sparse24_mm falls back to its eager op: %s", reason)
        return common.fallback(OP)(
            values, metadata, w, row_scale, col_scale, out_dtype=out_dtype
        )


def _kernel_route(
    values: ir.TensorBox, w: ir.TensorBox, out_dtype: torch.dtype | None
) -> str:
    """Whose kernel multiplies; anything that rules all of them out is Refused."""
    device, dtype = values.get_device(), values.get_dtype()
    if device.type != "cuda":
        raise Refused(f"no kernel for {device.type}")
    if not wrapper_can_launch():
        raise Refused("the kernel is launched from Python, the wrapper is not Python")
    arch = profitability.architecture(device)
    name = str(dtype).removeprefix("torch.")
    allowed = config.allow_unverified
    if not profitability.has_kernel(arch, OP_NAME, name, unverified=allowed):
        raise Refused(f"no verified kernel for {name} on {arch or 'this GPU'}")
    sizes = [*values.get_size()[:1], *w.get_size()]
    known = [int(size) for size in sizes if isinstance(size, (int, sympy.Integer))]
    out = reference.result_dtype24(dtype, out_dtype)
    refusal = sparse24_gemm.size_refusal(dtype, out, known)
    if refusal is not None:
        raise Refused(refusal)
    route = profitability.ROUTES.get(arch, "dense")
    missing = cuda_kernel.unavailable_reason() if route == "own" else None
    if missing is not None:
        raise Refused(missing)
    return route


def _product(
    values: ir.TensorBox,
    metadata: ir.TensorBox,
    w: ir.TensorBox,
    row_scale: ir.TensorBox | None,
    col_scale: ir.TensorBox | None,
    out_dtype: torch.dtype | None,
) -> Product:
    """The operands realised as the kernels want them."""
    w, b_order = _weight(w)
    operands = [*map(_row_major, (values, metadata)), w]
    given = [scale for scale in (row_scale, col_scale) if scale is not None]
    operands += [_row_major(to_dtype(scale, torch.float32)) for scale in given]
    unaligned = [node for node in operands if not hopper.is_aligned(node)]
    if unaligned:
        raise Refused(f"{unaligned[0].get_name()} is not 16-byte aligned")
    M, (K, N) = operands[0].get_size()[0], map(int, w.get_size())
    out = reference.result_dtype24(w.get_dtype(), out_dtype)
    return Product(
        operands,
        ir.FixedLayout(w.get_device(), out, [M, N]),
        sympy.sympify(M),
        N,
        K,
        b_order,
        (row_scale is not None, col_scale is not None),
    )


def _row_major(tensor: ir.TensorBox) -> ir.IRNode:
    return common.require_contiguous(realize_inputs(tensor))


def _weight(w: ir.TensorBox) -> tuple[ir.IRNode, str]:
    """``w`` in memory and its order; what TMA cannot fetch is Refused."""
    if not all(isinstance(size, (int, sympy.Integer)) for size in w.get_size()):
        raise Refused("N or K is dynamic")
    w = realize_inputs(w)
    if isinstance(w.get_layout(), ir.FlexibleLayout):
        # Computed in this graph: nobody has decided yet how it lies in memory.
        w = ir.ExternKernel.require_stride_order(w, [0, 1])
    K, N = map(int, w.get_size())
    stride = w.get_stride()
    if not all(isinstance(step, (int, sympy.Integer)) for step in stride):
        raise Refused("w has dynamic strides")
    along_k, along_n = map(int, stride)
    b_order = sparse24_gemm.weight_order(
        (K, N), (along_k, along_n), w.get_dtype().itemsize
    )
    if b_order is None:
        raise Refused(
            f"w [{K}, {N}] with strides ({along_k}, {along_n}) has to be copied"
        )
    return w, b_order


def _own(product: Product) -> ir.TensorBox:
    """Our kernel, or what autotuning finds faster."""
    stored = dataclasses.replace(product, transposed=_is_stored_transposed(product))
    if hopper.is_measured(product.operands):
        return _autotuned(product, _node_maker(stored))
    return _node_maker(stored)(_best_tile(product))


def _is_stored_transposed(product: Product) -> bool:
    """Whether the kernel stores ``[N, M]``: it is read so, in whole 16 bytes."""
    row_bytes = product.M * product.layout.dtype.itemsize
    known_multiple = V.graph.sizevars.statically_known_multiple_of
    return (
        product.layout.dtype in (torch.bfloat16, torch.float16)
        and bool(known_multiple(row_bytes, hopper.ALIGNMENT))
        and is_read_transposed(V.graph.current_node)
    )


def _best_tile(product: Product) -> TileConfig:
    tile = tile_model.best_tile(
        product.rows,
        product.N,
        product.K,
        product.dtype,
        product.b_order,
        cuda_driver.multiprocessors(product.layout.device),
    )
    log.info("sparse24_mm %dx%dx%d: tile %s", product.rows, product.N, product.K, tile)
    return tile


def _autotuned(
    product: Product, node: Callable[[TileConfig], ir.TensorBox]
) -> ir.TensorBox:
    """The fastest candidate whose result is right.

    They are measured as they store ``[M, N]``, whatever ``node`` makes of the fastest.
    """
    oracle = sparse24_choices.Oracle(product.scales)
    choices: list[ir.ChoiceCaller] = [
        sparse24_choices.TileCaller(
            tile, product.operands, product.layout, oracle, node
        )
        for tile in sparse24_kernel.configs(product.dtype, product.b_order)
    ]
    externs = [vendor24.MASKED_DENSE]
    if _vendor_refusal(product, "cusparselt") is None:
        externs.append(vendor24.CUSPARSELT)
    choices += [
        sparse24_choices.CheckedExtern(extern, product.operands, product.layout, oracle)
        for extern in externs
    ]
    chosen: Any = None
    try:
        with sparse24_choices.forgetting(oracle), _compat.measuring_in_this_process():
            chosen = autotune_select_algorithm(
                OP_NAME,
                choices,
                product.operands,
                product.layout,
                input_gen_fns=sparse24_choices.input_generators(product.K),
                return_multi_template=False,
            )
    except Exception as error:
        if not candidate_check.is_out_of_memory(error):
            raise
        oracle.short_of_memory = True
    if oracle.short_of_memory and not oracle.timed:
        log.warning(
            "sparse24_mm %dx%dx%d: not enough memory to measure candidates",
            product.rows,
            product.N,
            product.K,
        )
        return node(_best_tile(product))
    return chosen[0] if isinstance(chosen, tuple) else chosen


def _vendor_refusal(product: Product, kernel: str) -> str | None:
    refusal = getattr(vendor24, f"{kernel}_refusal")
    scaled = any(product.scales)
    return refusal(product.dtype, product.layout.dtype, product.N, scaled=scaled)


def _vendor(product: Product, kernel: str) -> ir.TensorBox:
    """A vendor's kernel, called from the wrapper; epilogues run after it."""
    refusal = "no kernel" if kernel == "dense" else _vendor_refusal(product, kernel)
    if refusal is not None:
        raise Refused(refusal)
    extern = {"cutlass": vendor24.CUTLASS, "cusparselt": vendor24.CUSPARSELT}[kernel]
    oracle = sparse24_choices.Oracle(product.scales)
    return sparse24_choices.CheckedExtern(
        extern, product.operands, product.layout, oracle
    ).output_node()


def _node_maker(product: Product) -> Callable[[TileConfig], ir.TensorBox]:
    """How the product with a given tile becomes a node of the graph."""

    def make(tile: TileConfig) -> ir.TensorBox:
        def render(printed: PrintedEpilogue) -> CudaLaunch:
            return _launch(product, tile, printed)

        layout, transposed = product.layout, product.transposed
        if transposed:
            layout = ir.FixedLayout(layout.device, layout.dtype, layout.size[::-1])
        made = ir.TensorBox.create(
            CudaTemplateBuffer(layout, product.operands, render, transposed=transposed)
        )
        return permute(made, [1, 0]) if transposed else made

    return make


def _launch(product: Product, tile: TileConfig, printed: PrintedEpilogue) -> CudaLaunch:
    """The kernel with one tile and one epilogue, and its arguments."""
    epilogue = sparse24_kernel.Epilogue(
        printed.out_dtype,
        printed.code,
        printed.params,
        printed.body,
        printed.primary0,
        printed.primary1,
        product.transposed,
    )
    row, col = product.scales
    scales = {"has_row_scale": row, "has_col_scale": col}
    source = sparse24_kernel.kernel_source(
        OP_NAME, product.dtype, tile, epilogue, b_order=product.b_order, **scales
    )
    order = product.b_order.upper()
    comment = f"// {product.dtype}, w in {order} order, tile {tile}\n"
    values, metadata, w, *given = product.operands
    stored = printed.primary_buffer
    out = () if stored is None else (_as_matrix(stored, product),)
    boxes = sparse24_kernel.map_boxes(product.dtype, tile, epilogue, product.b_order)
    return CudaLaunch(
        OP_NAME,
        comment + source,
        sparse24_kernel.signature(epilogue, **scales),
        (values, w, *out, metadata, *given, product.M, product.N, product.K),
        threads=tile.threads,
        maps=tuple(TensorMap(**box) for box in boxes),
        cluster=tile.cluster,
        shared_bytes=tile.shared_bytes(product.dtype.itemsize),
    )


def _as_matrix(name: str, product: Product) -> str:
    """A buffer that lies in memory like the product, as ``[M, N]``, in Python."""
    buffer = V.graph.get_buffer(name)
    known_equal = V.graph.sizevars.statically_known_list_equals
    size, stride = [product.M, product.N], [product.N, 1]
    if product.transposed:
        stride = [1, product.M]
    if known_equal(buffer.get_size(), size) and known_equal(
        buffer.get_stride(), stride
    ):
        return name
    text = V.graph.wrapper_code.codegen_python_shape_tuple
    return f"reinterpret_tensor({name}, {text(size)}, {text(stride)}, 0)"


def register() -> None:
    """Register the lowering with Inductor; calling it again changes nothing."""
    common.register(OP, tuned_sparse24_mm)
