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
for op, gated in (("down", False), ("ffn", False), ("ffn", True)):
    for activation in ("relu2", "relu"):
        case = models.ModelCase(op, gated, activation, "float32", 40, 72)
        model = case.build()
        x = case.make_input(3, 0.3, seed=1)
        calls = teal_baseline.candidates(model)
        assert list(calls) == ["16x512", "32x256", "64x128", "128x64"]
        for call in calls.values():
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-5)
z, x, w = torch.tensor([[1.0, -1.0]] * 2), torch.ones(2, 3), torch.ones(2, 3)
kernel = teal_baseline.MaskedLoad(w, "relu", 16, 16)
assert kernel.up(z, x, w).tolist() == [[3.0, 0.0]] * 2  # only rows that are needed
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
