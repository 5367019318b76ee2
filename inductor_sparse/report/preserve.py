"""Leave a model, its inputs and the random generators as they were before a report."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.pgo import get_code_state
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def preserved(model: Any, inputs: Any) -> Iterator[None]:
    """Undo, on exit, what a forward did to buffers, input tensors and generators.

    Covers buffers of a module (KV caches, batch-norm statistics) changed in place or
    replaced, tensors in ``inputs`` (any nesting that pytree knows) changed in place,
    and the generators of the CPU and of every device in use.  Parameters, and state in
    plain attributes or in cache objects that pytree does not know, are not covered.
    """
    module = _module_of(model)
    submodules = list(module.modules()) if module is not None else []
    buffers = [(child, dict(child._buffers)) for child in submodules]
    tensors = [t for _, held in buffers for t in held.values() if t is not None]
    tensors += [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    saved = [
        (tensor, tensor.detach().clone())
        for tensor in tensors
        if tensor.layout is torch.strided and not tensor.is_meta
    ]
    devices = {tensor.device for tensor in tensors}
    if module is not None:
        devices |= {parameter.device for parameter in module.parameters()}
    indices = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    with torch.random.fork_rng(devices=indices):
        try:
            yield
        finally:
            for child, held in buffers:
                child._buffers.clear()
                child._buffers.update(held)
            for tensor, value in saved:
                _restore(tensor, value)


def _restore(tensor: Tensor, value: Tensor) -> None:
    """Write ``value`` back, unless nothing changed: a write counts as a new version."""
    # Only inference mode may write to an inference tensor.
    mode = torch.inference_mode() if tensor.is_inference() else torch.no_grad()
    with mode:
        # The version alone would not do: batch norm updates its statistics without it.
        if not torch.equal(tensor, value):
            tensor.copy_(value)


def _module_of(model: Any) -> nn.Module | None:
    """The module whose state a call of ``model`` may change, if it can be told."""
    owner = getattr(model, "__self__", model)
    return owner if isinstance(owner, nn.Module) else None


@contextlib.contextmanager
def shape_history_preserved() -> Iterator[None]:
    """Start without, and leave untouched, what Dynamo remembers of sizes seen before.

    Dynamo makes a size dynamic once it has seen two values of it.  A report should
    neither show a size as dynamic because of an earlier call nor make it so for the
    next one.
    """
    history = get_code_state()
    before = copy.deepcopy(dict(history))
    history.clear()
    try:
        yield
    finally:
        history.clear()
        history.update(before)
