from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from inductor_sparse.bench import ffn, variants
from inductor_sparse.bench.ffn import Sweep, UnsettledError, row_key
from inductor_sparse.bench.models import ModelCase
from inductor_sparse.bench.timing import Evictor
from inductor_sparse.bench.variants import SETTINGS, Variant
from inductor_sparse.decisions import DecisionLog, GraphDecisions

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
    sides = [
        variants.compile_variant(three._whole("none"), side, SETTINGS[0], inputs)
        for side in ("inductor", "sparse")
    ]
    row = three.compare(*sides, inputs)
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
