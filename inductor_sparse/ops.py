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

from inductor_sparse import formats, reference
from inductor_sparse.errors import SparseError, SparseShapeError

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
    "sparsify24": (
        "(Tensor x, str activation, str select, Tensor? energy=None) "
        "-> (Tensor, Tensor)"
    ),
    "sparsify24_quantized": (
        "(Tensor x, str activation, str select, ScalarType dtype, "
        "Tensor? energy=None) -> (Tensor, Tensor, Tensor)"
    ),
    "linear_sparsify24": (
        "(Tensor x, Tensor w1, Tensor? bias, str activation, str select, "
        "Tensor? energy=None) -> (Tensor, Tensor)"
    ),
    "quantize_rows": "(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    "quantized_weight": (
        "(Tensor weight, SymInt[] size, SymInt[] stride, SymInt storage_offset, "
        "ScalarType dtype) -> (Tensor, Tensor)"
    ),
    "sparse24_mm": (
        "(Tensor values, Tensor metadata, Tensor w, Tensor? row_scale=None, "
        "Tensor? col_scale=None, *, ScalarType? out_dtype=None) -> Tensor"
    ),
}
"""The schema of each op, without its name."""

COUNTERS = ("calls", "dense_calls", "kept", "elements")
"""What a kernel counts of its site: its calls, those too dense to skip, and over all of
them the activations that were not zero and all activations.  On a GPU only the latter
two, of neurons: those that any token of a program needs, and all that there are."""

ENERGY = ("kept", "total")
"""What a kernel that selects 2:4 sums of its site, in float64: the squares of the kept
and of all activated values.  Their ratio is the share of the energy that survives."""

ENERGY_SLOTS = 256
"""Rows of a tensor of energies.  Program ``i`` of a kernel adds to row ``i %`` this
number, so that its atomics rarely meet; the sum over the rows is what counts.  Of a
large matrix a kernel may take a fixed part of the tiles for both sums."""


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

    A kernel for a device keeps them per site.  ``anchor`` is any input of the graph on
    the device they belong on: it keeps constant folding away.
    """
    return anchor.new_zeros((ENERGY_SLOTS, len(ENERGY)), dtype=torch.float64)


def check_energy(op: str, energy: Tensor | None) -> None:
    """Raise :class:`SparseShapeError` unless it is None or fit to be added to."""
    if energy is None:
        return
    reference.check_shape(op, "energy", energy, ENERGY_SLOTS, len(ENERGY))
    remedy = f"take it from torch.ops.{NAMESPACE}.site_energy"
    if energy.dtype != torch.float64:
        raise SparseShapeError(
            f"{op}: energy is {energy.dtype}, expected torch.float64; {remedy}"
        )
    if not energy.is_contiguous():  # kernels add at 2 * slot, whatever the strides
        raise SparseShapeError(
            f"{op}: energy has strides {tuple(energy.stride())}, expected a "
            f"contiguous tensor; {remedy}"
        )


def sparsify24(
    x: Tensor, activation: str, select: str, energy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select two of every four values of ``act(x)`` and pack them.

    The selection is that of :func:`inductor_sparse.reference.sparsify24`, the result
    the ``(values, metadata)`` of :mod:`inductor_sparse.formats`.

    Args:
        x: as there.
        activation: as there.
        select: as there.
        energy: from ``site_energy``: a kernel for a device adds to it, the eager
            definition sums nothing.

    Raises:
        SparseShapeError: not 2-D, dtype not supported, or an unknown name.
    """
    check_energy("sparsify24", energy)
    values, index = reference.sparsify24(x, activation, select)
    return values, formats.pack_index(index, x.dtype)


