"""Between processes: caches, and what other backends must not notice of us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys, logging
import torch
from torch import nn

backend, options, sparse_first, hidden = json.loads(sys.argv[1])


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, hidden)
        self.down = nn.Linear(hidden, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) ** 2)


torch.manual_seed(0)
model, x = FFN(), torch.randn(9, 16)
from torch._inductor.utils import run_and_get_code
with torch.no_grad():
    if sparse_first:
        torch.compile(model, backend="sparse")(x)
        torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, options=options)
    y, codes = run_and_get_code(compiled, x)
    error = (y - model(x)).abs().max().item()
# The first line of the code numbers the graphs of the process.
codes = [code.partition("\\n")[2] for code in codes]
result = {"y": y.tolist(), "codes": codes, "error": error}
if backend == "sparse":
    from inductor_sparse.decisions import LOG
    result["from_cache"] = [graph.from_cache for graph in LOG.graphs]
    result["applied"] = len([d for d in LOG.decisions if d.reason is None])
    compiled(torch.randn(9, 16))
print("RESULT" + json.dumps(result))
"""


def run(
    backend: str,
    options: dict[str, Any] | None = None,
    *,
    sparse_first: bool = False,
    hidden: int = 64,
    **env: str,
) -> tuple[dict[str, Any], str]:
    """The result of :data:`SCRIPT` in a process of its own, and what it logged."""
    argument = json.dumps([backend, options, sparse_first, hidden])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [s for s in done.stdout.splitlines() if s.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT")), done.stderr


WARM = "a compiled graph was loaded from Inductor's cache"


@pytest.mark.slow
def test_caches_are_shared_and_announced() -> None:
    # In the folder of this run of the tests, by a size that no other test has: in an
    # empty one Inductor compiles for a quarter of a minute to see what the CPU can do.
    hidden = 88
    cold, log = run("sparse", hidden=hidden)
    assert cold["from_cache"] == [False]
    assert cold["applied"] == 1
    assert WARM not in log
    warm, log = run("sparse", hidden=hidden)
    assert warm["from_cache"] == [True]
    assert log.count(WARM) == 1
    assert warm["y"] == cold["y"]
    other, log = run("sparse", {"sparse.max_density": 0.5}, hidden=hidden)
    assert other["from_cache"] == [False]
    assert WARM not in log
    assert max(cold["error"], warm["error"], other["error"]) < 1e-5


@pytest.mark.slow
def test_inductor_is_the_same_with_and_without_us() -> None:
    # No graph of the one process may come out of a cache that the other filled.
    no_caches = {
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    }
    alone, _ = run("inductor", **no_caches)
    beside, _ = run("inductor", sparse_first=True, **no_caches)
    assert beside == alone
    assert len(alone["codes"]) == 1
