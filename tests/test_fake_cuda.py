"""The harness that generates CUDA code without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_cuda import compile_cuda, compile_triton, fake_cuda, generate
from torch import Tensor, nn
from torch.utils._triton import has_triton

from inductor_sparse.decisions import Tier


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    return (a.relu() + b) * 2


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a")],
)
def test_a_pointwise_function_becomes_one_compiled_kernel(
    capability: tuple[int, int], target: str, tmp_path: Path
) -> None:
    generated = generate(add_relu, empty(64, 64), empty(64, 64), capability=capability)
    assert len(generated.kernels) == 1
    (compiled,) = compile_triton(generated, tmp_path, capability).values()
    assert f".target {target}\n" in compiled.ptx
    assert compiled.registers > 0
    assert compiled.local == 0


def test_a_symbolic_size_stays_a_symbol() -> None:
    # A number that is not in the path of a cache by chance.
    rows = 123457
    generated = generate(add_relu, empty(rows, 64), empty(rows, 64), dynamic=rows)
    assert "arg0_1.size()" in generated.code
    assert str(rows) not in generated.code[: generated.code.index("def get_args")]


def test_strides_survive_and_follow_the_symbol() -> None:
    generated = generate(lambda a: a + 1, empty(64, 96).t(), dynamic=96)
    (given,) = generated.fx_graph.graph.find_nodes(op="placeholder")
    fake = given.meta["val"]
    assert fake.stride(1) == fake.shape[0]
    assert fake.stride(0) == 1


def test_the_passes_run_when_options_are_given() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    generated = generate(model, empty(8, 64, dtype=torch.float32), options={})
    (decision,) = generated.decisions
    assert decision.device == "cuda"
    assert decision.shapes == {"M": 8, "K": 256, "N": 64}
    assert decision.tier is Tier.EXACT
    assert generate(model, empty(8, 64, dtype=torch.float32)).decisions == ()


def test_nothing_is_left_behind() -> None:
    before = torch.cuda.is_available(), has_triton(), torch.version.cuda
    with fake_cuda((8, 9)):
        assert torch.cuda.is_available()
        assert has_triton()
        assert torch.cuda.get_device_capability() == (8, 9)
    assert (torch.cuda.is_available(), has_triton(), torch.version.cuda) == before
    generate(add_relu, empty(8, 8), empty(8, 8))
    a, b = torch.randn(2, 8, 8)
    torch.testing.assert_close(torch.compile(add_relu)(a, b), add_relu(a, b))


def test_cuda_text_is_compiled_to_machine_code(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    source = 'extern "C" __global__ void twice(float *x) { x[threadIdx.x] *= 2.f; }'
    compiled = compile_cuda(source, tmp_path)
    assert ".target sm_90a" in compiled.ptx
    assert "0 bytes spill stores" in compiled.log
    assert compiled.local == 0
    with pytest.raises(AssertionError, match="undefined_name"):
        compile_cuda("__global__ void k() { undefined_name(); }", tmp_path)
