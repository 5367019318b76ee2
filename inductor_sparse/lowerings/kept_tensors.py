"""Ops that return a tensor kept by the runtime: called, and never written into.

Inductor believes that it owns what an op returns and may hand a dead buffer to a later
kernel as its output: that would overwrite a cached weight, or the counters of a site.

Generated Python calls the functions behind these ops (:mod:`.runtime.kept_tensors`):
looking a tensor up takes a microsecond, and dispatching an op to Python ten of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.virtualized import V
from torch.utils import _pytree as pytree

from inductor_sparse.lowerings import common
from inductor_sparse.lowerings.cuda_template import wrapper_can_launch

OPS = tuple(
    common.op(name)
    for name in ("row_major_weight", "quantized_weight", "site_counters", "site_energy")
)
_IMPORT = "from inductor_sparse.runtime import kept_tensors"


class KeptTensor(ir.FallbackKernel):
    """A call of such an op, by the function behind it where the wrapper is Python."""

    def codegen(self, wrapper: Any) -> None:
        """Write the call."""
        if wrapper_can_launch():
            assert isinstance(self.op_overload, torch._ops.OpOverload)
            wrapper.add_import_once(_IMPORT)
            self.python_kernel_name = f"kept_tensors.{self.op_overload._opname}"
        super().codegen(wrapper)


def lower_kept_tensor(target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Lower a call of ``target`` to a call of the op, its results kept out of reuse."""

    def boxed(node: Any) -> Any:
        return ir.TensorBox.create(node) if isinstance(node, ir.IRNode) else node

    result = pytree.tree_map(boxed, KeptTensor.create(target, *args, **kwargs))
    tensors = result if isinstance(result, (list, tuple)) else (result,)
    V.graph.never_reuse_buffers.update(tensor.get_name() for tensor in tensors)
    return result


def register() -> None:
    """Register the lowerings with Inductor; calling it again changes nothing."""
    for target in OPS:
        common.register(target, functools.partial(lower_kept_tensor, target))
