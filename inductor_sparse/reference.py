"""The eager definition of every op: the specification, and the oracle of the tests.

Nothing here is fast.  Every kernel agrees with these functions: bit for bit where
values are only selected, within an error budget taken from float64 elsewhere.  Three
rules hold for all of them:

- **A zero is skipped.**  A zero activation never touches the weight, so 0 * Inf and
  0 * NaN contribute nothing.  NaN and Inf in the activation propagate as usual.
- **Rounding follows eager.**  An activation, and the product of a gate, is rounded to
  the dtype of its input before it is multiplied; sums of bfloat16 and float16 products
  are accumulated in float32 and rounded once.
- **-0.0 is a zero.**

The 2:4 functions speak of a plain ``index`` tensor; how it becomes metadata words is
the subject of :mod:`inductor_sparse.formats`.

Shape legend: ``B`` batch, ``M`` rows (tokens), ``K`` reduction, ``N`` output features,
``D`` model features, ``F`` hidden features, ``G`` groups of four along K, ``S`` stored
values of a row under 2:4, half of K rounded up to a multiple of 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inductor_sparse.errors import SparseShapeError

DTYPES: tuple[torch.dtype, ...] = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)
"""The dtypes of activations and weights for which the ops are defined."""

SELECTS: tuple[str, ...] = ("largest", "largest_abs")
"""How 2:4 selection compares: by value (non-negative input) or by magnitude."""

GROUP = 4
KEPT = 2
BLOCK = 64


def _relu2(z: Tensor) -> Tensor:
    return torch.relu(z).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "relu2": _relu2,
}
"""The activations by name; every one maps zero to zero and NaN to NaN."""


def check_activation(op: str, activation: str) -> None:
    """Raise :class:`SparseShapeError` unless ``activation`` is a key of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise SparseShapeError(
            f"{op}: unknown activation {activation!r}; use one of "
            f"{', '.join(ACTIVATIONS)}"
        )


def check_select(op: str, select: str) -> None:
    """Raise :class:`SparseShapeError` unless ``select`` is one of :data:`SELECTS`."""
    if select not in SELECTS:
        raise SparseShapeError(
            f"{op}: unknown select {select!r}; use one of {', '.join(SELECTS)}"
        )


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Raise :class:`SparseShapeError` unless all have one and the same of DTYPES."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    for name, tensor in tensors.items():
        if tensor.dtype.is_complex:
            raise SparseShapeError(
                f"{op}: {name} is {tensor.dtype}, and ReLU has no meaning for complex "
                f"numbers; pass real tensors ({names}) or keep the dense matmul"
            )
        if tensor.dtype not in DTYPES:
            raise SparseShapeError(
                f"{op}: {name} is {tensor.dtype}, supported are {names}; convert it, "
                f"e.g. {name}.to(torch.float32), or keep the dense matmul"
            )
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise SparseShapeError(f"{op}: dtypes differ ({found}); cast them to one dtype")


