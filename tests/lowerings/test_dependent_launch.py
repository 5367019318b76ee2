"""Kernels for few tokens are launched early where CUDA graphs launch them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from torch import Tensor, nn

from inductor_sparse import config
from inductor_sparse.lowerings import dependent_launch

OPS = torch.ops.inductor_sparse
SIZES = ((1, 4096), (1, 1024), (4096, 1024), (4096, 1024))


def meta(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device="meta")


def gated(gate: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return OPS.glu_spmm(gate, x, w_up, w_down, "relu")


def launched_early(code: str) -> list[bool]:
    """Of each Triton kernel: whether it is launched early, and waits itself."""
    early = []
    for source in fake_cuda.triton_sources(code).values():
        waits = "gdc_wait()" in source
        assert waits == ("'launch_pdl': True" in source)
        early.append(waits)
    return early


def body(source: str) -> list[str]:
    """The lines of a kernel behind its arguments and the sizes it was given."""
    lines = [line.strip() for line in source.split("@triton.jit")[1].splitlines()]
    return [line for line in lines[2:] if line and " : tl.constexpr = " not in line]


@pytest.mark.parametrize(
    ("capability", "captured", "expected"),
    [((9, 0), True, True), ((9, 0), False, False), ((8, 9), True, False)],
    ids=str,
)
def test_only_by_cuda_graphs_and_from_sm_90_on(
    capability: tuple[int, int], captured: bool, expected: bool
) -> None:
    made = fake_cuda.generate(
        gated,
        *(meta(*size) for size in SIZES),
        capability=capability,
        inductor={"triton.cudagraphs": captured},
    )
    assert launched_early(made.code) == [expected] * 3


def test_not_on_gpus_of_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    device = torch.device("cuda", 0)
    with config.patch(cuda_graphs=True):
        assert dependent_launch.options(device)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert dependent_launch.options(device) == {}


def test_not_beside_kernels_that_do_not_wait() -> None:
    def filling(*operands: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(operands[0]).clone()
        return OPS.activation_spmm(*operands, "relu"), ones

    inductor = {"triton.cudagraphs": True, "triton.enable_pdl": True}
    made = fake_cuda.generate(
        filling, meta(1, 4096), meta(4096, 1024), inductor=inductor
    )
    sources = list(fake_cuda.triton_sources(made.code).values())
    # Inductor's own kernel is the reason: it is launched early, and waits for nothing.
    (own,) = (source for source in sources if "'launch_pdl': True" in source)
    assert "gdc_wait()" not in own
    assert len(sources) == 3
    assert sum("gdc" in source for source in sources) == 0


def test_a_kernel_waits_before_it_touches_memory(tmp_path: Path) -> None:
    tensors = [meta(*size) for size in SIZES]
    made = fake_cuda.generate(gated, *tensors, inductor={"triton.cudagraphs": True})
    sources = list(fake_cuda.triton_sources(made.code).values())
    for source in sources:
        before, _ = "\n".join(body(source)).split("tl.extra.cuda.gdc_wait()")
        assert "tl.load" not in before and "tl.store" not in before
    for source in sources[:2]:  # nothing of ours follows the last one
        results = source.split("gdc_launch_dependents()")[1].split("@triton.jit")[0]
        assert "tl.store" in results
    assert "gdc_launch_dependents" not in sources[2]
    for compiled in fake_cuda.compile_triton(made, tmp_path).values():
        wait = compiled.ptx.index("griddepcontrol.wait")
        assert "ld.global" not in compiled.ptx[:wait]


@pytest.mark.parametrize(("tokens", "first"), [(1, True), (2, False), (8, False)])
def test_when_the_next_kernel_may_come(tokens: int, first: bool) -> None:
    made = fake_cuda.generate(
        lambda z, w: OPS.activation_spmm(z, w, "relu"),
        *(meta(tokens, 4096), meta(4096, 1024)),
        inductor={"triton.cudagraphs": True},
    )
    kernel = "\n".join(body(next(iter(fake_cuda.triton_sources(made.code).values()))))
    (before, behind) = kernel.split("tl.extra.cuda.gdc_launch_dependents()")
    assert "sums_of_share(" in (behind if first else before)


class FFN(nn.Module):
    """28672 neurons, as a large model has."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8192, 28672, bias=False, device="meta").bfloat16()
        self.down = nn.Linear(28672, 8192, bias=False, device="meta").bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).square())


@pytest.mark.parametrize("captured", [True, False])
def test_graphs_that_the_caller_captures(captured: bool) -> None:
    options: dict[str, Any] = {"cuda_graphs": captured, "adaptive": False}
    made = fake_cuda.generate(FFN(), meta(1, 8192), options=options)
    (decision,) = made.decisions
    assert decision.cuda_graphs == captured
    if captured:
        assert launched_early(made.code) == [True, True]
