"""The one-page examples run, and print what they are there to show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import hf_ffn
import pytest
import read_a_dump
import torch
import write_a_rule

from inductor_sparse import passes


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    yield
    for rule in passes.registered():
        passes.unregister(rule.name)
    torch.compiler.reset()


@pytest.mark.slow
def test_hf_ffn_runs_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    hf_ffn.main()
    printed = capsys.readouterr().out
    assert "1 of 1 site" in printed
    assert "relu_squared_matmul (exact)" in printed
    assert printed.endswith("gives the same numbers as the eager one.\n")


@pytest.mark.slow
def test_own_rule_takes_the_site(capsys: pytest.CaptureFixture[str]) -> None:
    write_a_rule.main()
    before, _, after = capsys.readouterr().out.partition("With the rule:")
    assert "no candidate site" in before
    assert "winners_matmul (exact)" in after
    assert after.endswith("gives the same numbers as eager PyTorch.\n")


@pytest.mark.slow
def test_dump_is_read_from_start_to_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["read_a_dump.py", str(tmp_path / "dump")])
    read_a_dump.main()
    printed = capsys.readouterr().out
    assert "2:256x64: applied activation_spmm" in printed
    assert "5:256x64: dense clipped-activation" in printed
    assert "inductor_sparse.activation_spmm.default(addmm" in printed
    (graph,) = (path for path in (tmp_path / "dump").iterdir() if path.is_dir())
    assert all(path.name in printed for path in graph.iterdir())
    assert len(json.loads((graph / "decisions.json").read_text())["sites"]) == 2
