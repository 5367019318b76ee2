"""What generated code calls for tensors that the runtime keeps: found without dispatch.

Each function takes what the op of its name takes, in the same order.  What is not kept
yet, or cannot be, and tensors that are more than tensors (fake ones, subclasses) go
through the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inductor_sparse.runtime import adaptation, prepared_weights
from inductor_sparse.runtime import site_energy as energy
from inductor_sparse.runtime.prepared_weights import Key

_PLAIN = (Tensor, nn.Parameter)
_ops = torch.ops.inductor_sparse


def row_major_weight(weight: Tensor, *window: Any) -> Tensor:
    """The kept copy of a window of a weight, row-contiguous."""
    if type(weight) in _PLAIN:
        copies = prepared_weights.kept(Key.of(weight, *window), weight)
        if copies is not None:
            return copies[0]
    return _ops.row_major_weight.default(weight, *window)


def quantized_weight(weight: Tensor, *window: Any) -> tuple[Tensor, ...]:
    """The kept quantized copy of a window of a weight: values, scale, largest norm."""
    if type(weight) in _PLAIN:
        key = Key.of(weight, *window, quantized=True)
        copies = prepared_weights.kept(key, weight)
        if copies is not None:
            return copies
    return _ops.quantized_weight.default(weight, *window)


def site_counters(
    anchor: Tensor, site: str, max_density: float = 1.0, tokens: int = 1
) -> Tensor:
    """The counters of a site of the running graph."""
    if type(anchor) in _PLAIN:
        if anchor.is_cuda:
            return adaptation.gpu_site_counters(anchor, site, max_density, tokens)
        if anchor.is_cpu:
            return adaptation.site_counters(anchor, site, max_density, tokens)
    return _ops.site_counters.default(anchor, site, max_density, tokens)


def site_energy(anchor: Tensor, site: str) -> Tensor:
    """The energies of a site of the running graph."""
    if type(anchor) in _PLAIN and (anchor.is_cuda or anchor.is_cpu):
        return energy.site_energy(anchor, site)
    return _ops.site_energy.default(anchor, site)
