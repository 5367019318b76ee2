from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from inductor_sparse.bench import ffn, variants
from inductor_sparse.bench.ffn import Sweep, UnsettledError, row_key
from inductor_sparse.bench.models import ModelCase
from inductor_sparse.bench.quantized import QuantizedFFN
from inductor_sparse.bench.timing import Evictor
from inductor_sparse.bench.variants import SETTINGS, Variant
from inductor_sparse.decisions import (
    Decision,
    DecisionLog,
    GraphDecisions,
    Status,
    Tier,
)

CASE = ModelCase("down", False, "relu2", "float32", features=64, hidden=512)
SWEEP = Sweep((CASE,), tokens=(2,), densities=(0.1,), seconds=0.05)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leave no compiled graph behind."""
    yield
    variants.release()


@pytest.mark.slow
@pytest.mark.parametrize("op", ["down", "ffn"])
def test_a_row_has_all_fields_and_is_json(op: str, ffn_row: dict[str, Any]) -> None:
    case = dataclasses.replace(CASE, op=op, gated=op == "ffn")
    sweep = dataclasses.replace(SWEEP, cases=(case,), settings=SETTINGS[:1])
    messages: list[str] = []
    (row,) = ffn.run(sweep, messages.append)
    assert set(row) == set(ffn_row)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["op"] == op
    assert row["ratio"] == pytest.approx(row["dense_us"] / row["sparse_us"])
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["max_rel_err"] < 1e-5
    assert row["density_measured"] == pytest.approx(0.1, rel=0.2)
    assert (row["status"], row["sites_applied"]) == ("applied", 1)
    assert any("compiling sparse, default" in message for message in messages)


def test_denser_inputs_come_later() -> None:
    sweep = dataclasses.replace(SWEEP, densities=(0.5, 0.05, 0.1))
    assert sweep.remaining(CASE, 2) == (0.05, 0.1, 0.5)


def test_done_rows_are_not_measured_again(ffn_row: dict[str, Any]) -> None:
    case = dataclasses.replace(CASE, features=4096, hidden=16384)
    done = frozenset([row_key(ffn_row)])
    sweep = Sweep((case,), tokens=(1, 16), densities=(0.1, 0.5), done=done)
    assert sweep.size() == 3
    assert sweep.remaining(case, 1) == (0.5,)
    assert sweep.remaining(case, 16) == (0.1, 0.5)
    other = dataclasses.replace(case, dtype="bfloat16")
    assert sweep.remaining(other, 1) == (0.1, 0.5)


def test_a_finished_sweep_builds_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ModelCase, "build")
    done = frozenset([(*dataclasses.astuple(CASE), 2, 0.1)])
    assert list(ffn.run(dataclasses.replace(SWEEP, done=done))) == []


def bench(models: int = 1) -> ffn._Bench:
    """The measurement of one model or a stack, nothing compiled yet."""
    model = CASE.build()
    return ffn._Bench(SWEEP, CASE, [model] * models, 2, Evictor(2**40), print)


def test_a_quantized_model_is_what_both_sides_have() -> None:
    case = dataclasses.replace(CASE, op="ffn", quantize="fp8", quantized_model=True)
    both = dataclasses.replace(bench(), case=case, models=[case.build()])
    for side in ("inductor", "sparse"):
        assert isinstance(both._forms(side)[""], QuantizedFFN)
    assert "sparse.quantize" not in both._sparse_options([])
    wide = dataclasses.replace(case, quantized_model=False)
    asked = dataclasses.replace(both, case=wide)
    assert asked._forms("sparse")[""] is asked.model
    assert asked._sparse_options([])["sparse.quantize"] == "fp8"


def test_inputs_rotate_and_differ() -> None:
    first, second, *others = bench().inputs(0.1)
    assert len(others) == 14
    assert not first.equal(second)


def test_every_model_of_a_stack_has_its_own_input() -> None:
    first, *others = bench(models=3).inputs(0.1)
    assert len(others) == 3
    a, b, c = first
    assert not a.equal(b)
    assert not b.equal(c)


@pytest.mark.slow
def test_times_of_a_stack_are_those_of_one_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    three = bench(models=3)
    times = {"dense": [30.0, 30.0], "sparse": [15.0, 15.0]}
    monkeypatch.setattr(three, "_settled_times", lambda *_: times)
    inputs = three.inputs(0.1)
    three.sweep = dataclasses.replace(SWEEP, settings=SETTINGS[:1])
    sides = [three.fastest(side, inputs) for side in ("inductor", "sparse")]
    row = three.compare(*sides, inputs, {})
    assert (row["dense_us"], row["sparse_us"], row["ratio"]) == (10.0, 5.0, 2.0)
    assert (row["stacked"], row["sites_applied"]) == (3, 3)
    assert row["max_rel_err"] < 1e-5


def settle(monkeypatch: pytest.MonkeyPatch, recompiling_runs: int) -> tuple[int, Any]:
    """Runs made, and times kept, when the first runs each compile a graph."""
    log, runs = DecisionLog(), []

    def interleave(*_: object, **__: object) -> dict[str, list[float]]:
        runs.append(float(len(runs)))
        if len(runs) <= recompiling_runs:
            log.add(GraphDecisions("recompiled"))
        return {"dense": [runs[-1]], "sparse": [runs[-1]]}

    monkeypatch.setattr(ffn, "interleave", interleave)
    dense = Variant("inductor", SETTINGS[0], lambda x: x, DecisionLog(), [])
    sparse = Variant("sparse", SETTINGS[0], lambda x: x, log, [])
    times = bench()._settled_times(dense, sparse, bench().inputs(0.1), {})
    return len(runs), times


@pytest.mark.parametrize("recompiling_runs", [0, 1, 2])
def test_a_run_with_a_recompilation_is_timed_again(
    monkeypatch: pytest.MonkeyPatch, recompiling_runs: int
) -> None:
    runs, times = settle(monkeypatch, recompiling_runs)
    assert runs == recompiling_runs + 1
    assert times["sparse"] == [recompiling_runs]


def test_rejects_a_variant_that_never_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsettledError, match="recompiled in each of 3 runs"):
        settle(monkeypatch, recompiling_runs=3)


@pytest.mark.slow
def test_a_plan_of_its_own_inputs_decides() -> None:
    case = dataclasses.replace(CASE, calibrated=True)
    sweep = dataclasses.replace(
        SWEEP, cases=(case,), settings=SETTINGS[:1], densities=(0.1, 0.9)
    )
    sparse, dense = ffn.run(sweep)
    assert (sparse["status"], sparse["calibrated"]) == ("applied", True)
    assert (dense["status"], dense["reason"]) == ("dense", "too-dense")


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the benchmark compiles, by backend and setting; nothing is compiled."""
    made: list[tuple[str, str]] = []

    def compile_variant(
        model: Any, backend: str, setting: Any, inputs: Any, options: Any = None
    ) -> Variant:
        made.append((backend, setting.name))
        graph = GraphDecisions("graph", [DECISION])
        log = DecisionLog()
        log.add(graph)

        def call(x: Any) -> Any:
            with torch.no_grad():
                return model(x)

        return Variant(backend, setting, call, log, [], compile_s=1.0)

    monkeypatch.setattr(ffn, "compile_variant", compile_variant)
    return made


