"""Gated FFNs of many tokens on a GPU: packed by a kernel that multiplies the gate."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from inductor_sparse import config, decisions

pytestmark = [
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

D, H, M = 2048, 8192, 4096


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    # A graph from the cache has no code to look at.
    with config.patch(cuda_graphs=True), inductor_config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


class Gated(nn.Module):
    """A gated FFN of whose neurons about a tenth is active."""

    def __init__(self, squared: bool) -> None:
        super().__init__()
        self.squared = squared
        self.gate, self.up = nn.Linear(D, H), nn.Linear(D, H, bias=False)
        self.down = nn.Linear(H, D)
        nn.init.constant_(self.gate.bias, -0.75)

    def forward(self, x: Tensor) -> Tensor:
        g = F.relu(self.gate(x))
        return self.down((g * g if self.squared else g) * self.up(x))


@torch.no_grad()
def error_of(module: nn.Module, x: Tensor, **how: object) -> float:
    """The relative error of a compiled module that was rewritten."""
    compiled = torch.compile(module, backend="sparse", **how)
    with decisions.collect() as log:
        _, code = run_and_get_code(compiled, x)
        # Products of int8 are scaled by a kernel, which multiplies the gate.
        fuses = how.get("options") != {"sparse.quantize": "int8"}
        assert ("GATED : tl.constexpr = True" in "".join(code)) == fuses
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(x).clone()
    (decision,) = log.decisions
    assert decision.op == "sparse24_mm", decision
    assert "not quantized" not in decision.detail
    exact = module.double()(x.double())
    return float((found - exact).norm() / exact.norm())


def made(squared: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Gated, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, M // 4, D, device="cuda", dtype=dtype)
    return Gated(squared).cuda().to(dtype).eval(), x


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("squared", [False, True])
def test_in_16_bits(squared: bool, dtype: torch.dtype, mode: str | None) -> None:
    # What 2:4 drops of zeros that know nothing of each other.
    assert error_of(*made(squared, dtype), mode=mode) < 0.05


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
@pytest.mark.parametrize("squared", [False, True])
def test_in_8_bits(squared: bool, quantize: str) -> None:
    options = {"sparse.quantize": quantize}
    assert error_of(*made(squared), options=options) < 0.1
