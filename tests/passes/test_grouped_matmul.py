"""Experts that are computed as one grouped matmul are recorded, and left dense."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tracing import listing, rewrite, trace

from inductor_sparse.decisions import Reason, Status

BF16 = torch.bfloat16
SIZES = ((64, 256), (4, 256, 128))


def operands() -> list[Tensor]:
    made = [torch.empty(*size, dtype=BF16, device="meta") for size in SIZES]
    return [*made, torch.empty(4, dtype=torch.int32, device="meta")]


def recorded(activation: Any) -> Any:
    def experts(z: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(activation(z), w, ends)

    gm = trace(experts, *operands(), device="cuda")
    before = listing(gm)
    record = rewrite(gm, static=[1], architecture=lambda device: "sm_90")
    assert listing(gm) == before
    return record


def test_experts_are_sites_without_a_kernel() -> None:
    (decision,) = recorded(lambda z: F.relu(z) ** 2).decisions
    assert (decision.status, decision.reason) == (Status.DENSE, Reason.NO_KERNEL_YET)
    assert decision.rule == "relu_squared_matmul"
    assert decision.detail == "a grouped matmul, one weight for each group of tokens"
    assert decision.shapes == {"M": 64, "K": 256, "N": 128}


def test_other_experts_are_none() -> None:
    assert recorded(F.silu).decisions == []
    assert recorded(lambda z: z + 1).decisions == []


def test_the_backward_has_no_sites() -> None:
    def experts(a: Tensor, w: Tensor, ends: Tensor, tangents: Tensor) -> Tensor:
        forward = torch._grouped_mm(F.relu(a), w, ends)
        return forward + torch._grouped_mm(F.relu(tangents), w, ends)

    gm = trace(experts, *operands(), operands()[0], device="cuda")
    tangents = gm.graph.find_nodes(op="placeholder")[3]
    tangents.name = tangents.target = "tangents_1"
    gm.recompile()
    record = rewrite(gm, architecture=lambda device: "sm_90")
    assert len(record.decisions) == 1
