"""What importing costs, in processes that have imported nothing yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

import inductor_sparse

HEAVY = ("rich", "triton", "matplotlib", "torch._inductor", "torch._dynamo")


def fresh_python(code: str, **environment: str) -> Any:
    """Run ``code`` in a new interpreter and decode the JSON it prints last."""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_import_loads_nothing_else() -> None:
    code = "import json, sys, inductor_sparse; print(json.dumps(sorted(sys.modules)))"
    modules = fresh_python(code)
    assert "torch" not in modules
    assert [m for m in modules if m.startswith("inductor_sparse.")] == []


def test_options_reasons_and_errors_need_no_compiler() -> None:
    code = """
import json, sys, torch
before = set(sys.modules)
import inductor_sparse
inductor_sparse.config, inductor_sparse.decisions, inductor_sparse.errors
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    assert [m for m in fresh_python(code) if m.startswith(HEAVY)] == []


def test_import_is_quick() -> None:
    # The best of three: a busy machine can only make an import slower.
    code = """
import json, sys, time, torch
seconds = []
for _ in range(3):
    sys.modules.pop("inductor_sparse", None)
    start = time.perf_counter()
    import inductor_sparse
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""
    assert min(fresh_python(code)) < 0.1


def test_backend_is_listed_without_importing_us() -> None:
    code = """
import json, sys, torch, torch._dynamo
names = torch._dynamo.list_backends()
print(json.dumps([names, "inductor_sparse" in sys.modules]))
"""
    names, imported = fresh_python(code)
    assert "sparse" in names
    assert not imported


def test_entry_point_names_the_backend() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="sparse")
    assert entry.value == "inductor_sparse.backend:sparse"
    assert callable(entry.load())


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"TORCH_LOGS": "+inductor_sparse"}])
def test_backend_works_by_name_alone(environment: dict[str, str]) -> None:
    # With TORCH_LOGS naming us, torch walks through the package while it is itself
    # only half imported; that must not leave anything half registered behind.
    code = """
import json, torch
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(),
                            torch.nn.Linear(32, 8)).eval()
x = torch.randn(4, 8)
with torch.no_grad():
    difference = torch.compile(model, backend="sparse")(x) - model(x)
print(json.dumps(difference.abs().max().item()))
"""
    assert fresh_python(code, **environment) < 1e-5


@pytest.mark.parametrize("name", inductor_sparse.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(inductor_sparse, name) is not None
    assert name in dir(inductor_sparse)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = inductor_sparse.no_such_name