def check_shape(op: str, name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raise :class:`SparseShapeError` unless ``tensor`` has the ``expected`` shape.

    An ``int`` must be met; a ``str`` names a size that may be anything.
    """
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(
        not isinstance(want, str) and got != want
        for got, want in zip(shape, expected, strict=True)
    ):
        wanted = ", ".join(str(size) for size in expected)
        raise SparseShapeError(f"{op}: {name} has shape {shape}, expected [{wanted}]")


def check_activation_spmm(z: Tensor, w: Tensor, activation: str) -> None:
    """Raise :class:`SparseShapeError` outside the domain of :func:`activation_spmm`."""
    op = "activation_spmm"
    check_activation(op, activation)
    check_dtypes(op, z=z, w=w)
    if z.ndim == 3:
        check_shape(op, "z", z, "B", "M", "K")
        check_shape(op, "w", w, z.shape[0], z.shape[2], "N")
    elif z.ndim == 2:
        check_shape(op, "w", w, z.shape[1], "N")
    else:
        raise SparseShapeError(
            f"{op}: z has shape {tuple(z.shape)}, expected [M, K] or [B, M, K]; "
            f"flatten the leading axes, e.g. z.flatten(0, -2)"
        )


def check_glu_spmm(
    gate: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, activation: str
) -> None:
    """Raise :class:`SparseShapeError` outside the domain of :func:`glu_spmm`."""
    op = "glu_spmm"
    check_activation(op, activation)
    check_dtypes(op, gate=gate, x=x, w_up=w_up, w_down=w_down)
    check_shape(op, "gate", gate, "M", "F")
    check_shape(op, "x", x, gate.shape[0], "D")
    check_shape(op, "w_up", w_up, gate.shape[1], x.shape[1])
    check_shape(op, "w_down", w_down, gate.shape[1], "N")


def check_sparsify24(x: Tensor, activation: str, select: str) -> None:
    """Raise :class:`SparseShapeError` outside the domain of :func:`sparsify24`."""
    op = "sparsify24"
    check_activation(op, activation)
    check_select(op, select)
    check_dtypes(op, x=x)
    check_shape(op, "x", x, "M", "K")


def check_sparse24_mm(
    x24: Tensor, w: Tensor, row_scale: Tensor | None, col_scale: Tensor | None
) -> None:
    """Raise :class:`SparseShapeError` outside the domain of :func:`sparse24_mm`.

    Only the number of rows of ``x24`` is looked at, so the stored values do as well.
    """
    op = "sparse24_mm"
    check_dtypes(op, values=x24, w=w)
    check_shape(op, "values", x24, "M", "S")
    check_shape(op, "w", w, "K", "N")
    scales = {
        "row_scale": (row_scale, x24.shape[0]),
        "col_scale": (col_scale, w.shape[1]),
    }
    for name, (scale, size) in scales.items():
        if scale is not None:
            check_dtypes(op, **{name: scale})
            check_shape(op, name, scale, size)


def activation(z: Tensor, name: str) -> Tensor:
    """``act(z)``, rounded to ``z.dtype``; NaN stays NaN.

    Args:
        z: any shape, one of :data:`DTYPES`.
        name: ``identity``, ``relu`` or ``relu2`` (``relu(z) ** 2``, So et al.,
            "Primer", 2021, https://arxiv.org/abs/2109.08668).

    Raises:
        SparseShapeError: ``name`` is unknown, or the dtype is not supported.

    Example:
        >>> activation(torch.tensor([-2.0, 0.5, 3.0]), "relu2")
        tensor([0.0000, 0.2500, 9.0000])
    """
    check_activation("activation", name)
    check_dtypes("activation", z=z)
    return ACTIVATIONS[name](z)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of products of ``dtype`` are accumulated."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _skipping_matmul(a: Tensor, w: Tensor) -> Tensor:
    """``a @ w`` over the non-zeros of ``a``, in the accumulation dtype.

    A zero that met an Inf or NaN always shows as a NaN of the dense product, so only
    rows that hold one are summed again, over their non-zeros alone.
    """
    wide = accumulation_dtype(a.dtype)
    a, w = a.to(wide), w.to(wide)
    y = a @ w
    for *batch, row in y.isnan().any(-1).nonzero().tolist():
        a_K, w_KN = a[(*batch, row)], w[tuple(batch)]
        active = a_K != 0
        y[(*batch, row)] = a_K[active] @ w_KN[active]
    return y


def activation_spmm(z: Tensor, w: Tensor, activation: str) -> Tensor:
    """``act(z) @ w``, skipping the zeros of ``act(z)``.

    Args:
        z: ``[M, K]`` or ``[B, M, K]``, one of :data:`DTYPES`, any strides.
        w: ``[K, N]`` or ``[B, K, N]``, same dtype, any strides.
        activation: a key of :data:`ACTIVATIONS`.

    Returns:
        ``[M, N]`` or ``[B, M, N]``, contiguous, ``z.dtype``.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, or the activation is unknown.

    Example:
        >>> w = torch.tensor([[float("inf")], [2.0]])
        >>> activation_spmm(torch.tensor([[-1.0, 3.0]]), w, "relu2")
        tensor([[18.]])
    """
    check_activation_spmm(z, w, activation)
    a = ACTIVATIONS[activation](z)
    return _skipping_matmul(a, w).to(z.dtype).contiguous()


def glu_spmm(
    gate: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, activation: str
) -> Tensor:
    """``(act(gate) * (x @ w_upᵀ)) @ w_down`` over the neurons whose gate is open.

    ``x @ w_upᵀ`` is defined only where ``act(gate)`` is not zero: whatever ``w_up``
    holds in the row of a closed neuron is ignored.  A hidden value that becomes zero
    for another reason is skipped in the second product as well.

    Args:
        gate: ``[M, F]``, before the activation, one of :data:`DTYPES`, any strides.
        x: ``[M, D]``, same dtype, any strides.
        w_up: ``[F, D]``, same dtype, any strides.
        w_down: ``[F, N]``, same dtype, any strides.
        activation: a key of :data:`ACTIVATIONS`.

    Returns:
        ``[M, N]``, contiguous, ``gate.dtype``.

    Raises:
        SparseShapeError: shapes or dtypes do not fit, or the activation is unknown.
    """
    check_glu_spmm(gate, x, w_up, w_down, activation)
    wide = accumulation_dtype(gate.dtype)
    a_MF = ACTIVATIONS[activation](gate)
    up_MF = (x.to(wide) @ w_up.to(wide).mT).to(gate.dtype)
    hidden_MF = torch.where(a_MF == 0, torch.zeros_like(a_MF), a_MF * up_MF)
    return _skipping_matmul(hidden_MF, w_down).to(gate.dtype).contiguous()


def row_major_weight(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """A contiguous copy, in ``dtype``, of a strided window into ``weight``.

    The window is ``weight.as_strided(size, stride)`` moved by ``storage_offset``
    elements from the first element of ``weight``.

    Args:
        weight: any shape, strides and dtype.
        size: shape of the window and of the result.
        stride: strides of the window, in elements of ``weight``.
        storage_offset: elements from the first element of ``weight``.
        dtype: dtype of the result.

    Returns:
        A new contiguous tensor of ``size`` and ``dtype``, never an alias of ``weight``.

    Raises:
        SparseShapeError: ``size`` and ``stride`` differ in length, or the window leaves
            the memory between the first and the last element of ``weight``.

    Example:
        >>> weight = torch.arange(6).view(2, 3)
        >>> row_major_weight(weight, [3, 2], [1, 3], 0, torch.float32)
        tensor([[0., 3.],
                [1., 4.],
                [2., 5.]])
    """
    check_window(weight, size, stride, storage_offset)
    window = weight.as_strided(size, stride, weight.storage_offset() + storage_offset)
    return window.to(dtype, copy=True, memory_format=torch.contiguous_format)


def strided_extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements of memory from the first to the last element, both included."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def check_window(
    weight: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int
) -> None:
    """Raise :class:`SparseShapeError` unless the window lies within the weight."""
    op = "row_major_weight"
    if len(size) != len(stride):
        raise SparseShapeError(
            f"{op}: size {list(size)} and stride {list(stride)} differ in length"
        )
    if any(number < 0 for number in (*size, *stride, storage_offset)):
        raise SparseShapeError(
            f"{op}: size {list(size)}, stride {list(stride)} and offset "
            f"{storage_offset} must not be negative"
        )
    extent = strided_extent(size, stride)
    have = strided_extent(weight.shape, weight.stride())
    if storage_offset + extent > have:
        raise SparseShapeError(
            f"{op}: a window of size {list(size)}, stride {list(stride)} at offset "
            f"{storage_offset} needs {storage_offset + extent} elements, the weight "
            f"spans {have}; pass the tensor that the window was taken from"
        )


def _groups(a_MK: Tensor) -> Tensor:
    """``[M, G, 4]``: K padded with zeros to a multiple of 64, -0.0 replaced by 0.0."""
    M, K = a_MK.shape
    padded = math.ceil(K / BLOCK) * BLOCK
    a_MK = torch.where(a_MK == 0, torch.zeros_like(a_MK), a_MK)
    a_MK = torch.nn.functional.pad(a_MK, (0, padded - K))
    return a_MK.reshape(M, padded // GROUP, GROUP)


def _top_two(key_MG4: Tensor) -> Tensor:
    """Positions of the two largest of four, ascending: ``[M, G, 2]`` uint8.

    Each pair is compared once; the later element wins only if strictly larger, so that
    the result is the same on every device.  Float comparisons drop NaN: hence the mask.
    """
    keys, nans = key_MG4.unbind(-1), key_MG4.isnan().unbind(-1)
    losses = [torch.zeros_like(key, dtype=torch.uint8) for key in keys]
    for i in range(GROUP):
        for j in range(i + 1, GROUP):
            later_wins = (keys[j] > keys[i]) | (nans[j] & ~nans[i])
            losses[i] += later_wins
            losses[j] += ~later_wins
    kept = [(loss < KEPT).to(torch.uint8) * i for i, loss in enumerate(losses)]
    total_MG = kept[1] + kept[2] + kept[3]
    last_MG = torch.stack(kept).amax(0)
    return torch.stack((total_MG - last_MG, last_MG), dim=-1)


def _select(a_MG4: Tensor, select: str) -> Tensor:
    return _top_two(a_MG4.abs() if select == "largest_abs" else a_MG4)


def sparsify24(x: Tensor, activation: str, select: str) -> tuple[Tensor, Tensor]:
    """Keep two of every four consecutive values of ``act(x)`` along K.

    K is padded with zeros to a multiple of 64.  A group with at most two non-zeros
    loses nothing under ``largest_abs``, nor under ``largest`` without negative values.
    Ties go to the lower position; NaN is larger than every number; zeros are stored as
    +0.0; where a group has fewer than two non-zeros, zeros fill the pair.

    Args:
        x: ``[M, K]``, one of :data:`DTYPES`, any strides.
        activation: a key of :data:`ACTIVATIONS`.
        select: ``largest`` compares values (meant for non-negative ones: 0 beats -1),
            ``largest_abs`` compares magnitudes.

    Returns:
        ``(values, index)``, both contiguous ``[M, S]`` with ``S = 32 * ceil(K / 64)``:
        ``values`` in ``x.dtype``; ``index`` in uint8, the positions 0..3 within the
        group.  Entries ``2g`` and ``2g + 1`` belong to group ``g``, in its order.

    Raises:
        SparseShapeError: not 2-D, dtype not supported, or an unknown name.

    Example:
        >>> x = torch.tensor([[1.0, -5.0, 2.0, 2.0]])
        >>> values, index = sparsify24(x, "relu", "largest")
        >>> values[0, :2], index[0, :2]
        (tensor([2., 2.]), tensor([2, 3], dtype=torch.uint8))

    Source:
        Haziza et al., "Accelerating Transformer Inference and Training with 2:4
        Activation Sparsity", 2025, https://arxiv.org/abs/2503.16672.
    """
    check_sparsify24(x, activation, select)
    a_MG4 = _groups(ACTIVATIONS[activation](x))
    index_MG2 = _select(a_MG4, select)
    values_MG2 = a_MG4.gather(-1, index_MG2.long())
    return values_MG2.flatten(1), index_MG2.flatten(1)


def sparse24_mm(
    x24: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
) -> Tensor:
    """``row_scale * (x24 @ w) * col_scale``, ``x24`` being the unpacked 2:4 operand.

    Scales are applied in the accumulation dtype, before the one rounding.  Where ``w``
    holds Inf or NaN under a *stored* zero the result of a kernel is not specified:
    tensor cores multiply what is stored; this function skips it.

    Args:
        x24: ``[M, K]`` (see :func:`inductor_sparse.formats.unpack`), one of DTYPES.
        w: ``[K, N]``, same dtype, any strides.
        row_scale: ``[M]`` in any of :data:`DTYPES`, or None.
        col_scale: ``[N]`` in any of :data:`DTYPES`, or None.

    Returns:
        ``[M, N]``, contiguous, ``x24.dtype``.

    Raises:
        SparseShapeError: shapes or dtypes do not fit.
    """
    check_sparse24_mm(x24, w, row_scale, col_scale)
    check_shape("sparse24_mm", "w", w, x24.shape[1], "N")
    y_MN = _skipping_matmul(x24, w)
    if row_scale is not None:
        y_MN = y_MN * row_scale.to(y_MN.dtype)[:, None]
    if col_scale is not None:
        y_MN = y_MN * col_scale.to(y_MN.dtype)
    return y_MN.to(x24.dtype).contiguous()


def dropped_energy(x: Tensor, activation: str, select: str) -> float:
    """Fraction of the sum of squares of ``act(x)`` that 2:4 selection drops, in [0, 1].

    Args:
        x: ``[..., K]``, one of :data:`DTYPES`; groups are formed along K.
        activation: a key of :data:`ACTIVATIONS`.
        select: one of :data:`SELECTS`.

    Returns:
        0.0 for a tensor without energy; NaN if ``act(x)`` holds NaN or Inf.

    Raises:
        SparseShapeError: dtype not supported, no axis, or an unknown name.

    Example:
        >>> dropped_energy(torch.tensor([3.0, 4.0, 12.0, 0.0]), "relu", "largest")
        0.05325443786982249
    """
    x_MK = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.ndim else x
    check_sparsify24(x_MK, activation, select)
    a_MG4 = _groups(ACTIVATIONS[activation](x_MK)).double()
    # Only what is dropped is summed, so that a loss of zero is exactly zero.
    dropped_MG4 = a_MG4.scatter(-1, _select(a_MG4, select).long(), 0.0)
    total = a_MG4.square().sum()
    return float(dropped_MG4.square().sum() / total) if total != 0 else 0.0


def density(x: Tensor) -> float:
    """Fraction of elements of ``x`` that are not zero, in [0, 1]; 0.0 if it is empty.

    Example:
        >>> density(torch.tensor([0.0, -0.0, float("nan"), 2.0]))
        0.5
    """
    return float(x.count_nonzero()) / x.numel() if x.numel() else 0.0
