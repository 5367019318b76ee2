from __future__ import annotations

from typing import Any

import pytest

from inductor_sparse.bench.rows import PROTOCOL


@pytest.fixture
def ffn_row() -> dict[str, Any]:
    """A row as ``bench ffn`` writes it."""
    return {
        "op": "down",
        "gated": False,
        "activation": "relu2",
        "dtype": "float32",
        "features": 4096,
        "hidden": 16384,
        "device": "cpu",
        "data": "random",
        "quantize": "none",
        "calibrated": False,
        "quantized_model": False,
        "tokens": 1,
        "density": 0.1,
        "density_measured": 0.1002,
        "dense_us": 12345.6,
        "sparse_us": 1543.2,
        "ratio": 8.0,
        "ratio_low": 7.9,
        "ratio_high": 8.1,
        "verdict": "faster",
        "max_rel_err": 2.5e-7,
        "rms_rel_err": 2e-7,
        "dense_max_rel_err": 2e-7,
        "dense_rms_rel_err": 2e-7,
        "dropped_energy": 0.0,
        "baseline": "freezing+max-autotune",
        "sparse_setting": "default",
        "status": "applied",
        "reason": None,
        "sites_applied": 1,
        "ops": ["activation_spmm"],
        "dense_compile_s": 3.5,
        "sparse_compile_s": 2.5,
        "dense_candidates_us": {"default": 20000.0},
        "sparse_candidates_us": {"default": 1543.2},
        "stacked": 1,
        "rounds": 100,
        "cache": "streamed",
        "device_name": "Some CPU",
        "threads": 2,
        "vector_isa": "AVX512",
        "torch": "2.13.0",
        "python": "3.11.7",
        "commit": "0123456789ab",
        "protocol": PROTOCOL,
        "timestamp": "2026-01-02T03:04:05+00:00",
    }
