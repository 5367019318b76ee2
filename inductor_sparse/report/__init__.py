"""What happened, for people: the explain table, calibration, and their renderers."""

from __future__ import annotations
