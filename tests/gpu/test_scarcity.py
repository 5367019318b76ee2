"""Little memory, large weights, missing packages, and a cache that others write.

Shape legend: ``M`` tokens, ``K`` neurons, ``N`` features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from two_processes import WAIT, at_once

from inductor_sparse import decisions, formats, ops
from inductor_sparse.decisions import Reason
from inductor_sparse.passes import toolchains
from inductor_sparse.runtime import cubin_cache, nvrtc

pytestmark = [
    # Torch's own: it advises against full float32.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

BF16 = torch.bfloat16
PACKED = {"sparse.activation_format": "2:4"}


class Down(nn.Module):
    """The second half of a ReLU² FFN; the weight is zero but for its edges."""

    def __init__(self, features: int, neurons: int, edge: int) -> None:
        super().__init__()
        weight = torch.zeros(features, neurons, dtype=BF16, device="cuda")
        for rows in (weight[:edge], weight[-edge:]):
            rows.normal_().div_(neurons**0.5)
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(F.relu(z) ** 2, self.weight)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def run(module: Down, z: Tensor, **options: Any) -> tuple[Tensor, decisions.Decision]:
    with decisions.collect() as log:
        result = torch.compile(module, backend="sparse", options=options)(z)
    (decision,) = log.decisions
    return result, decision


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result.double(), expected, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("M", [1, 4, 200])
def test_a_weight_of_more_than_2_to_the_31_elements(M: int) -> None:
    K, N, edge = 2**18, 2**14, 64
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of memory")
    module = Down(N, K, edge)
    z = torch.randn(M, K, device="cuda", dtype=BF16) - 1
    way = PACKED if M > 4 else {"sparse.cuda_graphs": True}
    result, decision = run(module, z, **way)
    assert decision.op == ("sparse24_mm" if M > 4 else "activation_spmm")
    a = z.relu().square()
    if M > 4:
        a = formats.unpack(*ops.sparsify24(z, "relu2", "largest"), K)
    edges = torch.cat((module.weight[:edge], module.weight[-edge:]))
    expected = a.double() @ edges.double().t()
    close(torch.cat((result[:, :edge], result[:, -edge:]), 1), expected)
    assert not result[:, edge:-edge].any()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_no_memory_to_autotune_in(caplog: pytest.LogCaptureFixture) -> None:
    module, z = Down(1024, 4096, 512), torch.randn(512, 4096, device="cuda", dtype=BF16)
    expected = formats.unpack(*ops.sparsify24(z, "relu2", "largest"), 4096)
    expected = expected.double() @ module.weight.double().t()
    torch.cuda.empty_cache()
    # Enough for the results of the model, not for candidates and what they are held to.
    allowed = torch.cuda.memory_reserved() + 24 * 2**20
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        with caplog.at_level(logging.WARNING):
            result, decision = run(module, z, max_autotune=True, **PACKED)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert decision.op == "sparse24_mm"
    assert "memory" in caplog.text
    close(result, expected)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "unavailable_reason", lambda: "no NVRTC here")
    module, z = Down(512, 1024, 256), torch.randn(64, 1024, device="cuda", dtype=BF16)
    result, decision = run(module, z, **PACKED)
    assert decision.reason is Reason.NO_KERNEL_YET
    assert decision.detail == "sparse24_mm cannot run: no NVRTC here"
    assert torch.equal(result, module(z))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchains.triton_text, "available", lambda: False)
    module, z = Down(4096, 16384, 64), torch.randn(1, 16384, device="cuda", dtype=BF16)
    _, decision = run(module, z, **{"sparse.cuda_graphs": True})
    assert decision.reason is Reason.NO_KERNEL_YET
    assert "triton is missing" in decision.detail


# The package itself registers nothing; its lowerings bring the ops and their kernels.
PACK = """
import torch
import inductor_sparse.lowerings
sparse = torch.ops.inductor_sparse
z = torch.arange(64 * 256, device="cuda").view(64, 256).remainder(7).bfloat16()
w = torch.arange(512 * 256, device="cuda").view(512, 256).remainder(5).bfloat16()
packed = sparse.sparsify24(z, "relu", "largest")
torch.cuda.synchronize()
"""
MULTIPLY = """
print(sparse.sparse24_mm(*packed, w.t()).double().sum().item())
"""


def test_two_processes_fill_the_cache_at_once(tmp_path: Path) -> None:
    printed = at_once(PACK + WAIT + MULTIPLY, **{cubin_cache.VARIABLE: str(tmp_path)})
    assert len(set(printed)) == 1
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".cubin"]
