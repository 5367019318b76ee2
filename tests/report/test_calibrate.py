"""calibrate(): a plan with what was measured over all batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from report_models import FEATURES, FFN, HIDDEN, Broken, Stack, relu2, tokens
from torch import Tensor, nn

from inductor_sparse.errors import SparsePlanError
from inductor_sparse.plan import Plan
from inductor_sparse.report.calibrate import calibrate

DOWN = f"down:{HIDDEN}x{FEATURES}"


def operand(model: FFN, x: Tensor) -> Tensor:
    with torch.no_grad():
        return relu2(model.up(x))


def test_plan_holds_mean_and_worst_over_batches(tmp_path: Path) -> None:
    model = FFN()
    batches = [(tokens(4),), (tokens(2) * 0,)]
    path = tmp_path / "plans" / "plan.json"
    plan = calibrate(model, batches, path)
    assert Plan.load(path) == plan
    site = plan.sites[DOWN]
    nonzeros = [int((operand(model, x) != 0).sum()) for (x,) in batches]
    assert site.density == sum(nonzeros) / (6 * HIDDEN)
    assert site.max_density == max(nonzeros[0] / 4, nonzeros[1] / 2) / HIDDEN
    assert (site.calls, site.tokens) == (2, 6)
    assert site.dropped_energy is not None and site.max_dropped_energy is not None
    assert 0 < site.dropped_energy <= site.max_dropped_energy


def test_sizes_that_vary_merge_under_one_key() -> None:
    plan = calibrate(FFN(), [tokens(rows) for rows in (1, 2, 3, 5, 8)])
    assert list(plan.sites) == [DOWN]
    assert (plan.sites[DOWN].calls, plan.sites[DOWN].tokens) == (5, 19)


@pytest.mark.parametrize(
    "batch", [(tokens(2),), [tokens(2)], {"x": tokens(2)}, tokens(2)]
)
def test_forms_of_a_batch(batch: Any) -> None:
    assert calibrate(FFN(), [batch]).sites[DOWN].tokens == 2


def test_generator_of_batches_and_graph_breaks() -> None:
    def batches() -> Iterator[Tensor]:
        yield tokens(2)
        yield tokens(2)

    plan = calibrate(Broken(relu2, nn.functional.gelu), batches())
    calls = {key: site.calls for key, site in plan.sites.items()}
    assert calls == {f"first.{DOWN}": 2, f"second.{DOWN}": 2}
    plan.check_matches([f"second.{DOWN}"])


def test_dense_sites_are_measured_too() -> None:
    plan = calibrate(Stack(nn.functional.gelu), [tokens(3)])
    (site,) = plan.sites.values()
    assert site.density == 1.0


def test_plan_option_is_not_applied_while_calibrating(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("not a plan")
    options = {"sparse.plan": str(path), "sparse.strict": True}
    assert DOWN in calibrate(FFN(), [tokens(2)], path, options=options).sites
    assert DOWN in Plan.load(path).sites


def test_no_batch_is_an_error() -> None:
    with pytest.raises(SparsePlanError, match="at least one"):
        calibrate(FFN(), [])


def test_only_empty_tensors_give_an_empty_plan() -> None:
    assert calibrate(FFN(), [tokens(0)]).sites == {}


def test_calibrated_plan_is_taken_by_explain(tmp_path: Path) -> None:
    from inductor_sparse.report.explain import explain

    path = tmp_path / "plan.json"
    model = FFN()
    calibrate(model, [tokens(4)], path)
    options = {"sparse.plan": str(path), "sparse.max_density": 0.01}
    (site,) = explain(model, tokens(4), options=options).to_dict()["sites"]
    assert site["reason"] == "too-dense"
    assert f"{site['density']:.3g}" in site["detail"]
