"""What Dynamo and AOTAutograd tell the pass: origin, parameters, branches, keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from tracing import calls, compile_eagerly

from inductor_sparse import decisions
from inductor_sparse.decisions import Reason, Status
from inductor_sparse.errors import SparsePlanError
from inductor_sparse.passes.joint_pass import SparsePass, hash_files
from inductor_sparse.plan import Plan, SitePlan


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) ** 2)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([FFN(), FFN()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.randn(2, 3, 8)


@torch.no_grad()
def decide(model: Any, *args: Tensor, **options: Any) -> list[decisions.Decision]:
    run = compile_eagerly(model, **options)
    expected = model(*(args or (X,)))
    torch.testing.assert_close(run(*(args or (X,))), expected)
    return run.decisions


def test_a_site_knows_where_it_comes_from() -> None:
    first, second = decide(Stack())
    assert (first.module, second.module) == ("layers.0.down", "layers.1.down")
    assert first.site == "layers.0.down:16x8"
    line = next(
        number
        for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if "self.down(F.relu" in text
    )
    assert first.source == f"test_joint_pass.py:{line}"
    assert first.shapes == {"M": 6, "K": 16, "N": 8}
    assert (first.dtype, first.device) == ("float32", "cpu")


def test_a_wrapping_function_does_not_change_the_path() -> None:
    model = Stack()
    assert [d.module for d in decide(lambda x: model(x))] == [
        "layers.0.down",
        "layers.1.down",
    ]


def test_functions_are_named_by_their_line() -> None:
    weight = torch.randn(16, 8).T
    (decision,) = decide(lambda x: (F.relu(x) ** 2) @ weight.mT.mT.contiguous(), X)
    assert decision.module == ""
    assert decision.site == f"{decision.source}:8x16"


def test_repeats_are_numbered() -> None:
    model = FFN()
    sites = [d.site for d in decide(lambda x: model(model(x)))]
    assert sites == ["down:16x8", "down:16x8#2"]


def test_parameters_buffers_and_the_rest() -> None:
    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(x), self.w)

    closure = torch.randn(6, 8)
    (decision,) = decide(Buffer())
    assert decision.status is Status.APPLIED
    (decision,) = decide(lambda x: F.linear(F.relu(x), closure))
    assert decision.reason is Reason.WEIGHT_NOT_STATIC
    (decision,) = decide(lambda x, w: F.linear(F.relu(x), w), X, closure)
    assert decision.reason is Reason.WEIGHT_NOT_STATIC


def test_tied_parameters() -> None:
    model = Stack()
    model.layers[1].down.weight = model.layers[0].down.weight
    first, second = decide(model)
    assert first.status is second.status is Status.APPLIED
    assert (first.weight_copy_bytes, second.weight_copy_bytes) == (16 * 8 * 4, 0)


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, x = FFN(), X.clone()
        run = compile_eagerly(model)
        run(x)
    assert [d.reason for d in run.decisions] == [Reason.WEIGHT_UNTRACKED]


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        first, second = decide(Stack())
    assert first.dtype == second.dtype == "bfloat16"
    assert first.weight_copy_bytes == 16 * 8 * 2


def test_dynamic_batch_keeps_one_graph() -> None:
    run = compile_eagerly(FFN(), dynamic=True)
    with torch.no_grad():
        run(X)
        run(torch.randn(4, 5, 8))
    assert len(run.graphs) == 1
    (decision,) = run.decisions
    assert decision.status is Status.APPLIED
    assert isinstance(decision.shapes["M"], str)


def test_vmap() -> None:
    weight = torch.randn(8, 6)

    def fn(x: Tensor) -> Tensor:
        return torch.vmap(lambda row: F.relu(row) ** 2 @ weight)(x)

    (decision,) = decide(fn)
    assert decision.status is Status.APPLIED


def test_branches_of_cond_are_recorded_and_left_alone() -> None:
    model = FFN()

    def fn(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: model(x), lambda x: x * 2, (x,))

    (decision,) = decide(fn)
    assert (decision.reason, decision.module) == (Reason.HIGHER_ORDER_OP, "down")
    assert "cond" in decision.detail


def test_frozen_parameters() -> None:
    with inductor_config.patch(freezing=True), torch.no_grad():
        run = compile_eagerly(Stack().eval())
        run(X)
    assert [d.status for d in run.decisions] == [Status.APPLIED] * 2


class Recorder:
    """A pass of a user: notes the matmuls it sees, and has an identity."""

    def __init__(self, identity: str | None = "recorder") -> None:
        self.identity = identity
        self.matmuls: list[int] = []

    def __call__(self, graph: fx.Graph) -> None:
        assert graph.owning_module is not None
        self.matmuls.append(len(calls(graph.owning_module, "mm")))

    def uuid(self) -> str | None:
        return self.identity


def test_users_passes_run_first() -> None:
    first, second = Recorder(), Recorder()
    run = compile_eagerly(Stack(), user_passes=(first, second))
    with torch.no_grad():
        run(X)
    assert first.matmuls == second.matmuls == [4]
    assert len(run.decisions) == 2


def test_uuid_tells_apart_what_compiles_differently() -> None:
    same = SparsePass({"strict": False}).uuid()
    assert SparsePass({"strict": False}).uuid() == same
    others = [
        SparsePass({"strict": True}),
        SparsePass({"strict": False}, demoted={}),
        SparsePass({"strict": False}, demoted={"down:16x8": 4}),
        SparsePass({"strict": False}, demoted={"down:16x8": 2}),
        SparsePass({"strict": False}, (Recorder(),)),
        SparsePass({"strict": False}, untracked_positions=frozenset({1})),
    ]
    assert len({same, *(other.uuid() for other in others)}) == 7


@pytest.mark.parametrize("user_pass", [Recorder(None), lambda graph: None])
def test_uuid_of_an_unknown_pass_bypasses_caches(user_pass: Any) -> None:
    assert SparsePass({}, (user_pass,)).uuid() is None


def test_uuid_depends_on_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    keys = []
    for density in (0.1, 0.2):
        Plan({"down:16x8": SitePlan(density, density, None, None, 1, 6)}).save(path)
        keys.append(SparsePass({"plan": str(path)}).uuid())
    assert keys[0] != keys[1]


def test_source_hash_follows_contents_and_names(tmp_path: Path) -> None:
    a, b = tmp_path / "a.py", tmp_path / "b.jinja"
    a.write_text("one")
    b.write_text("two")
    first = hash_files([a, b])
    assert hash_files([b, a]) == first
    b.write_text("three")
    assert hash_files([a, b]) != first


def test_plan_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan({"elsewhere:4x4": SitePlan(0.1, 0.1, None, None, 1, 6)}).save(path)
    run = compile_eagerly(FFN(), plan=str(path))
    with torch.no_grad(), pytest.raises(Exception, match="another model") as caught:
        run(X)
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, SparsePlanError)


def test_dump_shows_every_pass(tmp_path: Path) -> None:
    decide(FFN(), dump_dir=str(tmp_path))
    (index,) = tmp_path.glob("*/index.md")
    text = index.read_text()
    assert "relu_squared_matmul" in text
    assert "aten.mm: 2 -> 1" in text


def test_decisions_are_recorded() -> None:
    with decisions.collect() as log:
        decide(FFN())
    assert [d.site for d in log.decisions] == ["down:16x8"]
    assert log.graphs[0].other_matmuls == 1
