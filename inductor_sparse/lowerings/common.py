"""What every lowering here needs: the op, its fallback, layouts, the one choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering

from inductor_sparse import ops

aten = torch.ops.aten

CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def op(name: str) -> torch._ops.OpOverload:
    """The default overload of ``torch.ops.inductor_sparse.<name>``."""
    return getattr(getattr(torch.ops, ops.NAMESPACE), name).default


def fallback(target: torch._ops.OpOverload) -> Callable[..., Any]:
    """A lowering that calls the op itself: always correct, never fused."""
    return fallback_handler(target, add_to_fallback_set=False)


def register(
    target: torch._ops.OpOverload, lowering: Callable[..., ir.TensorBox]
) -> None:
    """Register ``lowering`` for ``target`` unless that was done before."""
    if target not in lowerings:
        register_lowering(target, type_promotion_kind=None)(lowering)


def has_cpp_kernel(*tensors: ir.TensorBox) -> bool:
    """Whether the C++ templates take these operands: not empty, on a CPU, one dtype.

    A size that only turns out to be 0 at run time is the template's business.
    """
    dtype = tensors[0].get_dtype()
    return dtype in CPP_DTYPES and all(
        t.get_device().type == "cpu"
        and t.get_dtype() == dtype
        and 0 not in t.get_size()
        for t in tensors
    )


def require_contiguous(tensor: ir.IRNode) -> ir.IRNode:
    """The same values with rows contiguous; copies only if they are not."""
    return ir.ExternKernel.require_contiguous(tensor)


def choose(template: CppTemplate) -> ir.TensorBox:
    """The output of the one choice there is; nothing to autotune."""
    return template.generate().output_node()
