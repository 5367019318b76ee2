"""Models on two GPUs of one process: their kernels, weights and counters stay apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_sparse import config, decisions

pytestmark = [
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

D, H = 4096, 16384
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "packed": {"sparse.activation_format": "2:4"},
    "fp8": {"sparse.activation_format": "2:4", "sparse.quantize": "fp8"},
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class FFN(nn.Module):
    """A ReLU² FFN of whose neurons about a tenth is active."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        nn.init.constant_(self.up.bias, -0.75)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) ** 2)


def model(device: int, seed: int) -> FFN:
    return FFN(seed).to(f"cuda:{device}", torch.bfloat16).eval()


def error(actual: Tensor, module: nn.Module, x: Tensor) -> float:
    exact = module(x).double()
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("graphs", [False, True], ids=["calls", "cuda graphs"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_same_code_on_two_devices(way: str, graphs: bool) -> None:
    current = torch.cuda.current_device()
    modules = [model(device, seed=device) for device in range(2)]
    options = {**WAYS[way], "triton.cudagraphs": graphs}
    with decisions.collect() as log, config.patch(cuda_graphs=True):
        for tokens in (1, 512):
            compiled = [
                torch.compile(module, backend="sparse", options=options, dynamic=False)
                for module in modules
            ]
            for _ in range(3):
                for device in (1, 0, 1):
                    torch.compiler.cudagraph_mark_step_begin()
                    x = torch.randn(tokens, D, dtype=torch.bfloat16).to(device)
                    y = compiled[device](x)
                    assert y.device == x.device
                    assert error(y, modules[device], x) < 0.1
    assert torch.cuda.current_device() == current
    assert all(decision.op is not None for decision in log.decisions)


@torch.no_grad()
def test_a_model_that_moves() -> None:
    module = model(0, seed=0)
    compiled = torch.compile(module, backend="sparse", dynamic=False)
    for device in (0, 1, 0):
        module.to(f"cuda:{device}")
        for tokens in (1, 2048):
            x = torch.randn(tokens, D, device=f"cuda:{device}", dtype=torch.bfloat16)
            assert error(compiled(x), module, x) < 0.1


@torch.no_grad()
def test_a_thread_for_each_device() -> None:
    modules = [model(device, seed=device) for device in range(2)]
    ways = {"backend": "sparse", "options": WAYS["packed"], "dynamic": False}
    compiled = [torch.compile(module, **ways) for module in modules]
    inputs = [torch.randn(512, D, dtype=torch.bfloat16).to(f"cuda:{i}") for i in (0, 1)]
    for fn, x in zip(compiled, inputs, strict=True):
        fn(x)
    errors: list[float] = []

    @torch.no_grad()
    def work(device: int) -> None:
        for _ in range(20):
            y = compiled[device](inputs[device])
            errors.append(error(y, modules[device], inputs[device]))

    threads = [threading.Thread(target=work, args=(device,)) for device in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 40
    assert max(errors) < 0.1
