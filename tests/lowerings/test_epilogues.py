"""What Inductor fuses behind the sparse products, and into the same kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.testing import FileCheck

from inductor_sparse import lowerings

OPS = torch.ops.inductor_sparse
Z, W = torch.randn(33, 96), torch.randn(96, 80)
BIAS, RESIDUAL = torch.randn(80), torch.randn(33, 80)


def compile_and_check(fn: Callable[..., object], *args: Tensor) -> str:
    """The generated code of ``fn``, whose results must match its eager ones."""
    lowerings.register_all()
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        actual, (code, *_) = run_and_get_code(torch.compile(fn), *args)
        torch.testing.assert_close(actual, fn(*args), rtol=1e-4, atol=1e-4)
    return code


def fused() -> int:
    return counters["inductor"]["cpp_epilogue_fusion_counter"]


def test_bias_activation_scale_residual_and_cast_are_one_kernel() -> None:
    def fn(z: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = OPS.activation_spmm(z, w, "relu2") + bias
        return (F.gelu(y) * 2 + residual).to(torch.float64).float()

    code = compile_and_check(fn, Z, W, BIAS, RESIDUAL)
    assert fused() == 1
    FileCheck().check_count("async_compile.cpp_pybinding(", 1, exactly=True).check(
        "Activation::relu2"
    ).check("stream_rows").check("accumulate<T>").run(code)


def test_the_product_may_have_other_users() -> None:
    def fn(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = OPS.activation_spmm(z, w, "relu2")
        return y.relu() + 1, y

    compile_and_check(fn, Z, W)
    assert fused() == 1


def test_a_view_to_three_dimensions_is_seen_through() -> None:
    def fn(z: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        y = OPS.activation_spmm(z.view(-1, z.shape[-1]), w, "relu")
        return y.view(3, 11, 80) + bias

    compile_and_check(fn, Z.view(3, 11, 96), W, BIAS)


def test_batches_of_products() -> None:
    def fn(z: Tensor, w: Tensor, residual: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "relu2") * residual

    w = torch.randn(3, 96, 80)
    compile_and_check(fn, Z.view(3, 11, 96), w, RESIDUAL.view(3, 11, 80))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_without_a_template_do_not_reach_it(dtype: torch.dtype) -> None:
    def fn(z: Tensor, w: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "identity")

    if dtype.is_complex:
        with pytest.raises(Exception, match="complex64"):
            compile_and_check(fn, Z.to(dtype), W.to(dtype))
        return
    compile_and_check(fn, Z.to(dtype), W.to(dtype))
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 0


def test_a_hidden_zero_behind_an_open_gate_touches_no_weight() -> None:
    gate, x = torch.ones(1, 40), torch.randn(1, 24)
    w_up, w_down = torch.randn(40, 24), torch.randn(40, 33)
    w_up[7], w_down[7] = 0.0, float("inf")
    compile_and_check(lambda *t: OPS.glu_spmm(*t, "relu"), gate, x, w_up, w_down)


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        (torch.float32, "relu2"),
        (torch.bfloat16, "relu"),
        (torch.float16, "relu2"),
        (torch.float32, "identity"),
    ],
)
def test_gated_ffn_with_bias_and_residual(dtype: torch.dtype, activation: str) -> None:
    def fn(*args: Tensor) -> Tensor:
        *tensors, bias = args
        return OPS.glu_spmm(*tensors, activation) + bias

    F_, D, N = 201, 77, 131
    for M in (1, 3):
        shapes = ((M, F_), (M, D), (F_, D), (F_, N), (N,))
        args = [torch.randn(s) / 4 for s in shapes]
        lowerings.register_all()
        torch._dynamo.reset()
        counters.clear()
        low = [t.to(dtype) for t in args]
        with torch.no_grad():
            actual = torch.compile(fn)(*low)
            exact = fn(*(t.double() for t in low))
            budget = 2 * (fn(*low).double() - exact).abs().max()
        assert fused() == 1
        limit = budget + torch.finfo(dtype).eps * exact.abs().max()
        assert (actual.double() - exact).abs().max() <= limit
