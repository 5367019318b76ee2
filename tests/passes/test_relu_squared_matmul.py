"""ReLU² -> matmul: what may be in between; bias, scale and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from numerics import assert_within_budget
from torch import Tensor
from tracing import calls, listing, rewrite, rewrite_one, trace

from inductor_sparse.decisions import Reason, Status, Tier

RULE = "relu_squared_matmul"


def relu2(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


def float_rms_norm(h: Tensor) -> Tensor:
    wide = h.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * scale).to(h.dtype)


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda h: h * 0.5,
    "division": lambda h: h / 3,
    "negation": lambda h: -h,
    "row scale": lambda h: h * h.new_full((2, 3, 1), 0.25),
    "column scale": lambda h: h * torch.linspace(1, 2, 8).to(h),
    "rms norm": lambda h: F.rms_norm(h, (8,)),
    "rms norm in float32": float_rms_norm,
    "mask": lambda h: torch.where(h > 2, h, 0),
    "dropout": lambda h: F.dropout(h, 0.5, training=True),
    "permuted tokens": lambda h: h.transpose(0, 1).contiguous(),
    "slice": lambda h: h[:, 1:],
    "through fp8": lambda h: h.to(torch.float8_e4m3fn).to(h.dtype),
    "fake quantization": lambda h: (h * 16).round().clamp(-128, 127) / 16,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BETWEEN)
def test_zeros_survive(name: str, dtype: torch.dtype) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(BETWEEN[name](relu2(x)), w)

    x, w = torch.randn(2, 3, 8).to(dtype), torch.randn(6, 8).to(dtype)
    before = trace(fn, x, w)
    gm, decision = rewrite_one(fn, x, w)
    assert (decision.status, decision.rule) == (Status.APPLIED, RULE)
    assert (decision.tier, decision.activation) == (Tier.EXACT, "relu2")
    (spmm,) = calls(gm, "activation_spmm")
    assert calls(gm, "mm") == []
    if name not in ("permuted tokens", "slice"):
        assert spmm.args[2] == "identity"
    torch.manual_seed(0)
    expected = before(x, w)
    torch.manual_seed(0)
    torch.testing.assert_close(gm(x, w), expected)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)], ids=["2d", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_becomes_an_epilogue(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, w, b = (torch.randn(size).to(dtype) for size in (shape, (6, 8), (6,)))
    gm, decision = rewrite_one(lambda x, w, b: F.linear(relu2(x), w, b), x, w, b)
    assert decision.status is Status.APPLIED
    (add,) = calls(gm, "add")
    assert add.args[0] is calls(gm, "activation_spmm")[0]
    exact = F.linear(relu2(x.double()), w.double(), b.double())
    # The product is rounded once more before the bias is added.
    eager = F.linear(relu2(x), w) + b
    assert_within_budget(gm(x, w, b), eager, exact)


@pytest.mark.parametrize("beta", [0, 1, 0.5])
@pytest.mark.parametrize("alpha", [1, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_alpha_and_beta(alpha: float, beta: float, batched: bool) -> None:
    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        product = torch.baddbmm if batched else torch.addmm
        return product(b, relu2(x), w, beta=beta, alpha=alpha)

    batch = (2,) if batched else ()
    sizes = ((5, 8), (8, 6), (5, 6))
    args = [torch.randn(batch + size, dtype=torch.float32) for size in sizes]
    if beta == 0:
        args[2].fill_(torch.nan)  # not even read, as documented for torch.addmm
    gm, decision = rewrite_one(fn, *args)
    assert decision.status is Status.APPLIED
    exact = fn(*(arg.double() for arg in args))
    assert_within_budget(gm(*args), fn(*args), exact)


@pytest.mark.parametrize("transposed", [False, True])
def test_batched(transposed: bool) -> None:
    w = torch.randn(2, 6, 8).mT if transposed else torch.randn(2, 8, 6)
    x = torch.randn(2, 5, 8)
    gm, decision = rewrite_one(lambda x, w: torch.bmm(relu2(x), w), x, w)
    assert decision.shapes == {"M": 5, "K": 8, "N": 6, "B": 2}
    assert decision.weight_copy_bytes == (2 * 8 * 6 * 4 if transposed else 0)
    (spmm,) = calls(gm, "activation_spmm")
    assert spmm.args[2] == "relu2"
    exact = relu2(x.double()) @ w.double()
    assert_within_budget(gm(x, w), relu2(x) @ w, exact)


def test_expert_einsum() -> None:
    x, w = torch.randn(2, 8, 3), torch.randn(2, 8, 4)
    gm, decision = rewrite_one(
        lambda x, w: torch.einsum("ekc,ekn->ecn", relu2(x), w), x, w
    )
    assert decision.status is Status.APPLIED
    expected = torch.einsum("ekc,ekn->ecn", relu2(x), w)
    torch.testing.assert_close(gm(x, w), expected)


def test_cast_that_rounds_stays_outside_of_the_kernel() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(relu2(x).bfloat16(), w)

    x, w = torch.randn(5, 8), torch.randn(6, 8).bfloat16()
    gm, decision = rewrite_one(fn, x, w)
    assert (decision.status, decision.dtype) == (Status.APPLIED, "bfloat16")
    (spmm,) = calls(gm, "activation_spmm")
    assert spmm.args[2] == "identity"
    torch.testing.assert_close(gm(x, w), fn(x, w))


def test_dynamic_tokens() -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(6, 8)
    gm = trace(lambda x, w: F.linear(relu2(x), w), x, w, mode="symbolic")
    (decision,) = rewrite(gm, static=[1]).decisions
    # make_fx makes every size symbolic, the weight's too: it cannot be copied once.
    assert decision.reason is Reason.WEIGHT_NOT_STATIC
    gm = trace(lambda x, w: relu2(x) @ w, x, w.T.contiguous(), mode="symbolic")
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.status is Status.APPLIED
    assert isinstance(decision.shapes["M"], str)


def test_two_matmuls_of_one_activation_are_two_sites() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h = relu2(x)
        return F.linear(h, w) + F.linear(h, v)

    gm = trace(fn, torch.randn(5, 8), torch.randn(6, 8), torch.randn(6, 8))
    record = rewrite(gm, static=[1, 2])
    sites = [decision.site for decision in record.decisions]
    assert len(record.applied) == 2
    assert len(set(sites)) == 2


def test_activation_with_another_user_is_still_skipped() -> None:
    def fn(x: Tensor, w: Tensor) -> Any:
        h = relu2(x)
        return F.linear(h, w), h

    gm = trace(fn, torch.randn(5, 8), torch.randn(6, 8))
    assert len(rewrite(gm, static=[1]).applied) == 1
    assert len(calls(gm, "pow")) == 1


def test_rewritten_graph() -> None:
    x, w, b = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(6)
    gm = trace(lambda x, w, b: F.linear(relu2(x), w, b), x, w, b)
    rewrite(gm, static=[1, 2], options={"adaptive": False})
    text = listing(gm).replace("_default", "").replace("inductor_sparse.", "")
    assert_expected_inline(
        text,
        """\
x_1 = x_1()
w_1 = w_1()
b_1 = b_1()
row_major_weight = row_major_weight(w_1, [8, 6], [1, 8], 0, torch.float32)
view = aten.view(x_1, [6, 8])
activation_spmm = activation_spmm(view, row_major_weight, relu2)
add_tensor = aten.add.Tensor(activation_spmm, b_1)
view_1 = aten.view(add_tensor, [2, 3, 6])
output = output(view_1)""",
    )
