"""A few tokens on a GPU with the options that a user has who sets none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_sparse import decisions
from inductor_sparse.decisions import Reason

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]


class Down(nn.Module):
    def __init__(self, hidden: int, features: int) -> None:
        super().__init__()
        weight = torch.randn(features, hidden, device="cuda", dtype=torch.bfloat16)
        self.weight = nn.Parameter(weight / hidden**0.5)

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(F.relu(z) ** 2, self.weight)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    ("hidden", "features", "ending"),
    [(28672, 8192, Reason.NOT_PROFITABLE), (53248, 16384, "activation_spmm")],
)
def test_launches_hide_the_gain_of_all_but_the_largest_weights(
    hidden: int, features: int, ending: str
) -> None:
    torch.manual_seed(0)
    module = Down(hidden, features)
    z = torch.randn(1, hidden, device="cuda", dtype=torch.bfloat16) - 1.28
    with decisions.collect() as log:
        result = torch.compile(module, backend="sparse")(z)
    (decision,) = log.decisions
    assert (decision.reason or decision.op) == ending
    assert not decision.cuda_graphs
    exact = (F.relu(z.double()) ** 2) @ module.weight.double().t()
    assert (result.double() - exact).norm() < 0.01 * exact.norm()


@torch.no_grad()
def test_captured_graphs_of_inductor_are_counted_on() -> None:
    module = Down(16384, 4096)
    z = torch.randn(1, 16384, device="cuda", dtype=torch.bfloat16) - 1.28
    with decisions.collect() as log:
        run = torch.compile(module, backend="sparse", mode="reduce-overhead")
        results = [run(z).clone() for _ in range(4)]
    assert [d.op for d in log.decisions] == ["activation_spmm"]
    assert log.decisions[0].cuda_graphs
    assert all(torch.equal(result, results[0]) for result in results)
