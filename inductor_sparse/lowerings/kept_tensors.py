"""Ops that return a tensor kept by the runtime: called, and never written into.

Inductor believes that it owns what an op returns and may hand a dead buffer to a later
kernel as its output: that would overwrite a cached weight, or the counters of a site.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._inductor.virtualized import V

from inductor_sparse.lowerings import common

OPS = tuple(
    common.op(name)
    for name in ("row_major_weight", "quantized_weight", "site_counters", "site_energy")
)


def lower_kept_tensor(target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Lower a call of ``target`` to a call of the op, its results kept out of reuse."""
    result = common.fallback(target)(*args, **kwargs)
    tensors = result if isinstance(result, (list, tuple)) else (result,)
    V.graph.never_reuse_buffers.update(tensor.get_name() for tensor in tensors)
    return result


def register() -> None:
    """Register the lowerings with Inductor; calling it again changes nothing."""
    for target in OPS:
        common.register(target, functools.partial(lower_kept_tensor, target))
