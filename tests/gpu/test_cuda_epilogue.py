"""Printed epilogues on a GPU: what the CPU tests compute, computed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import small_cuda_op
import torch
import torch.nn.functional as F
from small_cuda_op import ACTIVATIONS, mm
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from inductor_sparse import _compat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU: the kernels are compiled for it",
    ),
]

Function = Callable[..., Any]

small_cuda_op.register()


def compiled(fn: Function, **options: Any) -> Function:
    torch._dynamo.reset()
    return torch.compile(fn, options=_compat.epilogue_fusion_options(), **options)


def check(fn: Function, *inputs: Tensor, kernels: int = 1, **options: Any) -> None:
    """``fn(mm, ...)`` in ``kernels`` kernels, against float64."""

    def call(*args: Tensor) -> Any:
        return fn(mm, *args)

    on_gpu = [t.cuda() for t in inputs]
    with torch.no_grad():
        actual, codes = run_and_get_code(compiled(call, **options), *on_gpu)
    launches = sum(code[code.index("def call(") :].count(".run(") for code in codes)
    assert launches == kernels
    wide = (t.double() if t.is_floating_point() else t for t in on_gpu)
    exact = fn(torch.matmul, *wide)
    actual = actual if isinstance(actual, tuple) else (actual,)
    exact = exact if isinstance(exact, tuple) else (exact,)
    for ours, wanted in zip(actual, exact, strict=True):
        floats = ours.dtype.is_floating_point
        eps = max(torch.finfo(ours.dtype).eps, 1e-5) if floats else 0.0
        torch.testing.assert_close(
            ours.double(), wanted.double(), rtol=eps, atol=eps, equal_nan=True
        )


def operands(dtype: torch.dtype = torch.float32, M: int = 70, N: int = 50) -> Any:
    torch.manual_seed(0)
    shapes = ((M, 24), (24, N), (N,), (M, N))
    return [(torch.randn(shape) / 4).to(dtype) for shape in shapes]


@pytest.mark.parametrize("N", [48, 50, 51])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations(dtype: torch.dtype, N: int) -> None:
    def fn(mm: Function, a: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        bias, residual = rest
        y = mm(a, b) + bias
        return tuple(act(y) + residual for act in ACTIVATIONS.values())

    check(fn, *operands(dtype, N=N))


def test_elementary_functions_masks_and_integers() -> None:
    mask = torch.arange(3500).view(70, 50) % 3 == 0
    steps = torch.arange(50, dtype=torch.int32)

    def fn(mm: Function, a: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        bias, residual, mask, steps = rest
        y = mm(a, b) - bias
        size = y.abs() + 0.25
        return (
            size.log() * size.rsqrt() - size.sqrt().reciprocal() / 3,
            (-y).exp().clamp(0.5, 2.0) + y.floor() - y.ceil().trunc(),
            torch.pow(size, 1.5) + torch.maximum(y, residual).sin(),
            torch.where(y > residual, torch.minimum(y, residual), torch.inf),
            y.masked_fill(mask, float("-inf")),
            (y * 40).clamp(-128, 127).round().to(torch.int8),
            y * steps + torch.expm1(y) + torch.erf(y),
            mask & (y > 0),
        )

    check(fn, *operands(), mask, steps)


def test_nan_goes_through_and_e4m3_saturates() -> None:
    a, b, bias, _ = operands()
    bias[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 500.0, -1e9, 2**-9])

    def fn(mm: Function, a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = mm(a, b) * 0 + bias
        return F.relu(y), y.clamp(-1, 1), y.to(torch.float8_e4m3fn)

    *others, low = compiled(lambda *t: fn(mm, *t))(a.cuda(), b.cuda(), bias.cuda())
    wanted = bias.cuda().expand(70, 50)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(others[0], F.relu(wanted), **same)
    torch.testing.assert_close(others[1], wanted.clamp(-1, 1), **same)
    saturated = wanted.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(low.float(), saturated, **same)


def test_three_dimensions_and_dynamic_rows() -> None:
    def fn(a: Tensor, b: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = mm(a.view(-1, a.shape[-1]), b).view(residual.shape)
        return F.gelu(y + bias) + residual

    run = compiled(fn, dynamic=True)
    _, b, bias, _ = operands()
    for batch, tokens in ((2, 3), (5, 7), (1, 64)):
        a, residual = torch.randn(batch, tokens, 24), torch.randn(batch, tokens, 50)
        actual = run(*(t.cuda() for t in (a, b, bias, residual)))
        exact = F.gelu(a.double() @ b.double() + bias) + residual
        torch.testing.assert_close(actual.cpu().double(), exact, rtol=1e-5, atol=1e-5)


def test_refused_epilogues_run_afterwards() -> None:
    def fn(mm: Function, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = mm(a, b)
        return torch.special.i0(y), torch.special.i1(y) + y, y * 2, y.t() + y.t().relu()

    def on_cpu(_: Function, *args: Tensor) -> tuple[Tensor, ...]:
        return fn(torch.matmul, *args)

    a, b = operands(M=50)[:2]
    actual = compiled(lambda *t: fn(mm, *t))(a.cuda(), b.cuda())
    for ours, wanted in zip(actual, on_cpu(mm, a.double(), b.double()), strict=True):
        torch.testing.assert_close(ours.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


# Torch captures an empty one of its own first.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_in_a_cuda_graph() -> None:
    def fn(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return (mm(a, b) + bias).relu() * 2

    torch._dynamo.reset()
    run = torch.compile(fn, options={"triton.cudagraphs": True})
    for seed in range(4):
        torch.manual_seed(seed)
        a, b, bias = (torch.randn(s, device="cuda") for s in ((64, 24), (24, 48), 48))
        wanted = (a.double() @ b.double() + bias).relu() * 2
        torch.testing.assert_close(
            run(a, b, bias).double(), wanted, rtol=1e-5, atol=1e-4
        )


def test_in_the_branches_of_a_condition() -> None:
    def yes(a: Tensor, b: Tensor) -> Tensor:
        return mm(a, b) + 1

    def no(a: Tensor, b: Tensor) -> Tensor:
        return mm(a, b) * 2 - 1

    def fn(flag: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.cond(flag, yes, no, (a, b)) + mm(a, b).relu()

    run = compiled(fn)
    a, b = (torch.randn(s, device="cuda") for s in ((64, 24), (24, 48)))
    for flag in (True, False):
        y = a.double() @ b.double()
        wanted = (y + 1 if flag else y * 2 - 1) + y.relu()
        actual = run(torch.tensor(flag, device="cuda"), a, b)
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-4)
