"""What the runtime keeps is never the memory of something else."""

from __future__ import annotations

import re

import torch
from fake_cuda import generate
from torch import Tensor

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
