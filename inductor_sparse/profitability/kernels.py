"""Which op has a kernel where, whose it is, and whether it ever ran there."""

from __future__ import annotations

import re

import torch

_WIDE = frozenset({"float32", "bfloat16", "float16"})
_HALF = frozenset({"bfloat16", "float16"})
_BYTE = frozenset({"float8_e4m3fn", "int8"})

KERNELS: dict[str, dict[str, frozenset[str]]] = {
    "cpu": {"activation_spmm": _WIDE, "glu_spmm": _WIDE},
    "sm_90": {
        "activation_spmm": _WIDE | _BYTE,
        "glu_spmm": _WIDE,
        "site_counters": _WIDE,
        "sparsify24": _HALF,
        "linear_sparsify24": _HALF,
        "linear_sparsify24_quantized": frozenset({"float8_e4m3fn"}),
        "sparsify24_quantized": _BYTE,
        "sparse24_mm": _HALF | _BYTE,
    },
}
"""Architecture -> op -> dtypes for which a kernel exists and was run there.

A dtype of ``sparse24_mm`` is that of the operands; an 8-bit dtype of
``activation_spmm`` is that of the rows of the weight."""

# A kernel for site_counters: those that skip count the neurons that they read.
_DECODE = {"activation_spmm": _WIDE, "glu_spmm": _WIDE, "site_counters": _WIDE}
_PACKED = {"sparsify24": _HALF, "sparse24_mm": _HALF}

UNVERIFIED_KERNELS: dict[str, dict[str, frozenset[str]]] = {
    "sm_80": _PACKED,
    "sm_86": _PACKED,
    "sm_89": _PACKED,
    "sm_100": _PACKED,
    "gfx942": _PACKED,
}
"""The same for kernels that should run on an architecture and never did; those of
:func:`unverified_kernels` that are told by a rule are not in it."""

_TRITON_FROM = 80
"""The compute capability from which on Triton supports GPUs of NVIDIA."""

_E4M3_FROM = 89
"""That from which on Triton converts e4m3."""

_CDNA = re.compile(r"gfx9(08|0a|4[0-2]|50)")
"""GPUs of AMD with matrix cores that the kernels are compiled for without spilling.
On RDNA (gfx10 to gfx12) those for three tokens and more spill their registers."""

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
    if dtype in KERNELS.get(arch, {}).get(op, frozenset[str]()):
        return True
    return unverified and dtype in unverified_kernels(arch).get(op, frozenset[str]())


def knows(arch: str, op: str) -> bool:
    """Whether ``op`` has a kernel for an architecture in any dtype, tried or not."""
    return op in KERNELS.get(arch, {}) or op in unverified_kernels(arch)


def unverified_kernels(arch: str) -> dict[str, frozenset[str]]:
    """Op -> dtypes of the kernels that should run on an architecture and never did.

    Those for a few tokens are plain Triton: they are expected to run on every GPU of
    NVIDIA that it supports, and on those of AMD with matrix cores.
    """
    ran, found = KERNELS.get(arch, {}), {}
    for op, dtypes in {**UNVERIFIED_KERNELS.get(arch, {}), **_of_triton(arch)}.items():
        untried = dtypes - ran.get(op, frozenset())
        if untried:
            found[op] = untried
    return found


def _of_triton(arch: str) -> dict[str, frozenset[str]]:
    if _CDNA.fullmatch(arch):
        return _DECODE
    nvidia = re.fullmatch(r"sm_(\d+)", arch)
    capability = int(nvidia[1]) if nvidia else 0
    if capability < _TRITON_FROM:
        return {}
    rows = _BYTE if capability >= _E4M3_FROM else frozenset({"int8"})
    return {**_DECODE, "activation_spmm": _WIDE | rows}
