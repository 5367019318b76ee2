"""The functions of the ``quantize_rows`` kernel, run by Triton's interpreter.

The interpreter's own cast to e4m3 does not round; its results are taken in float32,
where only the cast is left to do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inductor_sparse import reference
from inductor_sparse.reference import quantized
from inductor_sparse.runtime import triton_text

SCRIPT = """
import warnings

warnings.simplefilter("ignore")
import torch


@triton.jit
def quantize(X, VALUES, SCALE, K, BLOCK_K: tl.constexpr, LIMIT: tl.constexpr,
             SMALLEST: tl.constexpr, DTYPE: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(X + row * K + k, mask=k < K, other=0.0)
    scale, inverse = row_scale(x, LIMIT, SMALLEST)
    tl.store(SCALE + row, scale)
    tl.store(VALUES + row * K + k, rounded(x * inverse, LIMIT, DTYPE), mask=k < K)


x, limit, smallest, whole = torch.load("inputs.pt")
values = torch.empty(x.shape, dtype=torch.int8 if whole else torch.float32)
scale = torch.empty(x.shape[0])
dtype = tl.int8 if whole else tl.float32
quantize[(x.shape[0],)](x, values, scale, x.shape[1], 128, limit, smallest, dtype)
torch.save((values, scale), "outputs.pt")
"""


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_the_bits_are_those_of_the_reference(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 100) * torch.rand(24, 1).mul(20).sub(10).exp2()
    x[3], x[4, 2], x[5, 7] = 0.0, torch.nan, -torch.inf
    x[6] *= 1e-38
    x[7, ::2] = -1e-9  # rounded away: +0.0 is stored
    x[8], x[8, 0] = torch.arange(100) - 50, 127  # exact ties in int8
    limit = reference.QUANTIZED_LIMITS[dtype]
    inputs = (x, limit, quantized.SMALLEST_AMAX, dtype == torch.int8)
    torch.save(inputs, tmp_path / "inputs.pt")
    source = triton_text.text("quantize_rows_helpers") + SCRIPT
    (tmp_path / "run.py").write_text(source, encoding="utf-8")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, env=environment, check=True
    )
    values, scale = torch.load(tmp_path / "outputs.pt")
    expected, expected_scale = reference.quantize_rows(x, dtype)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    actual, wanted = values.to(dtype).float(), expected.float()
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
    zeros = wanted == 0
    assert not torch.signbit(actual[zeros]).any()