DECISION = Decision(
    *("down", "f.py:1", "rule", Tier.EXACT, Status.APPLIED, None, ""),
    shapes={},
    dtype="float32",
    device="cpu",
)


@pytest.mark.parametrize("adapts", [False, True])
def test_a_side_that_does_not_adapt_is_compiled_once(
    adapts: bool, monkeypatch: pytest.MonkeyPatch, compilations: list[Any]
) -> None:
    monkeypatch.setattr(ffn._Bench, "adapts", adapts)
    sweep = dataclasses.replace(SWEEP, densities=(0.1, 0.2, 0.4), settings=SETTINGS[:2])
    rows = list(ffn.run(sweep))
    settings = ["default", "freezing"]
    expected = [("inductor", name) for name in settings]
    expected += [("sparse", name) for name in settings] * (3 if adapts else 1)
    assert compilations == expected
    densities = [row["density_measured"] for row in rows]
    assert densities == pytest.approx([0.1, 0.2, 0.4], rel=0.2)
    for row in rows:
        assert set(row["sparse_candidates_us"]) == set(settings)
        assert (row["dense_compile_s"], row["sparse_compile_s"]) == (2.0, 2.0)
        assert row["max_rel_err"] < 1e-5


@pytest.mark.parametrize(
    ("device", "tokens", "calibrated", "adapts"),
    [
        ("cpu", 512, False, True),
        ("cuda", 16, False, True),
        ("cuda", 17, False, False),
        ("cuda", 17, True, True),
    ],
)
def test_only_many_tokens_on_a_gpu_are_decided_by_shape_alone(
    device: str, tokens: int, calibrated: bool, adapts: bool
) -> None:
    case = dataclasses.replace(CASE, device=device, calibrated=calibrated)
    one = ffn._Bench(SWEEP, case, [], tokens, Evictor(2**40), print)
    assert one.adapts is adapts


@pytest.mark.parametrize("installed", [False, True])
def test_torchao_is_one_more_dense_candidate(
    installed: bool, monkeypatch: pytest.MonkeyPatch, compilations: list[Any]
) -> None:
    theirs = lambda model: copy.deepcopy(model) if installed else None  # noqa: E731
    monkeypatch.setattr(ffn, "by_torchao", theirs)
    case = dataclasses.replace(CASE, quantize="fp8")
    sweep = dataclasses.replace(SWEEP, cases=(case,), settings=SETTINGS[:2])
    screened = iter([5.0, 4.0, 3.0, 6.0, 1.0, 2.0] if installed else [5.0, 4.0, 1.0, 2])
    monkeypatch.setattr(ffn._Bench, "screen", lambda *_: next(screened))
    monkeypatch.setattr(ffn, "quantized", lambda model, _: model)
    (row,) = ffn.run(sweep)
    found = row["dense_candidates_us"]
    assert found["freezing"] == 4.0
    assert found.get("torchao, default") == (3.0 if installed else None)
    assert row["baseline"] == ("torchao, default" if installed else "freezing")
    assert set(row["sparse_candidates_us"]) == {"default", "freezing"}
    assert row["sparse_setting"] == "default"


def test_a_torchao_that_does_not_compile_is_left_out(
    monkeypatch: pytest.MonkeyPatch, compilations: list[Any]
) -> None:
    made = ffn.compile_variant

    def compile_variant(model: Any, *rest: Any) -> Variant:
        if isinstance(model, torch.nn.Identity):
            raise RuntimeError("no such graph")
        return made(model, *rest)

    monkeypatch.setattr(ffn, "compile_variant", compile_variant)
    monkeypatch.setattr(ffn, "by_torchao", lambda model: torch.nn.Identity())
    monkeypatch.setattr(ffn, "quantized", lambda model, _: model)
    case = dataclasses.replace(CASE, quantize="fp8")
    sweep = dataclasses.replace(SWEEP, cases=(case,), settings=SETTINGS[:1])
    (row,) = ffn.run(sweep)
    assert set(row["dense_candidates_us"]) == {"default"}
