"""Settings shared by all tests: property tests are repeatable and have no deadline."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

# Helper modules such as `numerics` are imported by name from any folder of tests.
sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
