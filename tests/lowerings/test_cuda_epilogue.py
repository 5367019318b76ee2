"""Epilogues printed into a CUDA C++ kernel: what they compute, run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_cuda_op
import torch
import torch.nn.functional as F
from fake_cuda import Generated, cuda_sources, generate
from small_cuda_op import ACTIVATIONS
from torch import Tensor

Function = Callable[..., Any]

small_cuda_op.register()


def epilogue(fn: Function, *inputs: Tensor, **options: Any) -> Generated:
    """``fn(mm, a, b, ...)`` generated with the small kernel as ``mm``."""

    def call(*args: Tensor) -> Any:
        return fn(small_cuda_op.mm, *args)

    return generate(call, *inputs, **options)


def check(
    fn: Function, folder: Path, *inputs: Tensor, atol: float = 0.0, **options: Any
) -> Generated:
    """One kernel computes all of ``fn``, as exactly as its dtypes allow."""
    generated = epilogue(fn, *inputs, **options)
    assert len(generated.kernels) == len(generated.cuda_kernels) == 1
    exact = fn(
        torch.matmul, *(t.double() if t.is_floating_point() else t for t in inputs)
    )
    exact = exact if isinstance(exact, tuple) else (exact,)
    actual = small_cuda_op.on_cpu(generated, folder, *inputs)
    assert len(actual) == len(exact)
    for ours, wanted in zip(actual, exact, strict=True):
        assert ours.shape == wanted.shape
        floats = ours.dtype.is_floating_point
        eps = torch.finfo(ours.dtype).eps if floats else 0.0
        torch.testing.assert_close(
            ours.double(),
            wanted.double(),
            rtol=max(eps, 1e-5) if floats else 0.0,
            atol=atol + (1e-5 if floats else 0.0),
            equal_nan=True,
        )
    return generated


def operands(
    dtype: torch.dtype = torch.float32, M: int = 6, N: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, bias [N], residual [M, N]); products of a few tenths to a few units."""
    torch.manual_seed(0)
    shapes = ((M, 8), (8, N), (N,), (M, N))
    return tuple((torch.randn(shape) / 2).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations(dtype: torch.dtype, tmp_path: Path) -> None:
    def fn(mm: Function, a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = mm(a, b) + bias
        return tuple(activation(y) for activation in ACTIVATIONS.values())

    # The product is not rounded before the activation, as eager float64's is not.
    atol = torch.finfo(dtype).tiny if dtype != torch.float16 else 1e-4
    check(fn, tmp_path, *operands(dtype)[:3], atol=atol)


def test_elementary_functions_and_comparisons(tmp_path: Path) -> None:
    def fn(mm: Function, a: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        bias, residual = rest
        y = mm(a, b) - bias
        size = y.abs() + 0.25
        return (
            size.log() * size.rsqrt() - size.sqrt().reciprocal() / 3,
            (-y).exp().clamp(0.5, 2.0) + y.floor() - y.ceil().trunc() + y.round(),
            torch.pow(size, 1.5) + torch.maximum(y, residual).sin(),
            torch.where(y > residual, torch.minimum(y, residual), 7.0),
            (y <= 0) | torch.logical_not(residual < y) & (y != 0.5),
            y.isnan() ^ (y == y) ^ y.isinf(),
            size.log2() + torch.expm1(y) + torch.log1p(size) + torch.erf(y),
        )

    check(fn, tmp_path, *operands())


@pytest.mark.parametrize("op", [F.relu, lambda y: y.clamp(-1, 1), F.gelu, torch.neg])
def test_nan_and_infinity_go_through(op: Function, tmp_path: Path) -> None:
    a, b, bias, _ = operands()
    bias[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])

    def fn(mm: Function, a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = mm(a, b) + bias
        return op(y), torch.maximum(y, bias), torch.where(y > 0, torch.inf, torch.nan)

    check(fn, tmp_path, a, b, bias)


def test_ties_and_what_does_not_fit(tmp_path: Path) -> None:
    row = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, -1.0, -200.0, 300.0, 17.0]
    b = torch.tensor(row).expand(10, 10).contiguous()
    large = torch.arange(10, dtype=torch.int32) - 2**30

    def fn(mm: Function, a: Tensor, b: Tensor, large: Tensor) -> tuple[Tensor, ...]:
        y = mm(a, b)  # of the unit matrix: exact
        return (
            y.round(),
            y.to(torch.uint8),
            large.abs() + (y > 0),
            y.to(torch.float8_e4m3fn).to(y.dtype) * 3,
        )

    generated = check(fn, tmp_path, torch.eye(10), b, large)
    # On a GPU a negative float would become 0 on the direct way.
    assert "(unsigned char)((long long)" in generated.code


def test_integers_and_masks(tmp_path: Path) -> None:
    a, b, _, _ = operands()
    mask = torch.arange(60).view(6, 10) % 3 == 0
    steps = torch.arange(10, dtype=torch.int32)
    bytes_ = torch.arange(60, dtype=torch.uint8).view(6, 10) * 4

    def fn(mm: Function, a: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        mask, steps, bytes_ = rest
        y = mm(a, b).masked_fill(mask, -1.5)
        return (
            (y * 40).clamp(-128, 127).round().to(torch.int8),
            y * steps + bytes_,
            (bytes_ + bytes_) * (y > 0.25),
            mask & (y > 0),
            (y > 0).to(torch.int64) * 3 - steps,
        )

    check(fn, tmp_path, a, b, mask, steps, bytes_)


def test_positions_are_values(tmp_path: Path) -> None:
    def fn(mm: Function, a: Tensor, b: Tensor) -> Tensor:
        rows, columns = torch.arange(6)[:, None], torch.arange(10)
        y = mm(a, b)
        rows, columns = rows.to(y.device), columns.to(y.device)
        return torch.where(columns > rows, 0.0, y) + columns

    check(fn, tmp_path, *operands()[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_output_is_rounded_to_nearest_even(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    one = torch.tensor(1.0, dtype=dtype)
    up = torch.finfo(dtype).eps
    halves = [
        1 + up / 2,
        1 + 3 * up / 2,
        1 + up * 0.51,
        1 - up / 4,
        1e-9,
        0.0,
        2.0,
        -3.0,
    ]
    b = torch.tensor([halves])
    assert b.to(dtype)[0, 0] == one

    def fn(mm: Function, a: Tensor, b: Tensor) -> Tensor:
        return (mm(a, b) * 1.0).to(dtype)

    generated = epilogue(fn, torch.ones(4, 1), b)
    (actual,) = small_cuda_op.on_cpu(generated, tmp_path, torch.ones(4, 1), b)
    assert torch.equal(actual, b.to(dtype).expand(4, 8))


def test_e4m3_saturates_and_keeps_nan(tmp_path: Path) -> None:
    edges = torch.tensor(
        [[448.0, 464.0, 465.0, -1e9, torch.nan, 2**-9, 2**-10, 0.0146]]
    )
    b = torch.cat([edges, torch.logspace(-11, 9, 56, base=2.0)[None]], 1)

    def fn(mm: Function, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        low = (mm(a, b) * 1.0).to(torch.float8_e4m3fn)
        return low, low.float() * 2

    generated = epilogue(fn, torch.ones(2, 1), b)
    low, twice = small_cuda_op.on_cpu(generated, tmp_path, torch.ones(2, 1), b)
    wanted = b.clamp(-448, 448).to(torch.float8_e4m3fn).float().expand(2, -1)
    torch.testing.assert_close(low.float(), wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(twice, wanted * 2, rtol=0, atol=0, equal_nan=True)


def test_casts_are_rounded_where_inductor_is_told_to(tmp_path: Path) -> None:
    def fn(mm: Function, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return ((mm(a, b) + bias) * 3).float()

    a, b, bias, _ = operands(torch.bfloat16)
    rounding = {"emulate_precision_casts": True}
    generated = epilogue(fn, a, b, bias, inductor=rounding)
    (actual,) = small_cuda_op.on_cpu(generated, tmp_path, a, b, bias)
    assert torch.equal(actual, fn(small_cuda_op.mm, a, b, bias))
    widened = epilogue(lambda mm, *ab: mm(*ab).float(), a, b, inductor=rounding)
    (actual,) = small_cuda_op.on_cpu(widened, tmp_path, a, b)
    assert torch.equal(actual, small_cuda_op.mm(a, b).float())
    assert (
        "epilogue::rounded<" not in epilogue(fn, a, b, bias).code.split("small_mm")[1]
    )


def test_vectors_where_pairs_are_adjacent_and_aligned() -> None:
    def fn(mm: Function, a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        bias, residual, column, shifted = rest
        return mm(a, b) + bias + residual * column + shifted

    def body(N: int) -> str:
        a, b, bias, residual = operands(N=N)
        wide = torch.zeros(6, N + 1)[:, 1:]
        code = epilogue(fn, a, b, bias, residual, torch.ones(6, 1), wide).code
        return code[code.index("small_mm(") : code.index("def call")]

    even = body(10)
    assert even.count("epilogue::load2(in_ptr") == 2  # the bias and the residual
    assert even.count("epilogue::load(in_ptr") == 3  # one for both columns, two apart
    assert even.count("epilogue::store2(out_ptr") == 1
    odd = body(9)
    assert "load2(in_ptr" not in odd
    assert odd.count("epilogue::store(out_ptr") == 2


def test_odd_columns_and_symbolic_rows(tmp_path: Path) -> None:
    def fn(mm: Function, a: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        bias, residual = rest
        y = mm(a, b) + bias
        return y * residual, y.relu().to(torch.float16)

    a, b, bias, residual = operands(N=9)
    check(fn, tmp_path, a, b, bias, residual)
    generated = check(fn, tmp_path, a, b, bias, residual, dynamic=6)
    assert ".size()" in generated.code
    check(fn, tmp_path, *operands(M=7), dynamic=(7, 10))
    (source,) = cuda_sources(generated.code).values()
    assert "#include <cuda" not in source
