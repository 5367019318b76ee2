"""The ops ``torch.ops.inductor_sparse.*``: schemas, fakes, gradients, default kernels.

Importing this module registers them, once for the life of the process.  The default
kernel of each op is its eager definition from :mod:`inductor_sparse.reference`, under
the ``CompositeExplicitAutograd`` key: one registered for ``CPU`` or ``CUDA`` wins.

Gradients are those of the dense product, so that training is not changed by a rewrite.
The 2:4 ops, ``quantize_rows`` and ``activation_spmm`` of 8-bit rows have none, and say
so when one is asked for: what they drop is lost to a gradient too, and training through
them would be another model.

Shape legend: as in :mod:`inductor_sparse.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from inductor_sparse import ops24, reference
from inductor_sparse.errors import SparseError
from inductor_sparse.ops24 import ENERGY as ENERGY
from inductor_sparse.ops24 import ENERGY_SLOTS as ENERGY_SLOTS
from inductor_sparse.ops24 import check_energy as check_energy
from inductor_sparse.ops24 import linear_sparsify24 as linear_sparsify24
from inductor_sparse.ops24 import (
    linear_sparsify24_quantized as linear_sparsify24_quantized,
)
from inductor_sparse.ops24 import sparse24_mm as sparse24_mm
from inductor_sparse.ops24 import sparsify24 as sparsify24
from inductor_sparse.ops24 import sparsify24_quantized as sparsify24_quantized

NAMESPACE = "inductor_sparse"

SCHEMAS: dict[str, str] = {
    "activation_spmm": (
        "(Tensor z, Tensor w, str activation, Tensor? counters=None, "
        "Tensor? w_scale=None) -> Tensor"
    ),
    "glu_spmm": (
        "(Tensor gate, Tensor x, Tensor w_up, Tensor w_down, str activation, "
        "Tensor? counters=None) -> Tensor"
    ),
    "row_major_weight": (
        "(Tensor weight, SymInt[] size, SymInt[] stride, SymInt storage_offset, "
        "ScalarType dtype) -> Tensor"
    ),
    "site_counters": (
        "(Tensor anchor, str site, float max_density=1.0, int tokens=1) -> Tensor"
    ),
    "site_energy": "(Tensor anchor, str site) -> Tensor",
    "quantize_rows": "(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    "quantized_weight": (
        "(Tensor weight, SymInt[] size, SymInt[] stride, SymInt storage_offset, "
        "ScalarType dtype) -> (Tensor, Tensor, Tensor)"
    ),
    **ops24.SCHEMAS,
}
"""The schema of each op, without its name."""

COUNTERS = ("calls", "dense_calls", "kept", "elements")
"""What a kernel counts of its site: its calls, those too dense to skip, and over all of
them the activations that were not zero and all activations.  On a GPU only the latter
two, of neurons: those that any token of a program needs, and all that there are."""


def activation_spmm(
    z: Tensor,
    w: Tensor,
    activation: str,
    counters: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> Tensor:
    """``act(z) @ w``: see :func:`inductor_sparse.reference.activation_spmm`.

    Args:
        z: as there.
        w: as there.
        activation: as there.
        counters: ``[len(COUNTERS)]`` int64 from ``site_counters``: a compiled kernel
            adds to them, the eager definition counts nothing.
        w_scale: as there; there is no gradient then.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, an unknown activation, or a scale
            that is missing or superfluous.
    """
    return reference.activation_spmm(z, w, activation, w_scale)


def glu_spmm(
    gate: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    counters: Tensor | None = None,
) -> Tensor:
    """As :func:`inductor_sparse.reference.glu_spmm`; a GPU adds to ``counters``."""
    return reference.glu_spmm(gate, x, w_up, w_down, activation)


def site_counters(
    anchor: Tensor, site: str, max_density: float = 1.0, tokens: int = 1
) -> Tensor:
    """Counters of a site: ``[len(COUNTERS)]`` int64; new ones at every call.

    The kernels for devices (:mod:`inductor_sparse.runtime.adaptation`) keep them.
    ``anchor`` is any input of the graph on that device: it keeps constant folding away.
    On a GPU skipping loses if ``tokens`` need more than ``max_density`` of the neurons;
    a kernel for a CPU knows for itself.
    """
    return anchor.new_zeros(len(COUNTERS), dtype=torch.int64)


def site_energy(anchor: Tensor, site: str) -> Tensor:
    """Energies of a site: ``[ENERGY_SLOTS, len(ENERGY)]`` float64; new ones every call.

    A kernel for a device keeps them, for each site of a model.  ``anchor`` is any input
    of the graph on the device they belong on: it keeps constant folding away.
    """
    return anchor.new_zeros((ENERGY_SLOTS, len(ENERGY)), dtype=torch.float64)


def _fake_activation_spmm(
    z: Tensor,
    w: Tensor,
    activation: str,
    counters: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> Tensor:
    reference.check_activation_spmm(z, w, activation, w_scale)
    return z.new_empty(*z.shape[:-1], w.shape[-1])


def _fake_glu_spmm(
    gate: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    counters: Tensor | None = None,
) -> Tensor:
    reference.check_glu_spmm(gate, x, w_up, w_down, activation)
    return gate.new_empty(gate.shape[0], w_down.shape[1])


def _fake_row_major_weight(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    reference.check_window(weight, size, stride, storage_offset)
    return weight.new_empty(size, dtype=dtype)


def _fake_quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    reference.check_quantize_rows(x, dtype)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale


def _fake_quantized_weight(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_window(weight, size, stride, storage_offset)
    values, scale = _fake_quantize_rows(weight.new_empty(size), dtype)
    return values, scale, scale.new_empty(())


def _activation_gradient(grad_a: Tensor, z: Tensor, activation: str) -> Tensor:
    """``grad_a * act'(z)``, computed and rounded as eager autograd does."""
    if activation == "identity":
        return grad_a
    r = torch.relu(z)
    if activation == "relu2":
        grad_a = grad_a * (2 * r)
    return torch.ops.aten.threshold_backward(grad_a, r, 0)


