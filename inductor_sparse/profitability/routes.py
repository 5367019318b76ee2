"""Whose kernel computes a 2:4 product on an architecture."""

from __future__ import annotations

ROUTES: dict[str, str] = {
    "sm_90": "own",
    "sm_80": "cutlass",
    "sm_86": "cutlass",
    "sm_89": "cutlass",
    "sm_100": "cusparselt",
    "gfx942": "cusparselt",
}
"""Architecture -> the kernel that multiplies there; ``dense`` on any other."""
