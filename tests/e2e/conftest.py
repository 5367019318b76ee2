"""Settings of the end-to-end tests: nothing is learned from another test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Forget compiled code, demoted sites and weight copies."""
    torch._dynamo.reset()
