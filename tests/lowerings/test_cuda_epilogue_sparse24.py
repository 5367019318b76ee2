"""Epilogues in the kernel of ``sparse24_mm``: fused, and cheap in registers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import Compiled, Generated, compile_cuda, cuda_sources, generate
from machine_code import run_tool
from torch import Tensor

from inductor_sparse import ops  # noqa: F401  (registers the ops)

Function = Callable[..., Any]

OPS = torch.ops.inductor_sparse
M, K, N = 2048, 16384, 4096  # takes the tile of 128 x 256
LARGE_M = 8192  # takes that of 256 x 192


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


WEIGHT, BIAS, RESIDUAL = empty(N, K), empty(N), empty(M, N)


def fused(fn: Function, *others: Tensor, rows: int = M, **options: Any) -> Generated:
    """``fn(product, *others)``, which must be one kernel."""

    def call(values: Tensor, metadata: Tensor, weight: Tensor, *rest: Tensor) -> Any:
        return fn(OPS.sparse24_mm(values, metadata, weight.t()), *rest)

    packed = empty(rows, K // 2), empty(rows // 64, K // 64, 128, dtype=torch.int32)
    generated = generate(call, *packed, WEIGHT, *others, **options)
    assert len(generated.kernels) == len(generated.cuda_kernels) == 1
    return generated


def machine_code(generated: Generated, folder: Path) -> Compiled:
    (source,) = cuda_sources(generated.code).values()
    return compile_cuda(source, folder)


def instructions(generated: Generated, folder: Path) -> list[str]:
    """Names of the machine instructions of the one kernel, in order."""
    machine_code(generated, folder)
    listing = run_tool("cuobjdump", "-sass", folder / "kernel.cubin")
    return re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\d+ +)?([A-Z][\w.]*)", listing)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The kernel without an epilogue."""
    pytest.importorskip("cuda.bindings.nvrtc")
    return machine_code(fused(lambda y: y), tmp_path_factory.mktemp("plain"))


EPILOGUES: dict[str, Function] = {
    "gelu": lambda y, bias, residual: F.gelu(y + bias) + residual,
    "two outputs": lambda y, bias, residual: (F.silu(y + bias), y * residual),
    "three dimensions": lambda y, bias, residual: (
        (y + bias).view(8, -1, N) + residual.view(8, -1, N)
    ),
    "float32": lambda y, bias, residual: (y + bias).float() + residual,
}


@pytest.mark.parametrize("name", EPILOGUES)
def test_an_epilogue_costs_no_spills(
    name: str, plain: Compiled, tmp_path: Path
) -> None:
    compiled = machine_code(fused(EPILOGUES[name], BIAS, RESIDUAL), tmp_path)
    assert compiled.local <= plain.local
    assert compiled.registers == plain.registers
    assert "C75" not in compiled.log  # wgmma would be serialised


@pytest.mark.parametrize("name", ["gelu", "three dimensions"])
def test_where_sums_fill_the_registers_only_the_epilogue_spills(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    residual = empty(LARGE_M, N)
    generated = fused(EPILOGUES[name], BIAS, residual, rows=LARGE_M)
    names = [one.partition(".")[0] for one in instructions(generated, tmp_path)]
    products = [at for at, one in enumerate(names) if one.endswith("GMMA")]
    spilled = [at for at, one in enumerate(names) if one in ("LDL", "STL")]
    assert not [at for at in spilled if products[0] <= at <= products[-1]]
    # Once for each tile, beside tens of thousands of cycles of products.
    assert len(spilled) < 0.06 * len(names)


def test_loads_of_a_group_of_columns_start_together(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    listing = instructions(fused(lambda y, residual: y + residual, RESIDUAL), tmp_path)
    interesting = [name for name in listing if name.startswith(("LDG", "BRA", "STSM"))]
    runs = [len(list(group)) for name, group in itertools.groupby(interesting)]
    # 64 columns of a thread's two rows: 16 pairs.
    assert max(runs) >= 16
