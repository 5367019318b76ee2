"""``quantize_rows`` compiled for a GPU: the bits of the reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inductor_sparse import lowerings, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def _same_bits(actual: Tensor, expected: Tensor) -> bool:
    actual, bits = actual.cpu(), {1: torch.int8, 4: torch.int32}[actual.element_size()]
    nan = actual.float().isnan() & expected.float().isnan()
    return bool(((actual.view(bits) == expected.view(bits)) | nan).all())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("columns", [100, 512, 4096, 20000])
def test_the_bits_are_those_of_the_reference(columns: int, dtype: torch.dtype) -> None:
    if dtype != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs e4m3")
    lowerings.register_all()
    torch.manual_seed(0)
    x = torch.randn(256, columns) * torch.rand(256, 1).mul(20).sub(10).exp2()
    x[3], x[4, 2], x[5, 7] = 0.0, torch.nan, torch.inf
    x[6] *= 1e-38
    x[7, ::2] = -1e-9
    x = x.bfloat16()
    compiled = torch.compile(
        lambda x: torch.ops.inductor_sparse.quantize_rows(x, dtype), dynamic=False
    )
    values, scale = compiled(x.cuda())
    expected_values, expected_scale = reference.quantize_rows(x, dtype)
    assert _same_bits(values, expected_values)
    assert _same_bits(scale, expected_scale)
