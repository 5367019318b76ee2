"""``doctor``: is this machine able to run the backend, and if not, what to do.

Every check imports what it needs by itself and an exception inside a check is a
finding, not a crash: the command must work in exactly those installs that are broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from inductor_sparse.doctor import gpu
from inductor_sparse.doctor.checks import (
    Check,
    CheckStatus,
    NamedCheck,
    Outcome,
    passed,
)

MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 11)
ENTRY_POINT_GROUP = "torch_dynamo_backends"
ENTRY_POINT = "sparse"
REINSTALL_TORCH = "reinstall torch: pip install --force-reinstall 'torch>=2.11'"
REINSTALL_PACKAGE = "pip install inductor-sparse (in a checkout: pip install -e .)"
SCALAR_CAPABILITIES = ("DEFAULT", "NO AVX")
"""What torch says of an x86 CPU without vectors, and of a CPU that it does not know."""
PROBE_SOURCE = """
#include <cstdio>
#include <omp.h>
extern "C" int probe(void) { std::printf("%d", omp_get_max_threads()); return 0; }
"""


def run_checks() -> Iterator[Check]:
    """Run every check of :data:`CHECKS` in order, each when it is asked for."""
    for name, check, remedy in CHECKS:
        yield _guarded(name, check, remedy)


def has_failure(checks: Iterable[Check]) -> bool:
    """Whether any check failed; warnings do not count."""
    return any(check.status is CheckStatus.FAIL for check in checks)


def _guarded(name: str, check: Callable[[], Outcome], remedy_if_raised: str) -> Check:
    """Run one check; whatever it raises becomes its finding."""
    try:
        status, detail, remedy = check()
    # A half-installed torch can raise anything, SystemError and RuntimeError included.
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        detail = f"{type(error).__name__}: {text[0]}"
        return Check(name, CheckStatus.FAIL, detail, remedy_if_raised)
    return Check(name, status, detail, remedy)


def check_python() -> Outcome:
    """The interpreter is recent enough."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] >= MINIMUM_PYTHON:
        return passed(version)
    return CheckStatus.FAIL, version, "use Python 3.10 or newer"


def check_torch() -> Outcome:
    """torch imports and is recent enough."""
    import torch

    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found >= MINIMUM_TORCH:
        return passed(torch.__version__)
    return CheckStatus.FAIL, torch.__version__, "pip install --upgrade 'torch>=2.11'"


def check_entry_point() -> Outcome:
    """``backend="sparse"`` is registered and loads."""
    group = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    if ENTRY_POINT not in group.names:
        detail = f'no "{ENTRY_POINT}" in entry point group {ENTRY_POINT_GROUP}'
        return CheckStatus.FAIL, detail, REINSTALL_PACKAGE
    backend = group[ENTRY_POINT]
    backend.load()
    return passed(f'backend="{ENTRY_POINT}" is {backend.value}')


def check_compiler() -> Outcome:
    """A C++ compiler is found and builds a shared library with OpenMP."""
    compiler = _compiler()
    remedy = "install a C++ compiler with OpenMP (g++ or clang++), or point CXX at one"
    if compiler is None:
        return CheckStatus.FAIL, "no C++ compiler found", remedy
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE_SOURCE, encoding="ascii")
        output = str(Path(folder, "probe.so"))
        command = [compiler, "-fopenmp", "-shared", "-fPIC", "-o", output, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return passed(compiler)
    problem = (done.stderr.strip().splitlines() or ["no message"])[0]
    return CheckStatus.FAIL, f"{compiler} cannot build with OpenMP: {problem}", remedy


def _compiler() -> str | None:
    """The compiler Inductor would use, or the first usual one if it cannot be asked."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return get_cpp_compiler()
    # Inductor raises its own error types, and torch itself may be broken.
    except Exception:
        candidates = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
        found = (shutil.which(name) for name in candidates if name)
        return next((path for path in found if path), None)


def check_vector_isa() -> Outcome:
    """The CPU has the vector instructions that our CPU kernels use.

    What the compiler can build is not tried: Inductor does so with a large source for
    each instruction set, which takes a minute where the disk or the CPU is slow.
    """
    import torch

    found = torch.backends.cpu.get_cpu_capability()
    detail = f"{found} (the CPU; not tried with the compiler)"
    if "AVX512" in found:
        return passed(detail)
    if found not in SCALAR_CAPABILITIES:
        return CheckStatus.WARN, detail, "nothing: it works; AVX-512 would be faster"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        remedy = "Inductor finds out when it compiles; look into the code it prints"
        return CheckStatus.WARN, f"not determined on {platform.machine()}", remedy
    remedy = "a CPU with AVX2 is needed for speed, and ATEN_CPU_CAPABILITY unset"
    return CheckStatus.WARN, "none: kernels are scalar", remedy


def check_avx512_bf16() -> Outcome:
    """The CPU has the bf16 dot product."""
    capable = _cpu_capabilities().get("avx512_bf16")
    if capable:
        return passed("yes")
    if capable is None:
        return CheckStatus.WARN, "unknown on this system", "bf16 runs through fp32"
    return CheckStatus.WARN, "no", "bf16 is widened to fp32: prefer fp32 on this CPU"


def _cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows about the CPU, else the flags of ``/proc/cpuinfo``."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {}
    words = set(cpuinfo.read_text(encoding="utf-8").split())
    return {"avx512_bf16": "avx512_bf16" in words}


def check_threads() -> Outcome:
    """torch uses no more threads than this process may run on."""
    import torch

    threads = torch.get_num_threads()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    detail = f"{threads} of {cores} available cores"
    if threads <= cores:
        return passed(detail)
    return CheckStatus.WARN, detail, f"set OMP_NUM_THREADS={cores}"


def check_cache_dir() -> Outcome:
    """Inductor's cache folder can be written."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    try:
        # torch creates the folder when asked where it is.
        folder = Path(cache_dir())
        with tempfile.TemporaryFile(dir=folder):
            return passed(str(folder))
    except OSError as error:
        remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder you can write"
        return CheckStatus.FAIL, f"{error.filename}: {error.strerror}", remedy


CHECKS: tuple[NamedCheck, ...] = (
    ("python", check_python, "use Python 3.10 or newer"),
    ("torch", check_torch, REINSTALL_TORCH),
    ("backend entry point", check_entry_point, REINSTALL_PACKAGE),
    ("C++ compiler", check_compiler, "install g++ or clang++, or point CXX at one"),
    ("vector instructions", check_vector_isa, REINSTALL_TORCH),
    ("AVX512_BF16", check_avx512_bf16, REINSTALL_TORCH),
    ("threads", check_threads, REINSTALL_TORCH),
    ("cache folder", check_cache_dir, "set TORCHINDUCTOR_CACHE_DIR to a folder"),
    *gpu.CHECKS,
)
"""Every check, in the order they are reported."""
