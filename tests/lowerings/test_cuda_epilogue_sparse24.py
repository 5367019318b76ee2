"""Epilogues in the kernel of ``sparse24_mm``: fused, and cheap in registers."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from fake_cuda import Compiled, Generated, compile_cuda, cuda_sources, generate
from torch import Tensor

from inductor_sparse import ops  # noqa: F401  (registers the ops)

Function = Callable[..., Any]

OPS = torch.ops.inductor_sparse
M, K, N = 8192, 16384, 4096


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


VALUES = empty(M, K // 2)
METADATA = empty(M // 64, K // 64, 128, dtype=torch.int32)
WEIGHT, BIAS, RESIDUAL = empty(N, K), empty(N), empty(M, N)


def fused(fn: Function, *others: Tensor, **options: Any) -> Generated:
    """``fn(product, *others)``, which must be one kernel."""

    def call(values: Tensor, metadata: Tensor, weight: Tensor, *rest: Tensor) -> Any:
        return fn(OPS.sparse24_mm(values, metadata, weight.t()), *rest)

    generated = generate(call, VALUES, METADATA, WEIGHT, *others, **options)
    assert len(generated.kernels) == len(generated.cuda_kernels) == 1
    return generated


def machine_code(generated: Generated, folder: Path) -> Compiled:
    (source,) = cuda_sources(generated.code).values()
    return compile_cuda(source, folder)


def instructions(generated: Generated, folder: Path) -> list[str]:
    """Names of the machine instructions of the one kernel, in order."""
    machine_code(generated, folder)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run(
        [tool, "-sass", folder / "kernel.cubin"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\d+ +)?([A-Z][\w.]*)", listing)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The kernel without an epilogue."""
    pytest.importorskip("cuda.bindings.nvrtc")
    return machine_code(fused(lambda y: y), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "fn",
    [
        lambda y, bias, residual: F.gelu(y + bias) + residual,
        lambda y, bias, residual: (F.silu(y + bias), y * residual),
        lambda y, bias, residual: (y + bias).view(8, 1024, N) + residual.view(8, -1, N),
        lambda y, bias, residual: (y + bias).float() + residual,
    ],
    ids=["gelu", "two-outputs", "three-dimensions", "float32"],
)
def test_an_epilogue_costs_no_spills(
    fn: Function, plain: Compiled, tmp_path: Path
) -> None:
    compiled = machine_code(fused(fn, BIAS, RESIDUAL), tmp_path)
    assert compiled.local <= plain.local
    assert compiled.registers == plain.registers
    assert "C75" not in compiled.log  # wgmma would be serialised


def test_loads_of_a_group_of_columns_start_together(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    listing = instructions(fused(lambda y, residual: y + residual, RESIDUAL), tmp_path)
    interesting = [name for name in listing if name.startswith(("LDG", "BRA", "STSM"))]
    runs = [len(list(group)) for name, group in itertools.groupby(interesting)]
    # 64 columns of a thread's two rows: 16 pairs.
    assert max(runs) >= 16
