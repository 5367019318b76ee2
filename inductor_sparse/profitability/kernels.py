"""Which op has a kernel where, whose it is, and whether it ever ran there."""

from __future__ import annotations

import torch

_WIDE = frozenset({"float32", "bfloat16", "float16"})
_HALF = frozenset({"bfloat16", "float16"})
_BYTE = frozenset({"float8_e4m3fn", "int8"})

KERNELS: dict[str, dict[str, frozenset[str]]] = {
    "cpu": {"activation_spmm": _WIDE, "glu_spmm": _WIDE},
    "sm_90": {
        "activation_spmm": _WIDE,
        "glu_spmm": _WIDE,
        "sparsify24": _HALF,
        "linear_sparsify24": _HALF,
        "sparsify24_quantized": _BYTE,
        "sparse24_mm": _HALF | _BYTE,
    },
}
"""Architecture -> op -> dtypes for which a kernel exists and was run there."""

# Of sparse24_mm one form stores a transposed result; a dtype is that of the operands.
# A kernel for site_counters: those that skip count the neurons that they read.
_DECODE = {"activation_spmm": _WIDE, "glu_spmm": _WIDE, "site_counters": _WIDE}
_PACKED = {**_DECODE, "sparsify24": _HALF, "sparse24_mm": _HALF}
# Of activation_spmm an 8-bit dtype is that of the rows of the weight.
_INT8_ROWS = {**_PACKED, "activation_spmm": _WIDE | {"int8"}}
_BYTE_ROWS = {**_PACKED, "activation_spmm": _WIDE | _BYTE}

UNVERIFIED_KERNELS: dict[str, dict[str, frozenset[str]]] = {
    "sm_80": _INT8_ROWS,
    "sm_86": _INT8_ROWS,
    "sm_89": _BYTE_ROWS,
    "sm_90": {
        "activation_spmm": _BYTE,
        "site_counters": _WIDE,
        "linear_sparsify24_quantized": frozenset({"float8_e4m3fn"}),
        "sparse24_mm_transposed": _HALF | _BYTE,
    },
    "sm_100": _BYTE_ROWS,
    "sm_120": _DECODE,
    "gfx942": _PACKED,
}
"""The same for kernels that should run on an architecture and never did."""

ROUTES: dict[str, str] = {
    "sm_90": "own",
    "sm_80": "cutlass",
    "sm_86": "cutlass",
    "sm_89": "cutlass",
    "sm_100": "cusparselt",
    "gfx942": "cusparselt",
}
"""Architecture -> whose kernel multiplies 2:4 operands there; ``dense`` elsewhere."""


def architecture(device: torch.device) -> str:
    """What kernels are looked up by: ``cpu``, ``sm_90``, ``gfx942``.

    Empty for a GPU that this process cannot ask.
    """
    if device.type != "cuda":
        return device.type
    try:
        found = torch.cuda.get_device_properties(device)
    except (AssertionError, RuntimeError):  # built without CUDA; no driver
        return ""
    if torch.version.hip:
        return str(found.gcnArchName).partition(":")[0]
    return f"sm_{found.major}{found.minor}"


def has_kernel(arch: str, op: str, dtype: str, *, unverified: bool = False) -> bool:
    """Whether ``op`` has a kernel for ``dtype`` on an architecture.

    Args:
        arch: as :func:`architecture` names it.
        op: an op of ours, without namespace.
        dtype: as in ``"bfloat16"``.
        unverified: whether one that never ran there counts.
    """
    tables = (KERNELS, UNVERIFIED_KERNELS) if unverified else (KERNELS,)
    return any(
        dtype in table.get(arch, {}).get(op, frozenset[str]()) for table in tables
    )


def knows(arch: str, op: str) -> bool:
    """Whether ``op`` has a kernel for an architecture in any dtype, tried or not."""
    return any(op in table.get(arch, {}) for table in (KERNELS, UNVERIFIED_KERNELS))
