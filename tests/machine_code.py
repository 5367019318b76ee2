"""Generated kernels turned into machine code without a GPU, which nothing runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fake_device import Capability, fake_cuda

_TRITON = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.S)
_CUDA = re.compile(r"(\w+) = CudaKernel\(\s*'\w+',\s*r'''(.*?)'''", re.S)


def triton_sources(code: str) -> dict[str, str]:
    """The text of each Triton kernel's module in a wrapper, by the kernel's name."""
    return dict(_TRITON.findall(code))


def cuda_sources(code: str) -> dict[str, str]:
    """The CUDA C++ text of each kernel in a wrapper, by the name it has there."""
    return dict(_CUDA.findall(code))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel: bytes per block (shared) and per thread (local).

    ``local`` counts the stack, and with it what registers were spilled to.
    """

    registers: int
    local: int
    shared: int
    ptx: str
    log: str = ""


def compile_triton(
    generated: Any, folder: Path, capability: Capability = (9, 0)
) -> dict[str, Compiled]:
    """Every Triton kernel of a wrapper compiled by its first configuration.

    ``generated`` is the wrapper's text or has it as ``code``.

    ``folder`` receives the kernels' files, e.g. pytest's ``tmp_path``.
    """
    code = generated if isinstance(generated, str) else generated.code
    compiled = {}
    with fake_cuda(capability), patch.dict("os.environ", TRITON_CACHE_DIR=str(folder)):
        for name, source in triton_sources(code).items():
            tuner = _load(name, source, folder)
            result = tuner._precompile_config(tuner.configs[0])
            kernel = getattr(result, "kernel", result)
            compiled[name] = _from_cubin(
                kernel.asm["cubin"], kernel.asm["ptx"], kernel.metadata.shared, folder
            )
    return compiled


def _load(name: str, source: str, folder: Path) -> Any:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"fake_cuda_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _from_cubin(cubin: bytes, ptx: str, shared: int, folder: Path) -> Compiled:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    said = run_tool("cuobjdump", "--dump-resource-usage", path)
    used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", said)}
    local = used["STACK"] + used["LOCAL"]
    return Compiled(used["REG"], local, max(shared, used["SHARED"]), ptx, said)


def compile_cuda(source: str, folder: Path, arch: str = "sm_90a") -> Compiled:
    """Compile CUDA C++ with NVRTC; ``log`` is what ``ptxas -v`` has to say.

    Raises:
        AssertionError: it does not compile; the message is the compiler's.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={arch}", "-std=c++17", "--ptxas-options=-v"]
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    )
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.decode().rstrip("\0")
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, text
    cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    nvrtc.nvrtcGetCUBIN(program, cubin)
    ptx = bytearray(_checked(nvrtc.nvrtcGetPTXSize(program)))
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    made = _from_cubin(bytes(cubin), ptx.decode().rstrip("\0"), 0, folder)
    return dataclasses.replace(made, log=text)


def main_loop(folder: Path, columns: int) -> list[str]:
    """Machine code of the shortest loop that multiplies so many columns at a time.

    Of the kernel that was last compiled into ``folder``.
    """
    sass = run_tool("nvdisasm", "-c", folder / "kernel.cubin").splitlines()
    labels = {
        found.group(1): at
        for at, line in enumerate(sass)
        if (found := re.match(r"\s*(\.L_x_\d+):", line))
    }
    product = re.compile(rf"GMMA(\.SP)?\.64x{columns}x")
    loops = []
    for end, line in enumerate(sass):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        body = sass[labels.get(target.group(1), end) : end] if target else []
        if any(map(product.search, body)):
            loops.append(body)
    return min(loops, key=len)


def spills(sass: list[str]) -> list[str]:
    """The lines that write registers to local memory or read them back."""
    return [line for line in sass if "LDL" in line or "STL" in line]


def run_tool(name: str, *arguments: str | Path) -> str:
    """What one of the tools that Triton brings along has to say."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run(
        [tool, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


def _checked(answer: tuple[Any, ...]) -> Any:
    from cuda.bindings import nvrtc

    status, *values = answer
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
    return values[0]
