"""The graph that torchao itself writes, from its own quantized weights."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from tracing import calls, compile_eagerly, rewrite

from inductor_sparse.decisions import Status
from inductor_sparse.passes import scaled_matmul

D, F, TOKENS = 64, 256, 32


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, F, bias=False)
        self.down = nn.Linear(F, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)).square())


@pytest.fixture
def quantization(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchao's module, which believes that there is a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = "torchao.quantization.quant_api"
        pytest.importorskip("torchao", reason="torchao is not installed")
        api = importlib.import_module(name)
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)
    return importlib.import_module("torchao.quantization")


@pytest.fixture
def model(quantization: Any) -> FFN:
    """Every second neuron is silent, so that 2:4 drops nothing."""
    torch.manual_seed(0)
    model = FFN()
    with torch.no_grad():
        weight = model.up.weight.abs_()
        weight[1::2] = -weight[1::2]
    model = model.bfloat16().eval()
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), set_inductor_config=False
    )
    quantization.quantize_(model, config)
    return model


@pytest.mark.filterwarnings("ignore:Float8Tensor does not implement")
def test_its_ffn_is_packed(model: FFN, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(TOKENS, D).bfloat16()
    compiled = compile_eagerly(model)
    with torch.no_grad():
        dense = compiled(x)
    gm = compiled.forward
    assert [len(calls(gm, name)) for name in ("_scaled_mm", "amax")] == [2, 2]
    monkeypatch.setattr(scaled_matmul, "ON_GPU", ("cpu",))
    weights: list[Any] = [model.up.weight, model.down.weight]
    given = [x if node.meta["val"].shape == x.shape else None for node in inputs(gm)]
    static = [position for position, value in enumerate(given) if value is None]
    options = {"activation_format": "2:4"}
    record = rewrite(
        gm, static=static, options=options, architecture=lambda device: "sm_90"
    )
    (decision,) = record.decisions
    assert (decision.status, decision.site) == (Status.APPLIED, f"down:{F}x{D}")
    # The first product stays what it was; of the second nothing is left.
    assert [len(calls(gm, name)) for name in ("_scaled_mm", "amax")] == [1, 1]
    assert len(calls(gm, "sparse24_mm")) == 1
    stored = iter([part for w in weights for part in (w.qdata, w.scale)])
    filled = [next(stored) if value is None else value for value in given]
    (packed,) = gm(*filled)
    error = (packed.double() - dense.double()).norm() / dense.double().norm()
    assert 0 < error < 0.02


def inputs(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return gm.graph.find_nodes(op="placeholder")
