"""Settings of the end-to-end tests: no trace, and nothing learned from another test."""

from __future__ import annotations

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_structured_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest listens to every logger; torch takes that as a wish for a costly trace."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Forget compiled code, demoted sites and weight copies; draw the same numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
