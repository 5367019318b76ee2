"""Models spread over two processes: results, and what happens to their sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from two_processes import WAIT, at_once

SETUP = """
import copy, json, os
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, RowwiseParallel, parallelize_module
)
from torch.nn.parallel import DistributedDataParallel
from inductor_sparse.decisions import collect


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) ** 2)


def sharded(model, mesh):
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model, mesh):
    plan = {"0.up": ColwiseParallel(), "0.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)
"""

RUN = """
dist.init_process_group(
    "gloo",
    rank=int(os.environ["RANK"]),
    world_size=2,
    init_method="file://" + os.environ["RENDEZVOUS"],
)
line = init_device_mesh("cpu", (2,))
grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
WRAPS = {
    "DDP": DistributedDataParallel,
    "fully_shard": lambda model: sharded(model, line),
    "tensor parallel": lambda model: tensor_parallel(model, line),
    "both": lambda m: sharded(tensor_parallel(m, grid["tensor"]), grid["data"]),
}


def step(model, loss, train):
    weight = [p for name, p in model.named_parameters() if "down" in name][0]
    if train:
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
    else:
        weight.mul_(1.5)


def outcome(wrap, tokens, train):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager, x = nn.Sequential(FFN(), nn.Identity()), torch.randn(tokens, 64)
    model = WRAPS[wrap](copy.deepcopy(eager))
    errors = []
    with collect() as log, torch.set_grad_enabled(train):
        compiled = torch.compile(model, backend="sparse")
        for _ in range(3):
            y, expected = compiled(x), eager(x)
            errors.append(((y - expected).abs().max() / expected.abs().max()).item())
            step(model, y.square().mean(), train)
            step(eager, expected.square().mean(), train)
    reasons = [d.reason.value if d.reason else "applied" for d in log.decisions]
    return {"reasons": reasons, "error": max(errors)}


cases = json.loads(os.environ["CASES"])
print(json.dumps([outcome(*case) for case in cases]))
dist.destroy_process_group()
"""

# How the model is spread, tokens, whether it is trained, what happens to its site.
CASES = (
    ("DDP", 4, False, "applied"),
    ("DDP", 4, True, "applied"),
    ("DDP", 16, True, "training-graph"),
    ("fully_shard", 4, False, "weight-untracked"),
    ("fully_shard", 4, True, "weight-untracked"),
    ("tensor parallel", 4, False, "applied"),
    ("tensor parallel", 4, True, "applied"),
    ("both", 4, False, "weight-untracked"),
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What happened in each case, in each of the two processes."""
    folder: Path = tmp_path_factory.mktemp("two")
    printed = at_once(
        SETUP + WAIT + RUN,
        seconds=240,
        RENDEZVOUS=str(folder / "rendezvous"),
        CASES=json.dumps([case[:3] for case in CASES]),
        OMP_NUM_THREADS="1",
        TORCHINDUCTOR_FX_GRAPH_CACHE="0",
        TORCHINDUCTOR_AUTOGRAD_CACHE="0",
    )
    return [json.loads(text.splitlines()[-1]) for text in printed]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(c[:3]) for c in CASES])
def test_results_are_those_of_eager(
    index: int, outcomes: list[list[dict[str, Any]]]
) -> None:
    for process in outcomes:
        assert process[index]["reasons"] == [CASES[index][3]]
        assert process[index]["error"] < 1e-5