def _save_activation_spmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, w, ctx.activation, _, w_scale = inputs
    ctx.scaled = w_scale is not None
    ctx.save_for_backward(z, w)


def _activation_spmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.scaled:
        _no_gradient("activation_spmm with w_scale")(ctx)
    z, w = ctx.saved_tensors
    grad_z = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_z = _activation_gradient(grad @ w.mT, z, ctx.activation)
    if ctx.needs_input_grad[1]:
        grad_w = reference.ACTIVATIONS[ctx.activation](z).mT @ grad
    return grad_z, grad_w, None, None, None


def _save_glu_spmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors)


def _glu_spmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, x, w_up, w_down = ctx.saved_tensors
    need_gate, need_x, need_up, need_down, *_ = ctx.needs_input_grad
    a_MF = reference.ACTIVATIONS[ctx.activation](gate)
    # Recomputed: the forward did not compute all of it, let alone store it.
    up_MF = x @ w_up.mT
    grad_gate = grad_x = grad_up = grad_down = None
    if need_gate or need_x or need_up:
        grad_hidden = grad @ w_down.mT
        grad_up_MF = grad_hidden * a_MF
        if need_gate:
            grad_gate = _activation_gradient(grad_hidden * up_MF, gate, ctx.activation)
        if need_x:
            grad_x = grad_up_MF @ w_up
        if need_up:
            grad_up = grad_up_MF.mT @ x
    if need_down:
        grad_down = (a_MF * up_MF).mT @ grad
    return grad_gate, grad_x, grad_up, grad_down, None, None


def _save_row_major_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, size, stride, storage_offset, _ = inputs
    # Only the geometry: the weight may be updated in place before the backward runs.
    ctx.weight = (weight.shape, weight.stride())
    ctx.window = (size, stride, storage_offset)


def _row_major_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_weight = reference.window_gradient(grad, *ctx.weight, *ctx.window)
    return grad_weight, None, None, None, None


def _no_gradient(op: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise SparseError(
            f"{op} has no gradient; run it under torch.no_grad(), or train with "
            f"torch.ops.{NAMESPACE}.activation_spmm and an unquantized weight, which "
            f"is exact and differentiable"
        )

    return backward


def _register(
    name: str,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    save: Callable[..., None] | None = None,
) -> None:
    """Define one op; without effect if it is defined, so that a reload is harmless.

    The functional ``torch.library`` API ties nothing to the life of this module object.
    """
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        return
    qualname = f"{NAMESPACE}::{name}"
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    torch.library.define(qualname, SCHEMAS[name], tags=tags)
    torch.library.impl(qualname, "CompositeExplicitAutograd", eager)
    torch.library.register_fake(qualname, fake)
    torch.library.register_autograd(qualname, backward, setup_context=save)


_register("site_counters", site_counters, site_counters, _no_gradient("site_counters"))
_register(
    "activation_spmm",
    activation_spmm,
    _fake_activation_spmm,
    _activation_spmm_backward,
    _save_activation_spmm,
)
_register(
    "glu_spmm",
    glu_spmm,
    _fake_glu_spmm,
    _glu_spmm_backward,
    _save_glu_spmm,
)
_register(
    "row_major_weight",
    reference.row_major_weight,
    _fake_row_major_weight,
    _row_major_weight_backward,
    _save_row_major_weight,
)
for _eager, _fake in (
    (site_energy, site_energy),
    (reference.quantized_weight, _fake_quantized_weight),
    (reference.quantize_rows, _fake_quantize_rows),
    *ops24.OPS,
):
    _register(_eager.__name__, _eager, _fake, _no_gradient(_eager.__name__))
