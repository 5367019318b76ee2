"""The masked-load kernel of the benchmark, run by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from inductor_sparse.bench import models, teal_baseline
for op in ("down", "ffn"):
    for activation in ("relu2", "relu"):
        case = models.ModelCase(op, False, activation, "float32", 40, 72)
        model = case.build()
        x = case.make_input(3, 0.3, seed=1)
        calls = teal_baseline.candidates(model)
        assert list(calls) == ["16x512", "32x256", "64x128", "128x64"]
        for call in calls.values():
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-5)
gated = models.ModelCase("ffn", True, "relu", "float32", 40, 72).build()
assert teal_baseline.candidates(gated) == {}
print("right")
"""


@pytest.mark.slow
def test_every_tile_computes_the_product() -> None:
    # The interpreter is chosen when a kernel is defined: it needs its own process.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "right", done.stderr
