"""Graphs with a backward: exact gradients, and copies only where they pay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tracing import Compiled, calls, compile_eagerly

from inductor_sparse.decisions import Reason, Status


class FFN(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], *, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=bias)
        self.down = nn.Linear(16, 8, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Gated(FFN):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) * self.up(x + 1))


def relu2(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": relu2,
    "r * r": lambda x: F.relu(x) * F.relu(x),
    "relu(x) * x": lambda x: F.relu(x) * x,
    "clamp": lambda x: x.clamp(min=0) ** 2,
    "where": lambda x: torch.where(x > 0, x * x, 0),
    "relu": F.relu,
    "normed": lambda x: F.rms_norm(relu2(x), (16,)),
}


def gradients(
    fn: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    fn(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters())]
    return [g for g in found if g is not None]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_dense_graph(name: str, bias: bool) -> None:
    model = FFN(ACTIVATIONS[name], bias=bias)
    x = torch.randn(4, 8)
    run = compile_eagerly(model)
    expected = gradients(model, model, x)
    torch.testing.assert_close(gradients(run, model, x), expected)
    assert [d.status for d in run.decisions] == [Status.APPLIED]


def test_gated_gradients() -> None:
    model, x = Gated(relu2), torch.randn(4, 8)
    run = compile_eagerly(model)
    expected = gradients(model, model, x)
    torch.testing.assert_close(gradients(run, model, x), expected)
    # The backward needs the up projection, so it is computed as it was.
    assert [d.op for d in run.decisions] == ["activation_spmm"]


def test_backward_stays_as_traced() -> None:
    model, x = FFN(relu2), torch.randn(4, 8)
    run = compile_eagerly(model)
    gradients(run, model, x)
    forward, backward = run.graphs
    assert len(calls(forward, "activation_spmm")) == 1
    assert len(calls(forward, "mm")) == 1
    assert len(calls(backward, "mm")) == 4
    assert calls(backward, "activation_spmm") == []


def test_dropout_in_training() -> None:
    model = FFN(lambda x: F.dropout(relu2(x), 0.5, training=True))
    run = compile_eagerly(model)
    gradients(run, model, torch.randn(4, 8))
    (decision,) = run.decisions
    assert (decision.rule, decision.status) == ("relu_squared_matmul", Status.APPLIED)


def decide(tokens: int, *, grad: bool = True, dynamic: bool = False) -> Compiled:
    run = compile_eagerly(FFN(relu2), dynamic=dynamic or None)
    with torch.set_grad_enabled(grad):
        run(torch.randn(tokens, 8))
    return run


@pytest.mark.parametrize(
    ("tokens", "applied"), [(1, True), (8, True), (9, False), (63, False), (64, True)]
)
def test_weight_copy_has_to_pay_every_step(tokens: int, applied: bool) -> None:
    (decision,) = decide(tokens).decisions
    assert decision.reason is (None if applied else Reason.TRAINING_GRAPH)


def test_without_a_backward_the_copy_is_kept() -> None:
    (decision,) = decide(20, grad=False).decisions
    assert decision.status is Status.APPLIED


def test_hint_of_a_dynamic_size_decides() -> None:
    (decision,) = decide(20, dynamic=True).decisions
    assert decision.reason is Reason.TRAINING_GRAPH
    run = decide(64, dynamic=True)
    assert run.decisions[0].status is Status.APPLIED
    assert isinstance(run.decisions[0].shapes["M"], str)
    # A hint is not a guard: another size runs the same graph.
    run(torch.randn(65, 8))
    assert len(run.passes) == 1


def test_weight_that_needs_no_copy_is_always_taken() -> None:
    model = FFN(relu2)
    model.down.weight.data = model.down.weight.data.T.contiguous().T
    run = compile_eagerly(model)
    run(torch.randn(20, 8))
    assert run.decisions[0].status is Status.APPLIED


def test_activation_checkpointing() -> None:
    inner, x = FFN(relu2), torch.randn(4, 8)
    run = compile_eagerly(lambda x: checkpoint(inner, x, use_reentrant=False))
    expected = gradients(inner, inner, x)
    torch.testing.assert_close(gradients(run, inner, x), expected)
    assert [d.status for d in run.decisions] == [Status.APPLIED]


def test_optimizer_step_between_calls() -> None:
    model, x = FFN(relu2), torch.randn(4, 8)
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    run = compile_eagerly(model)
    for fn, module in ((run, model), (twin, twin), (exact, exact)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        for _ in range(3):
            gradients(fn, module, x.to(module.up.weight.dtype))
            optimizer.step()
    # Every step multiplies the rounding of the one before it.
    assert_within_budget(run(x), twin(x), exact(x.double()))
