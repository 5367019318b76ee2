"""``quantized_weight``: rows of a window of a weight, each with its own scale."""

from __future__ import annotations

import pytest
import torch

from inductor_sparse import ops, reference
from inductor_sparse.errors import SparseShapeError

OP = getattr(torch.ops, ops.NAMESPACE).quantized_weight
DTYPES = [torch.float8_e4m3fn, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [(16, 1), (1, 24)])
def test_it_is_the_quantized_window(
    dtype: torch.dtype, stride: tuple[int, int]
) -> None:
    weight = torch.randn(24, 16)
    size = [24, 16]
    values, scale, norm = OP(weight, size, stride, 0, dtype)
    expected = reference.quantize_rows(weight.as_strided(size, stride), dtype)
    assert torch.equal(values.float(), expected[0].float())
    assert torch.equal(scale, expected[1])
    assert values.is_contiguous()
    meant = values.float() * scale[:, None]
    torch.testing.assert_close(norm, meant.norm(dim=1).amax())
    error = meant - weight.as_strided(size, stride)
    assert error.abs().max() < weight.abs().max() / 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    args = (torch.randn(6, 8, dtype=torch.bfloat16), [8, 6], [1, 8], 0, dtype)
    torch.library.opcheck(OP.default, args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_have_no_norm(dtype: torch.dtype) -> None:
    assert OP(torch.randn(6, 8), [0, 8], [8, 1], 0, dtype)[2] == 0.0


def test_a_window_that_leaves_the_weight() -> None:
    with pytest.raises(SparseShapeError, match="the weight spans 48"):
        OP(torch.randn(6, 8), [8, 6], [6, 1], 1, torch.int8)
