"""Decode kernels with what Inductor fuses behind them, run by Triton's interpreter.

All numbers are whole, or halves, and so small that float32 sums them exactly: what
comes out is the exact result, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import fake_cuda
import pytest
import run_wrapper
import torch
from torch import Tensor
from triton_interpreter import Interpreter

pytest.importorskip("triton")

OPS = torch.ops.inductor_sparse
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
D, K, N = 24, 203, 77


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


def whole(low: int, high: int, *size: int) -> Tensor:
    return torch.randint(low, high + 1, size).double()


def down(z: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return OPS.activation_spmm(z, w, "relu2") + bias + residual


def down_operands(M: int) -> list[Tensor]:
    torch.manual_seed(M)
    w = whole(-2, 2, K, N) / 2
    return [whole(-9, 2, M, K), w, whole(-9, 9, N) / 2, whole(-9, 9, M, N)]


def check_down(
    made: fake_cuda.Generated, interpreter: Interpreter, M: int, dtype: torch.dtype
) -> None:
    z, w, bias, residual = exact = down_operands(M)
    expected = z.clamp(min=0).square() @ w + bias + residual
    inputs = [tensor.to(dtype) for tensor in exact]
    (actual,) = run_wrapper.run(made, interpreter, *inputs)
    assert torch.equal(actual, expected.to(dtype))


# The interpreter multiplies no matrices of bfloat16, which 4 tokens are.
@pytest.mark.parametrize(("M", "dtype"), [(1, BF16), (2, BF16), (4, FP16), (4, FP32)])
def test_bias_and_residual(
    M: int, dtype: torch.dtype, interpreter: Interpreter
) -> None:
    operands = [tensor.to(dtype) for tensor in down_operands(M)]
    made = fake_cuda.generate(down, *operands)
    assert len(made.kernels) == 2
    check_down(made, interpreter, M, dtype)


@pytest.mark.parametrize(("dtype", "tokens"), [(FP16, (1, 2, 4, 9)), (FP32, (2,))])
def test_bias_and_residual_of_any_number_of_tokens(
    dtype: torch.dtype, tokens: tuple[int, ...], interpreter: Interpreter
) -> None:
    operands = [tensor.to(dtype) for tensor in down_operands(4)]
    made = fake_cuda.generate(down, *operands, dynamic=4)
    assert len(made.kernels) == 2
    for M in tokens:
        check_down(made, interpreter, M, dtype)


@pytest.mark.parametrize("M", [1, 4])
def test_bias_and_residual_behind_a_gated_product(
    M: int, interpreter: Interpreter
) -> None:
    def glu(*tensors: Tensor) -> Tensor:
        *operands, bias, residual = tensors
        return OPS.glu_spmm(*operands, "relu") + bias + residual

    _, w, bias, residual = down_operands(M)
    gate, x, up = whole(-9, 2, M, K), whole(-1, 1, M, D), whole(-1, 1, K, D)
    expected = (gate.clamp(min=0) * (x @ up.t())) @ w + bias + residual
    assert expected.abs().max() < 1024  # exact in float16
    inputs = [t.to(FP16) for t in (gate, x, up, w, bias, residual)]
    made = fake_cuda.generate(glu, *inputs)
    assert len(made.kernels) == 3
    (actual,) = run_wrapper.run(made, interpreter, *inputs)
    assert torch.equal(actual, expected.to(FP16))
