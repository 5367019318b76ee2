"""``inductor_sparse.report()``: what runs sparse in this process, and what it drops."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import inductor_sparse
from inductor_sparse import decisions
from inductor_sparse.decisions import Decision, GraphDecisions, Reason, Status, Tier
from inductor_sparse.report.sites import ReportedSite
from inductor_sparse.runtime import site_energy


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> decisions.DecisionLog:
    monkeypatch.setattr(site_energy, "_sites", {})
    monkeypatch.setattr(site_energy, "_unsettled", [])
    log = decisions.DecisionLog()
    monkeypatch.setattr(decisions, "LOG", log)
    return log


def decided(site: str, tier: Tier, reason: Reason | None = None) -> Decision:
    return Decision(
        module=site,
        source="",
        rule="relu_squared_matmul",
        tier=tier,
        status=Status.APPLIED if reason is None else Status.DENSE,
        reason=reason,
        detail="",
        shapes={"M": 1, "K": 64, "N": 16},
        dtype="float32",
        device="cpu" if tier is Tier.EXACT else "cuda:0",
        site=site,
    )


def run(site: str, kept: float, total: float) -> None:
    energy = torch.ops.inductor_sparse.site_energy(torch.zeros(1), site)
    energy[0] += torch.tensor([kept, total])


def test_sites_as_they_ran(log: decisions.DecisionLog) -> None:
    sites = [
        decided("exact:64x16", Tier.EXACT),
        decided("dense:64x16", Tier.EXACT, Reason.TOO_DENSE),
        decided("packed:64x16", Tier.APPROXIMATE),
        decided("waiting:64x16", Tier.APPROXIMATE),
    ]
    log.add(GraphDecisions("graph", sites))
    log.add(GraphDecisions("compiled again", sites))
    run("packed:64x16", 30, 40)
    run("cached:64x16", 0, 0)
    report = inductor_sparse.report()
    assert report.sites == (
        ReportedSite("exact:64x16", "cpu", "exact", None, None, None),
        ReportedSite("waiting:64x16", "cuda:0", "2:4", None, None, None),
        ReportedSite("packed:64x16", "cpu", "2:4", 1, 0.75, 0.25),
        ReportedSite("cached:64x16", "cpu", "2:4", 1, None, None),
    )


def test_text_and_dict() -> None:
    run("layers.0.down:64x16", 39, 40)
    run("up:16x64", 40, 40)
    report = inductor_sparse.report()
    assert str(report).splitlines() == [
        "site                 device  format  calls    kept  dropped",
        "layers.0.down:64x16  cpu     2:4         1  97.5 %    2.5 %",
        "up:16x64             cpu     2:4         1   100 %      0 %",
    ]
    assert repr(report) == str(report)
    assert json.loads(json.dumps(report.to_dict()))["sites"][1] == {
        "site": "up:16x64",
        "device": "cpu",
        "format": "2:4",
        "calls": 1,
        "kept_energy": 1.0,
        "dropped_energy": 0.0,
    }


def test_nothing_to_report() -> None:
    assert str(inductor_sparse.report()).startswith("no site runs sparse")


@pytest.mark.parametrize(
    "imports",
    ["import inductor_sparse.report.explain", "from inductor_sparse import report"],
)
def test_the_package_of_reports_can_be_called(imports: str) -> None:
    code = f"""
import inductor_sparse
{imports}
print(inductor_sparse.report())
from inductor_sparse.report.explain import explain
assert inductor_sparse.explain is explain
assert inductor_sparse.report.explain.__name__ == "inductor_sparse.report.explain"
print(inductor_sparse.report())
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("no site runs sparse") == 2
