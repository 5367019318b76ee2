"""What explain() says is what the backend does, and what its dump shows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from report_models import Stack, relu2, tokens
from torch import nn

from inductor_sparse.decisions import Decision, collect
from inductor_sparse.report.explain import explain


def ending(decision: Decision) -> tuple[object, ...]:
    return (decision.site, decision.rule, decision.status, decision.reason)


def test_explain_dump_and_backend_tell_the_same(tmp_path: Path) -> None:
    model, x = Stack(relu2, nn.functional.gelu).eval(), tokens(2, 5)
    said = {ending(decision) for decision in explain(model, x).sites}
    options = {"sparse.dump_dir": str(tmp_path / "dump")}
    compiled = torch.compile(model, backend="sparse", options=options)
    with collect() as log, torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert {ending(decision) for decision in log.decisions} == said
    (folder,) = (path for path in (tmp_path / "dump").iterdir() if path.is_dir())
    dumped = json.loads((folder / "decisions.json").read_text())["sites"]
    assert {site["site"] for site in dumped} == {key for key, *_ in said}
    index = (folder / "index.md").read_text()
    assert "| relu_squared_matmul |" in index
    assert "inductor_sparse.activation_spmm: 0 -> 1" in index
    assert "_forward.py](" in index
    passes = sorted(path.name for path in folder.glob("*_relu_squared_matmul.*"))
    assert [name.split(".", 1)[1] for name in passes] == [
        "after.py",
        "before.py",
        "diff",
    ]
