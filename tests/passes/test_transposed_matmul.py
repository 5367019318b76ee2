"""Layers written as ``w @ a``, for tokens in columns or a single vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from tracing import calls, listing, rewrite, trace

import inductor_sparse
from inductor_sparse import decisions, reference
from inductor_sparse.decisions import Reason, Status

W = torch.randn(32, 64)
VECTOR, COLUMNS = torch.randn(64), torch.randn(64, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "columns": (lambda z, w: w @ F.relu(z) ** 2, COLUMNS),
    "vector": (lambda z, w: w @ F.relu(z) ** 2, VECTOR),
    "mv": (lambda z, w: torch.mv(w, F.relu(z) ** 2), VECTOR),
    "einsum": (lambda z, w: torch.einsum("nk,k->n", w, F.relu(z) ** 2), VECTOR),
    "batch": (lambda z, w: w @ F.relu(z) ** 2, torch.randn(3, 64, 5)),
}
"""Of ``w [N, K]``."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_they_are_sites(name: str, dtype: torch.dtype) -> None:
    layer, z = LAYERS[name]
    z, w = z.to(dtype), W.to(dtype)
    gm = trace(layer, z, w)
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.rule == "relu_squared_matmul"
    assert (decision.shapes["K"], decision.shapes["N"]) == (64, 32)
    assert decision.op == "activation_spmm"
    product = gm(z, w)
    assert product.shape == layer(z, w).shape
    torch.testing.assert_close(product, layer(z, w), rtol=2e-2, atol=2e-2 * 64**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_what_stays_dense_is_spelled_as_before(name: str, dtype: torch.dtype) -> None:
    layer, z = LAYERS[name]
    gm = trace(layer, z.to(dtype), W.to(dtype))
    before = sorted(str(node.target) for node in gm.graph.nodes)
    (decision,) = rewrite(gm).decisions  # a weight that may be another one each time
    assert decision.reason is Reason.WEIGHT_NOT_STATIC
    assert sorted(str(node.target) for node in gm.graph.nodes) == before


def test_columns_under_max_autotune_are_decomposed_again() -> None:
    z, w = (torch.empty(*size, device="meta") for size in ((64, 1), (32, 64)))
    with inductor_config.patch(coordinate_descent_tuning=True):
        gm = trace(lambda z, w: w @ F.relu(z), z, w, device="cuda")
        assert not calls(gm, "mm")
        before = sorted(str(node.target) for node in gm.graph.nodes)
        record = rewrite(gm, architecture=lambda device: "sm_90")
        assert len(record.decisions) == 1
        assert sorted(str(node.target) for node in gm.graph.nodes) == before


def two_sparse_operands(z: Tensor, w: Tensor) -> Tensor:
    return F.relu(w) @ F.relu(z)


def test_the_left_operand_comes_first() -> None:
    gm = trace(two_sparse_operands, COLUMNS, W)
    record = rewrite(gm, static=[0])
    (decision,) = record.decisions
    assert decision.shapes == {"M": 32, "K": 64, "N": 5}
    assert not calls(gm, "permute")


def rounded_products(z: Tensor, w: Tensor) -> Tensor:
    return (w * F.relu(z)).sum(1)


def rounded_before_the_sum(z: Tensor, w: Tensor) -> Tensor:
    return (w * F.relu(z)).sum(1, dtype=torch.float32)


def broadcast_vector(z: Tensor, w: Tensor) -> Tensor:
    return (w * F.relu(z[:1])).sum(1)


def broadcast_matrix(z: Tensor, w: Tensor) -> Tensor:
    return (w[:, :1] * F.relu(z)).sum(1)


def other_axis(z: Tensor, w: Tensor) -> Tensor:
    return (w.t() * F.relu(z)[:, None]).sum(0)


def kept_axis(z: Tensor, w: Tensor) -> Tensor:
    return (w * F.relu(z)).sum(1, keepdim=True)


def of_two_matrices(z: Tensor, w: Tensor) -> Tensor:
    return (w * F.relu(z).expand(32, 64)).sum(1)


def dense_vector(z: Tensor, w: Tensor) -> Tensor:
    return torch.mv(w, z)


def smooth_vector(z: Tensor, w: Tensor) -> Tensor:
    return w @ torch.sigmoid(z)


def scaled(z: Tensor, w: Tensor) -> Tensor:
    return (w * 2.0).sum(1) + F.relu(z).sum()


LOOK_ALIKES: list[tuple[Any, torch.dtype]] = [
    (rounded_products, torch.bfloat16),
    (rounded_before_the_sum, torch.bfloat16),
    (broadcast_vector, torch.float32),
    (broadcast_matrix, torch.float32),
    (other_axis, torch.float32),
    (kept_axis, torch.float32),
    (of_two_matrices, torch.float32),
    (dense_vector, torch.float32),
    (smooth_vector, torch.float32),
    (scaled, torch.float32),
]


@pytest.mark.parametrize(("fn", "dtype"), LOOK_ALIKES)
def test_others_are_left_alone(fn: Any, dtype: torch.dtype) -> None:
    gm = trace(fn, VECTOR.to(dtype), W.to(dtype))
    before = listing(gm)
    assert not rewrite(gm, static=[1]).decisions
    assert listing(gm) == before


class Columns(nn.Module):
    """An FFN whose tokens are columns; or one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(256, 64) / 8)
        self.down = nn.Parameter(torch.randn(64, 256) / 16)
        self.bias = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down @ torch.relu(self.up @ x) ** 2
        return y + (self.bias if x.ndim == 1 else self.bias[:, None])


@pytest.mark.parametrize("size", [(64,), (64, 7)], ids=str)
def test_compiled(size: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    model, x = Columns(), torch.randn(size)
    compiled = torch.compile(model, backend="sparse", dynamic=False)
    with torch.no_grad(), decisions.collect() as log:
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert [d.status for d in log.decisions] == [Status.APPLIED]


@pytest.mark.parametrize("size", [(64,), (64, 7)], ids=str)
def test_the_density_is_that_of_the_activation(size: tuple[int, ...]) -> None:
    class Given(nn.Module):
        def forward(self, w: Tensor, z: Tensor) -> Tensor:
            return (w * 2) @ F.relu(z)

    z = torch.linspace(-3, 1, torch.Size(size).numel()).reshape(-1, 64).t()
    z = z.reshape(size)
    (site,) = inductor_sparse.explain(Given(), W, z).sites
    assert site.reason is Reason.WEIGHT_NOT_STATIC
    assert site.density == pytest.approx((z > 0).double().mean().item())
    rows = F.relu(z.reshape(64, -1).t()).contiguous()
    dropped = reference.dropped_energy(rows, "identity", "largest_abs")
    assert site.dropped_energy == pytest.approx(dropped)


def test_the_backward_is_left_alone() -> None:
    def step(z: Tensor, w: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        a = F.relu(z)
        return a @ w, tangents.t() @ a  # the second: the gradient of a weight [N, K]

    gm = trace(step, torch.randn(5, 64), W.t().contiguous(), torch.randn(5, 32))
    tangents = gm.graph.find_nodes(op="placeholder")[2]
    tangents.name = tangents.target = "tangents_1"
    _, gradient = calls(gm, "mm")
    rewrite(gm, static=[1])
    assert gradient in list(gm.graph.nodes)


def test_gradients() -> None:
    torch._dynamo.reset()
    model, x = Columns(), torch.randn(64, 100, requires_grad=True)
    compiled = torch.compile(model, backend="sparse", dynamic=False)
    with decisions.collect() as log:
        compiled(x).square().sum().backward()
    assert len(log.decisions) == 1
    found = [p.grad for p in (*model.parameters(), x)]
    model.zero_grad()
    x.grad = None
    model(x).square().sum().backward()
    for actual, expected in zip(found, (*model.parameters(), x), strict=True):
        torch.testing.assert_close(actual, expected.grad, rtol=1e-3, atol=1e-2)
