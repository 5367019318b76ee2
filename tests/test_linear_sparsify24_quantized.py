"""The 8-bit linear layer that packs 2:4, and scales that are predicted from norms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inductor_sparse import formats, ops, reference
from inductor_sparse.errors import SparseError, SparseShapeError
from inductor_sparse.reference import quantized

OP = torch.ops.inductor_sparse.linear_sparsify24_quantized
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
INF, NAN = math.inf, math.nan


def operands(
    x: Tensor, w1: Tensor, bias: Tensor | None = None, activation: str = "relu2"
) -> tuple[Any, ...]:
    """Arguments of the op, with scales that are predicted."""
    x8, x_scale = reference.quantize_rows(x, E4M3)
    w8, w_scale, norm = reference.quantized_weight(w1, w1.shape, w1.stride(), 0, E4M3)
    scale = reference.predicted_scale(x8, x_scale, norm, bias, activation)
    return (x8, x_scale, w8, w_scale, bias, scale, activation, "largest")


def sample(bias: bool = True, activation: str = "relu2") -> tuple[Any, ...]:
    torch.manual_seed(0)
    x, w1, b = (torch.randn(size).to(BF16) for size in ((9, 70), (66, 70), (66,)))
    return operands(x, w1, b if bias else None, activation)


def hidden(arguments: tuple[Any, ...]) -> Tensor:
    """The activation in float64, of what the 8-bit operands mean."""
    x8, x_scale, w8, w_scale, bias, _, activation, _ = arguments
    z = (x8.double() * x_scale[:, None]) @ (w8.double() * w_scale[:, None]).T
    return reference.ACTIVATIONS[activation](z if bias is None else z + bias.double())


def two_of_four(values_MK: Tensor) -> Tensor:
    """The two largest of every four values ``[M, K]``, the last ones padded."""
    padded = torch.nn.functional.pad(values_MK, (0, -values_MK.shape[1] % 4))
    return padded.unflatten(1, (-1, 4)).topk(2).values


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_it_is_the_packed_layer_with_the_given_scale(
    bias: bool, activation: str
) -> None:
    arguments = sample(bias, activation)
    values, metadata = OP(*arguments)
    exact, scale = hidden(arguments), arguments[5][:, None].double()
    got = formats.unpack(values, metadata, 66).double() * scale
    # Half a step of e4m3, and what rounding to bfloat16, and its square, add.
    allowed = exact / 16 * 1.2 + scale * 2.0**-10
    kept = got != 0
    assert ((got - exact).abs() <= allowed)[kept].all()
    # The two largest of four, unless rounding made another one as large.
    largest, found = (two_of_four(values) for values in (exact, got))
    allowed = largest / 16 * 1.2 + scale[:, None] * 2.0**-10
    assert ((found - largest).abs() <= allowed).all()
    assert two_of_four(kept.double()).sum() == kept.sum() > 0


def test_energy_is_of_the_right_kind() -> None:
    with pytest.raises(SparseShapeError, match=r"energy is torch\.float32"):
        OP(*sample(), torch.zeros(256, 2))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool) -> None:
    energy = torch.zeros(ops.ENERGY_SLOTS, 2, dtype=torch.float64)
    # The schema check multiplies its inputs, which torch cannot do in e4m3.
    utils = (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    for more in ((), (energy,)):
        torch.library.opcheck(OP.default, (*sample(bias), *more), test_utils=utils)


def test_there_is_no_gradient() -> None:
    arguments = sample()
    arguments[4].requires_grad_()
    values, _ = OP(*arguments)
    with pytest.raises(
        SparseError, match="linear_sparsify24_quantized has no gradient"
    ):
        values.float().sum().backward()


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, lambda t: t.float(), "x is torch.float32, expected torch.float8_e4m3fn"),
        (0, lambda t: t.view(torch.int8), "x is torch.int8, expected"),
        (1, lambda t: t[1:], r"x_scale has shape \(8,\), expected \[9\]"),
        (2, lambda t: t[:, 1:], r"w1 has shape \(66, 69\), expected \[K, 70\]"),
        (3, lambda t: t.double(), "w1_scale is torch.float64, expected torch.float32"),
        (4, lambda t: t.float(), "bias is torch.float32, expected torch.bfloat16"),
        (5, lambda t: t[None], r"row_scale has shape \(1, 9\), expected \[9\]"),
        (6, lambda t: "gelu", "unknown activation 'gelu'"),
        (7, lambda t: "smallest", "unknown select 'smallest'"),
    ],
)
def test_what_it_refuses(position: int, wrong: Any, message: str) -> None:
    arguments = list(sample())
    arguments[position] = wrong(arguments[position])
    with pytest.raises(SparseShapeError, match=message):
        OP(*arguments)


@given(
    exponent=st.integers(-60, 20),
    spread=st.floats(0, 3),
    shift=st.floats(-4, 4),
    activation=st.sampled_from(["relu", "relu2"]),
    aligned=st.booleans(),
)
def test_no_value_exceeds_the_bound(
    exponent: int, spread: float, shift: float, activation: str, aligned: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w1 = (torch.randn(n, 32, generator=generator) for n in (5, 24))
    x, w1 = (
        t * torch.exp(spread * torch.randn(t.shape, generator=generator))
        for t in (x, w1)
    )
    if aligned:  # the bound is met
        w1[3] = x[1]
    x = x * 2.0**exponent
    bias = (torch.randn(24, generator=generator) + shift) * x.abs().mean()
    arguments = operands(x, w1.to(BF16), bias.to(BF16), activation)
    bound = arguments[5].double() * 448
    assert (hidden(arguments).amax(1) <= bound * (1 + 1e-5)).all()
    assert arguments[5].isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_the_exponent_makes_up_for_a_bound_that_is_not_close(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w1 = (torch.randn(n, 1024, generator=generator) for n in (16, 1024))
    arguments = operands(x, w1.to(BF16), None, activation)
    values, metadata = OP(*arguments)
    predicted = formats.unpack(values, metadata, 1024).double()
    predicted *= arguments[5][:, None]
    z = reference.scaled_linear(*arguments[:5])
    exact, index, scale = reference.sparsify24_quantized(z, activation, "largest", E4M3)
    assert (arguments[5] / scale).amin() > (7 if activation == "relu" else 50)
    exact = formats.unpack(exact, formats.pack_index(index, E4M3), 1024).double()
    exact *= scale[:, None]
    kept = torch.ops.inductor_sparse.sparsify24(z, activation, "largest")
    wide = formats.unpack(*kept, 1024).double()
    errors = [float((a - wide).norm() / wide.norm()) for a in (exact, predicted)]
    assert errors[1] < 1.15 * errors[0] < 0.031


def test_the_bound_is_met_by_rows_that_are_parallel() -> None:
    x = torch.full((1, 64), 3.0)
    *_, scale, _, _ = operands(x, torch.cat((x / 3, -x, x / 12)), activation="relu2")
    torch.testing.assert_close(scale, torch.tensor([(3.0 * 3 * 64) ** 2 / 448]))


def test_a_row_of_zeros_and_the_smallest_scale() -> None:
    x = torch.zeros(3, 16)
    x[1, 0], x[2, 0] = 2.0**-70, 1.0
    *_, scale, _, _ = arguments = operands(x, torch.ones(4, 16), activation="relu2")
    assert scale[:2].tolist() == [quantized.SMALLEST_SCALE] * 2
    values, _ = OP(*arguments)
    assert not values[:2].float().any()
    assert values[2, :2].float().tolist() == [448 / 16] * 2  # one of 16: 1 / norm²


def test_a_bias_below_zero_lowers_the_bound_and_never_blocks_a_row() -> None:
    x, w1 = torch.ones(1, 16), torch.ones(4, 16)
    low = torch.tensor([-2.0, -INF, -3.0, -4.0], dtype=BF16)
    *_, scale, _, _ = operands(x, w1, low, "relu")
    torch.testing.assert_close(scale, torch.tensor([14.0 / 448]))
    *_, scale, _, _ = operands(x, w1, low - 20, "relu")
    assert scale.tolist() == [quantized.SMALLEST_SCALE]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "w1", "bias"])
def test_what_is_not_finite_makes_no_finite_result(bad: float, where: str) -> None:
    """As with scales from the largest value: see ``sparsify24_quantized``."""
    torch.manual_seed(0)
    x, w1, bias = torch.randn(3, 16), torch.randn(8, 16), torch.zeros(8).to(BF16)
    {"x": x[1], "w1": w1[2], "bias": bias}[where][5] = bad
    arguments = operands(x, w1, bias)
    values, metadata = OP(*arguments)
    w2 = torch.ones(8, 1).to(E4M3)
    y = ops.sparse24_mm(values, metadata, w2, arguments[5], out_dtype=torch.float32)
    harmless = (where, bad) == ("bias", -INF)
    rows = 0 if harmless else 1 if where == "x" else 3
    assert int((~y.isfinite()).sum()) == rows
