"""Models that are quantized to fp8 row by row, as libraries write them, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from row_quantization import WAYS, Quantized, by_division
from torch import Tensor, nn

from inductor_sparse import decisions
from inductor_sparse.decisions import Reason
from inductor_sparse.plan import Plan, SitePlan

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]

M, K, N = 8192, 4096, 4096


class Down(nn.Module):
    """The second matmul of a ReLU² FFN, whose weight has 8 bits."""

    def __init__(self, quantize: Callable[[Tensor], Quantized]) -> None:
        super().__init__()
        self.quantize = quantize
        weight = torch.randn(N, K, device="cuda")
        values, scale = by_division(weight)
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale.t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        q, s = self.quantize(F.relu(x) ** 2)
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch._scaled_mm(q, self.weight.t(), s, self.scale, **options)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def activation() -> Tensor:
    """A tenth is positive, and never more than two of four neighbours."""
    x = torch.randn(M, K, device="cuda") - 1.28
    x[:, ::2] = -x[:, ::2].abs()
    return x.bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("quantize", WAYS)
def test_the_second_matmul_is_packed(quantize: Callable[[Tensor], Quantized]) -> None:
    torch.manual_seed(0)
    module, x = Down(quantize), activation()
    weight = module.weight.double() * module.scale.double().t()
    exact = (F.relu(x.double()) ** 2) @ weight.t()
    with decisions.collect() as log:
        result = torch.compile(module, backend="sparse")(x)
    assert [d.op for d in log.decisions] == ["sparse24_mm"]
    error = (result.double() - exact).norm() / exact.norm()
    dense = (module(x).double() - exact).norm() / exact.norm()
    assert error < 1.2 * dense


@torch.no_grad()
def test_a_plan_that_drops_too_much_keeps_the_product(tmp_path: Path) -> None:
    module, x = Down(by_division), activation()
    with decisions.collect() as log:
        torch.compile(module, backend="sparse")(x)
    torch._dynamo.reset()
    site = log.decisions[0].site
    path = tmp_path / "plan.json"
    Plan({site: SitePlan(0.1, 0.1, 0.5, 0.5, 1, M)}).save(path)
    with decisions.collect() as log:
        options = {"sparse.plan": str(path)}
        torch.compile(module, backend="sparse", options=options)(x)
    assert [d.reason for d in log.decisions] == [Reason.TOO_DENSE]
