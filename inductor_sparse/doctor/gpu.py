"""The part of ``doctor`` that looks at GPUs, their libraries and our kernels for them.

Without a GPU all of it passes: the CPU kernels need none of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile

from inductor_sparse.doctor.checks import CheckStatus, NamedCheck, Outcome, passed

NOT_NEEDED = "absent, and not needed without a GPU"
INSTALL_CUDA = "pip install 'inductor-sparse[cuda]'"
OWN_COMPILER_ARCHITECTURES = ("sm_90",)
"""Where kernels are compiled from CUDA C++ by us, and not by Triton."""
WHAT_IT_IS_FOR = {
    "activation_spmm": "few tokens",
    "glu_spmm": "few tokens, gated",
    "sparse24_mm": "many tokens",
}
"""The op that decides whether a regime is sparse, and the regime."""


def devices() -> list[tuple[str, str]]:
    """Name and architecture (``sm_90``, ``gfx942``) of each GPU that torch sees."""
    import torch

    from inductor_sparse.profitability import kernels

    if not torch.cuda.is_available():
        return []
    return [
        (
            torch.cuda.get_device_name(index),
            kernels.architecture(torch.device("cuda", index)),
        )
        for index in range(torch.cuda.device_count())
    ]


def check_devices() -> Outcome:
    """GPUs; having none is fine on a CPU machine."""
    import torch

    found = devices()
    if not found:
        return passed("none (the CPU kernels need none)")
    toolkit = torch.version.cuda or torch.version.hip
    named = ", ".join(f"{name} ({arch})" for name, arch in found)
    return passed(f"{named}, torch built for {toolkit}")


def check_triton() -> Outcome:
    """triton is there if a GPU is."""
    if importlib.util.find_spec("triton") is not None:
        return passed(importlib.metadata.version("triton"))
    if not devices():
        return passed(NOT_NEEDED)
    return CheckStatus.FAIL, "absent", "pip install triton (Inductor needs it on a GPU)"


def check_nvrtc() -> Outcome:
    """The compiler and the launcher of our CUDA C++ kernels."""
    from inductor_sparse.runtime import nvrtc

    needed = any(arch in OWN_COMPILER_ARCHITECTURES for _, arch in devices())
    reason = nvrtc.unavailable_reason()
    if reason is None:
        bindings = importlib.metadata.version("cuda-bindings")
        return passed(f"NVRTC {nvrtc.version()}, cuda-bindings {bindings}")
    if not needed:
        return passed("absent, and not needed without an sm_90 GPU")
    detail, _, _ = reason.partition(";")
    return CheckStatus.WARN, f"no 2:4 kernels of our own: {detail}", INSTALL_CUDA


def check_kernel_cache() -> Outcome:
    """The folder in which compiled CUDA kernels are kept can be written."""
    from inductor_sparse.runtime import cubin_cache

    if not devices():
        return passed("not needed without a GPU")
    folder = cubin_cache.folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return passed(str(folder))
    except OSError as error:
        detail = f"{folder}: {error.strerror}; kernels are compiled in every process"
        remedy = (
            "set INDUCTOR_SPARSE_CACHE_DIR, or TORCHINDUCTOR_CACHE_DIR for all caches, "
            "to a folder you can write"
        )
        return CheckStatus.WARN, detail, remedy


def check_cusparselt() -> Outcome:
    """NVIDIA's library of 2:4 kernels, a candidate beside ours."""
    import torch

    if not devices():
        return passed(NOT_NEEDED)
    if torch.backends.cusparselt.is_available():
        return passed(str(torch.backends.cusparselt.version()))
    remedy = "nothing on sm_90, which has our own kernel; else a CUDA build from PyPI"
    return CheckStatus.WARN, "absent in this build of torch", remedy


def check_kernels() -> Outcome:
    """What runs sparse on the GPUs that are there."""
    from inductor_sparse.profitability import kernels

    found = sorted({arch for _, arch in devices()})
    if not found:
        return passed("no GPU")
    said, lacking = [], False
    for arch in found:
        ran = kernels.KERNELS.get(arch, {})
        untried = kernels.unverified_kernels(arch)
        verified = [what for op, what in WHAT_IT_IS_FOR.items() if op in ran]
        compiled = [what for op, what in WHAT_IT_IS_FOR.items() if op in untried]
        lacking = lacking or len(verified) < len(WHAT_IT_IS_FOR)
        parts = [
            f"{word} for {'; '.join(regimes)}"
            for word, regimes in (("verified", verified), ("never run", compiled))
            if regimes
        ]
        said.append(f"{arch}: {', '.join(parts) or 'no kernels'}")
    if not lacking:
        return passed(" | ".join(said))
    remedy = (
        "other sites stay dense, with a reason; options={'sparse.allow_unverified': "
        "True} tries kernels that never ran on this architecture"
    )
    return CheckStatus.WARN, " | ".join(said), remedy


CHECKS: tuple[NamedCheck, ...] = (
    ("GPUs", check_devices, "check the driver with nvidia-smi"),
    ("triton", check_triton, "pip install --force-reinstall triton"),
    ("CUDA C++ compiler", check_nvrtc, INSTALL_CUDA),
    ("CUDA kernel cache", check_kernel_cache, "set INDUCTOR_SPARSE_CACHE_DIR"),
    ("cuSPARSELt", check_cusparselt, "reinstall torch"),
    ("GPU kernels", check_kernels, "reinstall inductor-sparse"),
)
"""Every check of GPUs, in the order they are reported."""
