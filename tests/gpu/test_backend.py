"""``backend="sparse"`` on a GPU, end to end: regimes, modes, quantization, weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_sparse import config, decisions, profitability
from inductor_sparse.decisions import Decision, Reason

pytestmark = [
    # Torch's own: its graph trees begin with one, and it advises against full float32.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

D, H = 2048, 8192
FEW = profitability.cuda.decode_max_tokens(H, D, "bfloat16", None)
MANY = 8192


@pytest.fixture(autouse=True)
def _decoding_is_not_left_to_the_launches() -> Iterator[None]:
    with config.patch(cuda_graphs=True):
        yield


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class FFN(nn.Module):
    """A ReLU² FFN of whose neurons about a tenth is active."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(D, H)
        self.down = nn.Linear(H, D, bias=bias)
        nn.init.constant_(self.up.bias, -0.75)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) ** 2)


def model(dtype: torch.dtype = torch.bfloat16, **options: Any) -> FFN:
    torch.manual_seed(0)
    return FFN(**options).cuda().to(dtype).eval()


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, D, device="cuda", dtype=dtype)


@torch.no_grad()
def run(module: nn.Module, x: Tensor, **compile_options: Any) -> tuple[float, Decision]:
    """The relative error of one compiled call, and what was decided."""
    compiled = torch.compile(module, backend="sparse", **compile_options)
    with decisions.collect() as log:
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(x).clone()
    exact = module.double()(x.double())
    (decision,) = log.decisions
    return float((got - exact).norm() / exact.norm()), decision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_prefill(dtype: torch.dtype, mode: str | None) -> None:
    x = tokens(4, MANY // 4, dtype=dtype)
    error, decision = run(model(dtype, bias=True), x, mode=mode)
    assert decision.op == "sparse24_mm", decision
    assert error < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
def test_decode(dtype: torch.dtype, mode: str | None) -> None:
    error, decision = run(model(dtype), tokens(1, dtype=dtype), mode=mode)
    assert decision.op == "activation_spmm", decision
    assert error < 0.01


@pytest.mark.parametrize(("quantize", "limit"), [("fp8", 0.08), ("int8", 0.06)])
def test_quantized(quantize: str, limit: float) -> None:
    options = {"sparse.quantize": quantize}
    error, decision = run(model(bias=True), tokens(MANY), options=options)
    assert decision.op == "sparse24_mm", decision
    assert "not quantized" not in decision.detail
    assert error < limit


@torch.no_grad()
def test_one_token_in_8_bits() -> None:
    module, x = model(bias=True), tokens(1)
    options = {"sparse.quantize": "fp8", "sparse.activation_format": "2:4"}
    compiled = torch.compile(module, backend="sparse", options=options)
    exact = module(x).double()
    for _ in range(20):
        difference = compiled(x).double() - exact
        assert difference.norm() / exact.norm() < 0.1


@pytest.mark.parametrize("graphs", [False, True])
def test_predicted_scales(graphs: bool) -> None:
    options = {
        "sparse.quantize": "fp8",
        "sparse.quantize_scales": "predicted",
        "triton.cudagraphs": graphs,
    }
    error, decision = run(model(bias=True), tokens(MANY), options=options)
    assert decision.detail.endswith("; scales predicted")
    assert error < 0.08


def test_between_the_two_is_dense() -> None:
    error, decision = run(model(), tokens(200))
    assert decision.reason is Reason.NOT_PROFITABLE
    assert error < 0.01


def test_training_is_not_touched() -> None:
    module = model()
    compiled = torch.compile(module, backend="sparse")
    x = tokens(MANY)
    with decisions.collect() as log:
        compiled(x).float().square().mean().backward()
    assert [d.reason for d in log.decisions] == [Reason.TRAINING_GRAPH]
    gradient = module.down.weight.grad
    module.zero_grad()
    module(x).float().square().mean().backward()
    torch.testing.assert_close(gradient, module.down.weight.grad, rtol=0.05, atol=1e-5)


@torch.no_grad()
def test_one_set_of_weights_for_prompts_and_tokens() -> None:
    module = model()
    compiled = torch.compile(module, backend="sparse", dynamic=True)
    with decisions.collect() as log:
        for scale in (1.0, -2.0):
            module.down.weight.mul_(scale)
            for M in (MANY, 2, MANY + 8, 100):
                x = tokens(M)
                expected = module(x).float()
                error = (compiled(x).float() - expected).norm() / expected.norm()
                assert error < 0.03, (scale, M)
    assert len(log.graphs) <= 3
    assert "sparse24_mm" in {d.op for d in log.decisions}


@torch.no_grad()
def test_a_graph_on_another_stream() -> None:
    module, x = model(), tokens(MANY)
    compiled = torch.compile(module, backend="sparse")
    expected = compiled(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = compiled(x)
    stream.synchronize()
    assert torch.equal(again, expected)
