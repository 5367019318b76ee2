"""A report leaves buffers, inputs and generators as it found them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inductor_sparse.report.preserve import preserved


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("cache", torch.zeros(2, 4))
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.cache.copy_(x)
        self.replaced = self.replaced + 1
        self.absent = x
        return nn.functional.dropout(self.norm(x))

    def step(self, x: Tensor) -> Tensor:
        return self(x)


@pytest.mark.parametrize("method", [False, True])
def test_buffers_come_back(method: bool) -> None:
    model = Stateful()
    replaced = model.replaced
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call = model.step if method else model
    with preserved(call, ()):
        call(torch.randn(2, 4))
        assert model.replaced is not replaced
    assert model.absent is None
    assert model.replaced is replaced
    assert model.training
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("inference", [False, True])
def test_inputs_changed_in_place_come_back(inference: bool) -> None:
    with torch.inference_mode(inference):
        caches = {"layers": [torch.zeros(3), torch.full((2,), torch.nan)]}
        with preserved(None, (caches, 3, "text")):
            caches["layers"][0].add_(1)
    assert torch.equal(caches["layers"][0], torch.zeros(3))
    assert caches["layers"][1].isnan().all()


def test_untouched_tensors_are_not_written() -> None:
    x = torch.zeros(3)
    version = x._version
    with preserved(nn.Identity(), (x,)):
        pass
    assert x._version == version


def test_parameter_that_requires_grad_as_input() -> None:
    weight = nn.Parameter(torch.zeros(2))
    with preserved(None, (weight,)), torch.no_grad():
        weight.add_(1)
    assert torch.equal(weight, torch.zeros(2))


def test_generator_and_state_come_back_after_an_error() -> None:
    model = Stateful()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), preserved(model, ()):
        model(torch.randn(2, 4))
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.cache.any()
