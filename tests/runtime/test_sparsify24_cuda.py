"""Packing on a GPU outside of graphs: what can be said of it without one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from inductor_sparse.runtime import sparsify24_cuda
from inductor_sparse.runtime.sparsify24_cuda import RowPlan, row_plan


@pytest.mark.parametrize(
    ("features", "plan"),
    [
        (1, RowPlan(True, 64, 1)),
        (64, RowPlan(True, 64, 1)),
        (4096, RowPlan(True, 4096, 4)),
        (11008, RowPlan(True, 16384, 8)),
        (16384, RowPlan(True, 16384, 8)),
        (32768, RowPlan(True, 32768, 16)),
        (32769, RowPlan(False, 8192, 8)),
        (None, RowPlan(False, 8192, 8)),
    ],
)
def test_row_plan(features: int | None, plan: RowPlan) -> None:
    assert row_plan(features) == plan


def test_what_the_kernels_take() -> None:
    x = torch.zeros(2, 4)
    assert all(sparsify24_cuda.takes(x.to(t)) for t in sparsify24_cuda.DTYPES)
    assert not sparsify24_cuda.takes(x.double())
    assert not sparsify24_cuda.takes(x[:0])
    assert not sparsify24_cuda.takes(x[:, :0])


def test_which_rows_are_even() -> None:
    even, x = sparsify24_cuda.has_even_rows, torch.zeros(4, 12, dtype=torch.bfloat16)
    assert even(x) and even(x[:, :10]) and even(x[:, 2:])
    assert not even(x[:, :9])
    assert not even(x[:, 1:11])  # begins between two words
    assert not even(x[:, ::2])
    assert not even(x.t())
    assert not even(x.view(-1)[:44].view(4, 11)[:, :10])


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from inductor_sparse.runtime import sparsify24_cuda
x = torch.randn(3, 8)
values, metadata = sparsify24_cuda.sparsify24(x, "relu2", "largest")
quantized = sparsify24_cuda.sparsify24_quantized(x, "relu2", "largest", torch.int8)
print(values.shape == (3, 32), len(quantized))
"""


def test_without_triton_the_definitions_serve() -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True 3", done.stderr
