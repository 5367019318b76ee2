"""What keeps a site dense on a GPU besides its size: kernels, layouts, a backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from inductor_sparse import profitability
from inductor_sparse._compat import has_cpp_wrapper, size_hint
from inductor_sparse.decisions import Reason
from inductor_sparse.passes.fx_utils import tensor_of
from inductor_sparse.passes.sites import Rejection, Site
from inductor_sparse.passes.toolchains import missing_package

if TYPE_CHECKING:
    from inductor_sparse.passes.base import PassContext

_BULK_BYTES = 16
"""What the tensor memory accelerator reads and stores at a time."""


def kernel_obstacle(
    ops: tuple[str, ...], dtype: str, arch: str, context: PassContext
) -> Rejection | None:
    """Why these ops cannot run in a dtype on an architecture, or None."""
    has = profitability.has_kernel
    for op in ops:
        if not profitability.knows(arch, op):
            where = arch or "a GPU that this process cannot ask for its architecture"
            return Rejection(Reason.ARCH_UNSUPPORTED, f"{op} has no kernel for {where}")
        if not has(arch, op, dtype, unverified=True):
            return Rejection(
                Reason.NO_KERNEL_YET, f"{op} has no {dtype} kernel for {arch} yet"
            )
    for op in ops:
        if not has(arch, op, dtype) and not context.option("allow_unverified"):
            return Rejection(
                Reason.KERNEL_UNVERIFIED,
                f"the {dtype} kernel of {op} never ran on {arch}; "
                "set sparse.allow_unverified to use it",
            )
        missing = missing_package(op, arch)
        if missing:
            return Rejection(Reason.NO_KERNEL_YET, f"{op} cannot run: {missing}")
    return None


def data_obstacle(site: Site) -> Rejection | None:
    """Why nothing can be said of a site's size, or None."""
    if all(size_hint(size) is not None for size in site.sizes):
        return None
    return Rejection(Reason.UNSUPPORTED_SHAPE, "a size depends on data")


def batch_obstacle(site: Site) -> Rejection | None:
    """Why a batch of matrices stays dense, or None for a plain product."""
    value = tensor_of(site.lhs)
    if value is None or value.ndim == 2:
        return None
    return Rejection(Reason.NO_KERNEL_YET, "a batch of matrices has no GPU kernel yet")


def wrapper_obstacle() -> Rejection | None:
    """Why nothing can be launched from what will call the kernels, or None."""
    if not has_cpp_wrapper():
        return None
    return Rejection(
        Reason.NO_KERNEL_YET,
        "GPU kernels are launched from Python, and this graph is called from C++ "
        "(AOTInductor, or cpp_wrapper)",
    )


def graph_obstacle(context: PassContext) -> Rejection | None:
    """Why nothing is packed in a graph: it has a backward, or runs without Python."""
    if context.is_training:
        return Rejection(
            Reason.TRAINING_GRAPH,
            "the graph has a backward, and 2:4 drops values: the model would learn "
            "something else; call it under torch.no_grad() for inference",
        )
    return wrapper_obstacle()


def order_obstacle(site: Site) -> Rejection | None:
    """Why an activation is not packed in the order in which it lies, or None."""
    activation = tensor_of(site.lhs)
    if activation is None or activation.stride()[-1] == 1:
        return None
    return Rejection(
        Reason.NOT_PROFITABLE,
        "the tokens are columns in memory; what packing takes then was not measured",
    )


def layout_obstacle(site: Site) -> Rejection | None:
    """Why the weight cannot be read as it lies by bulk copies, or None."""
    value = tensor_of(site.rhs)
    assert value is not None
    detail = _size_detail(site, value) or _memory_detail(value)
    return None if detail is None else Rejection(Reason.UNSUPPORTED_SHAPE, detail)


def _size_detail(site: Site, weight: Tensor) -> str | None:
    """What is wrong with K or N, if anything."""
    _, K, N = site.sizes
    step = _BULK_BYTES // weight.itemsize
    if not isinstance(K, int) or K % step:
        return (
            f"K is {K}: 2:4 reads 16 bytes at a time, so it must be a multiple of "
            f"{step}"
        )
    if isinstance(N, int) and N % step == 0:
        return None
    if weight.stride()[-1] == 1:
        return (
            f"N is {N}: 2:4 reads 16 bytes at a time, so it must be a multiple of "
            f"{step}"
        )
    return (
        f"N is {N}: only if it is a multiple of {step} can the result be stored 16 "
        "bytes at a time, and no other width was measured"
    )


def _memory_detail(weight: Tensor) -> str | None:
    """What is wrong with how a weight lies in memory, if anything."""
    step = _BULK_BYTES // weight.itemsize
    strides = tuple(weight.stride())
    lead = [stride for stride in strides if stride != 1]
    if len(lead) != 1 or not isinstance(lead[0], int) or lead[0] % step:
        return (
            f"the weight has strides {strides}: neither its rows nor its columns can "
            "be read 16 bytes at a time"
        )
    if lead[0] < weight.shape[strides.index(1)]:
        return f"the weight has strides {strides}: its elements share memory"
    offset = weight.storage_offset()
    if isinstance(offset, int) and offset % step:
        return (
            f"the weight starts {offset} elements into its storage, and 2:4 reads from "
            f"multiples of 16 bytes, {step} elements"
        )
    return None
