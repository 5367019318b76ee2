"""What the runtime keeps is never the memory of something else."""

from __future__ import annotations

import re

import pytest
import torch
from fake_cuda import generate
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

sparse = torch.ops.inductor_sparse


def test_the_copy_of_a_weight_is_not_written_into() -> None:
    def fn(x: Tensor, w: Tensor, *, kept: bool) -> Tensor:
        if kept:
            copy = sparse.row_major_weight(w, [64, 64], [1, 64], 0, torch.float32)
        else:
            copy = torch.mm(w, w)
        return torch.mm(torch.mm(x, copy), x)

    inputs = [torch.empty(64, 64, device="meta") for _ in range(2)]
    reused = {
        kept: re.findall(
            r"reuse", generate(lambda *args, k=kept: fn(*args, kept=k), *inputs).code
        )
        for kept in (False, True)
    }
    assert len(reused[False]) == 1  # where it can, Inductor does
    assert reused[True] == []


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_generated_code_calls_the_functions_behind_the_ops(
    dynamic: bool, partitioned: bool
) -> None:
    module, z = nn.Sequential(nn.ReLU(), nn.Linear(64, 32)).eval(), torch.randn(16, 64)
    with config.patch(graph_partition=partitioned):
        compiled = torch.compile(module, backend="sparse", dynamic=dynamic)
        result, (code,) = run_and_get_code(compiled, z)
    torch.testing.assert_close(result, module(z))
    assert "from inductor_sparse.runtime import kept_tensors" in code
    for name in ("row_major_weight", "site_counters"):
        assert code.count(f"= kept_tensors.{name}(") == 1
        assert f"= torch.ops.inductor_sparse.{name}" not in code
    module[1].weight.neg_()
    torch.testing.assert_close(compiled(z), module(z))


def test_a_wrapper_in_cpp_calls_the_op() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        copy = sparse.row_major_weight(w, [64, 64], [1, 64], 0, torch.float32)
        return torch.mm(x, copy)

    inputs = [torch.empty(64, 64, device="meta") for _ in range(2)]
    code = generate(fn, *inputs, inductor={"cpp_wrapper": True}).code
    assert "kept_tensors." not in code
    assert "row_major_weight" in code
