from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.cpu_vec_isa import pick_vec_isa

from inductor_sparse.bench import tables
from inductor_sparse.errors import NothingAppliedError

bench = importlib.import_module("inductor_sparse.bench.compile")
SMALL = bench.CompileCase(layers=1, features=32, hidden=64, heads=2, tokens=4, rounds=5)


def scripted(monkeypatch: pytest.MonkeyPatch, sparse_s: float, applied: int) -> None:
    """Replace compilation by one that takes 10 s, or ``sparse_s`` for our backend."""

    def compile_seconds(
        model: nn.Module, backend: str, x_BTD: Tensor
    ) -> tuple[float, int]:
        sparse = backend == "sparse"
        return (sparse_s, applied) if sparse else (10.0, 0)

    monkeypatch.setattr(bench, "compile_seconds", compile_seconds)


def test_the_ratio_is_sparse_over_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, sparse_s=10.5, applied=1)
    messages: list[str] = []
    row = bench.run(SMALL, messages.append)
    assert row["ratio"] == row["ratio_low"] == row["ratio_high"] == 1.05
    assert (row["inductor_s"], row["sparse_s"]) == (10.0, 10.5)
    assert row["verdict"] == "slower"
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert len(messages) == 12
    (cells,) = tables.cells(tables.COMPILE, [row])
    assert "1.05x [1.05, 1.05]" in cells


def test_rejects_a_model_that_was_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, sparse_s=10.0, applied=0)
    with pytest.raises(NothingAppliedError, match="rewrote no site"):
        bench.run(SMALL)


def test_the_model_is_a_residual_relu2_stack() -> None:
    block = bench.Block(32, 64, 2).eval()
    x_BTD = torch.randn(2, 4, 32)
    with torch.no_grad():
        block.out.weight.zero_()
        expected = x_BTD + block.down(block.up(block.ffn_norm(x_BTD)).relu() ** 2)
        torch.testing.assert_close(block(x_BTD), expected)


@pytest.mark.slow
def test_compilation_starts_from_nothing_each_time() -> None:
    # Once in the folder of this run: an empty one has no answer of the compiler's yet.
    pick_vec_isa()
    x_BTD = torch.randn(1, 64, 64)
    model = bench.Block(64, 256, 2).eval()
    seconds, applied = bench.compile_seconds(model, "sparse", x_BTD)
    assert applied == 1
    assert seconds > 0.5
