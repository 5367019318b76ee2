"""Settings of the tests of reports: no structured trace, which costs half the time."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_structured_trace() -> Iterator[None]:
    """Pytest listens to every logger that keeps to itself; torch takes that as a wish.

    A logger that propagates is left alone, and without a handler nothing is traced.
    """
    logger = logging.getLogger("torch.__trace")
    logger.propagate = True
    yield
    logger.propagate = False
