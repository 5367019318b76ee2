"""What compiles the kernels of an op, and what of that is missing here."""

from __future__ import annotations

from inductor_sparse.runtime import nvrtc, triton_text


def missing_package(op: str, arch: str) -> str:
    """What is missing to compile the kernel of ``op`` for ``arch``; empty if nothing.

    A CPU needs a C++ compiler: torch itself says so if there is none.
    """
    if arch == "cpu":
        return ""
    if op == "sparse24_mm":
        return (nvrtc.unavailable_reason() or "") if arch == "sm_90" else ""
    return (
        "" if triton_text.available() else "triton is missing; run: pip install triton"
    )