def sparsify24_quantized(
    x: Tensor,
    activation: str,
    select: str,
    dtype: torch.dtype,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select two of every four values of ``act(x)``, quantize them by rows, and pack.

    See :func:`inductor_sparse.reference.sparsify24_quantized` for the meaning, and
    :func:`sparsify24` for ``energy``.

    Returns:
        ``(values [M, S] of dtype, metadata, row_scale [M] float32)``.

    Raises:
        SparseShapeError: not 2-D, dtype not supported, or an unknown name.
    """
    check_energy("sparsify24_quantized", energy)
    values, index, row_scale = reference.sparsify24_quantized(
        x, activation, select, dtype
    )
    return values, formats.pack_index(index, dtype), row_scale


def linear_sparsify24(
    x: Tensor,
    w1: Tensor,
    bias: Tensor | None,
    activation: str,
    select: str,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``sparsify24(linear(x, w1, bias), activation, select)``, by definition.

    The linear layer is rounded to its dtype before the activation.  Its rounding
    differs between kernels, and where that makes or breaks a tie so does the selection.

    Args:
        x: ``[M, D]``, one of DTYPES, any strides.
        w1: ``[K, D]``, same dtype, any strides.
        bias: ``[K]``, same dtype, or None.
        activation: as for :func:`sparsify24`.
        select: as for :func:`sparsify24`.
        energy: as for :func:`sparsify24`.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, or an unknown name.
    """
    reference.check_linear_sparsify24(x, w1, bias, activation, select)
    z_MK = torch.nn.functional.linear(x, w1, bias)
    # Through the dispatcher: a device may have a kernel for this half alone.
    op = torch.ops.inductor_sparse.sparsify24
    return op(z_MK, activation, select, energy)


def sparse24_mm(
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply a packed 2:4 operand by ``w [K, N]``; ``K`` is taken from ``w``.

    See :func:`inductor_sparse.reference.sparse24_mm` for the meaning and the scales.

    Raises:
        SparseShapeError: shapes or dtypes do not fit.
    """
    reference.check_sparse24_mm(values, w, row_scale, col_scale, out_dtype)
    dense = formats.unpack(values, metadata, w.shape[0])
    return reference.sparse24_mm(dense, w, row_scale, col_scale, out_dtype=out_dtype)


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


def _new_packed(
    x: Tensor, rows: int, features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Uninitialized ``(values, metadata)`` on the device of ``x``."""
    values = x.new_empty(formats.values_shape(rows, features), dtype=dtype)
    metadata = x.new_empty(formats.metadata_shape(rows, features), dtype=torch.int32)
    return values, metadata


def _fake_sparsify24(
    x: Tensor, activation: str, select: str, energy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_energy("sparsify24", energy)
    reference.check_sparsify24(x, activation, select)
    rows, features = x.shape
    return _new_packed(x, rows, features, x.dtype)


def _fake_sparsify24_quantized(
    x: Tensor,
    activation: str,
    select: str,
    dtype: torch.dtype,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_energy("sparsify24_quantized", energy)
    reference.check_sparsify24_quantized(x, activation, select, dtype)
    rows, features = x.shape
    row_scale = x.new_empty(rows, dtype=torch.float32)
    return *_new_packed(x, rows, features, dtype), row_scale


def _fake_linear_sparsify24(
    x: Tensor,
    w1: Tensor,
    bias: Tensor | None,
    activation: str,
    select: str,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_energy("linear_sparsify24", energy)
    reference.check_linear_sparsify24(x, w1, bias, activation, select)
    return _new_packed(x, x.shape[0], w1.shape[0], x.dtype)


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
) -> tuple[Tensor, Tensor]:
    reference.check_window(weight, size, stride, storage_offset)
    return _fake_quantize_rows(weight.new_empty(size), dtype)


def _fake_sparse24_mm(
    values: Tensor,
    metadata: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    reference.check_sparse24_mm(values, w, row_scale, col_scale, out_dtype)
    formats.check_packed(values, metadata, w.shape[0])
    dtype = reference.result_dtype24(values.dtype, out_dtype)
    return values.new_empty((values.shape[0], w.shape[1]), dtype=dtype)


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
            f"torch.ops.{NAMESPACE}.activation_spmm of a weight as it is, which is "
            f"exact and has one"
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
    (sparsify24, _fake_sparsify24),
    (sparsify24_quantized, _fake_sparsify24_quantized),
    (linear_sparsify24, _fake_linear_sparsify24),
    (reference.quantize_rows, _fake_quantize_rows),
    (sparse24_mm, _fake_sparse24_mm),
):
    _register(_eager.__name__, _eager, _fake, _no_gradient(_eager.__name__))
