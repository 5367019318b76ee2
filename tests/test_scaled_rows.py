"""``activation_spmm`` of rows of 8 bits, each with a scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_within_budget
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_sparse import lowerings, ops, reference
from inductor_sparse.errors import SparseError, SparseShapeError

OP = getattr(torch.ops, ops.NAMESPACE).activation_spmm
INT8, E4M3 = torch.int8, torch.float8_e4m3fn


def sample(dtype: torch.dtype, z_dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """Arguments of the op: z [5, 48], w [48, 7] and the scales of its rows."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 48, generator=generator).to(z_dtype)
    w = torch.randn(48, 7, generator=generator) * torch.logspace(-3, 3, 48)[:, None]
    values, scale = reference.quantize_rows(w, dtype)
    return [z, values, "relu", None, scale]


@pytest.mark.parametrize("z_dtype", reference.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [INT8, E4M3], ids=str)
def test_opcheck(dtype: torch.dtype, z_dtype: torch.dtype) -> None:
    utils = ["test_autograd_registration", "test_faketensor"]
    utils.append("test_aot_dispatch_dynamic")
    if dtype == INT8:  # the other one multiplies its inputs, and CPUs no float8
        utils.append("test_schema")
    args = tuple(sample(dtype, z_dtype))
    torch.library.opcheck(OP.default, args, test_utils=utils)


@pytest.mark.parametrize("z_dtype", reference.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [INT8, E4M3], ids=str)
def test_it_is_the_product_with_the_scaled_rows(
    dtype: torch.dtype, z_dtype: torch.dtype
) -> None:
    z, w, activation, _, scale = sample(dtype, z_dtype)
    actual = OP(z, w, activation, None, scale)
    exact = z.double().relu() @ (w.double() * scale.double()[:, None])
    wide = reference.accumulation_dtype(z_dtype)
    eager = (z.relu().to(wide) @ (w.to(wide) * scale.to(wide)[:, None])).to(z_dtype)
    assert (actual.dtype, actual.is_contiguous()) == (z_dtype, True)
    assert_within_budget(actual, eager, exact)


def test_a_row_under_a_zero_is_skipped_with_its_scale() -> None:
    z, w, activation, _, scale = sample(E4M3, torch.float32)
    z[:, 3:5], scale[3], w[4, 0] = -1.0, torch.nan, torch.nan
    assert OP(z, w, activation, None, scale).isfinite().all()
    z[2, 3] = 1.0
    assert OP(z, w, activation, None, scale).isnan().all(1).tolist() == [
        False, False, True, False, False
    ]  # fmt: skip


REFUSED: list[tuple[dict[int, Any], str]] = [
    ({4: None}, r"w is torch.int8 and has no w_scale; pass the scales of its rows"),
    ({1: torch.zeros(48, 7)}, r"w is torch.float32 and has a w_scale, which only .*"),
    ({0: torch.zeros(2, 5, 48)}, r"z has shape \(2, 5, 48\), expected \[M, K\]"),
    ({0: torch.zeros(5, 48, dtype=INT8)}, r"z is torch.int8, supported are"),
    ({1: torch.zeros(47, 7, dtype=INT8)}, r"w has shape \(47, 7\), expected \[48, N\]"),
    ({4: torch.zeros(7)}, r"w_scale has shape \(7,\), expected \[48\]"),
    ({4: torch.zeros(48, 1)}, r"w_scale has shape \(48, 1\), expected \[48\]"),
    ({4: torch.zeros(48).half()}, r"w_scale is torch.float16, expected torch.float32"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_is_refused(changed: dict[int, Any], message: str) -> None:
    args = sample(INT8)
    for position, value in changed.items():
        args[position] = value
    with pytest.raises(SparseShapeError, match=f"activation_spmm: {message}"):
        OP(*args)
    with FakeTensorMode() as mode, pytest.raises(SparseShapeError, match=message):
        OP(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))


def test_it_has_no_gradient_and_says_so() -> None:
    z, *rest = sample(INT8, torch.float32)
    out = OP(z.requires_grad_(), *rest)
    message = "activation_spmm with w_scale has no gradient; .* an unquantized weight"
    with pytest.raises(SparseError, match=message):
        out.sum().backward()


def test_a_cpu_runs_the_op_itself() -> None:
    lowerings.register_all()
    args = sample(INT8, torch.float32)
    compiled = torch.compile(lambda *args: OP(*args) + 1)
    torch.testing.assert_close(compiled(*args), OP(*args) + 1)
