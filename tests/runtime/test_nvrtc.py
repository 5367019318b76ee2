"""CUDA C++ compiled without a GPU, and what is said where there is no compiler."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest

from inductor_sparse.errors import SparseKernelError
from inductor_sparse.runtime import cuda_driver, nvrtc

needs_compiler = pytest.mark.skipif(
    not nvrtc.available(), reason=f"no compiler: {nvrtc.unavailable_reason()}"
)

KERNEL = """
extern "C" __global__ void add(const float* x, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] + 1.0f;
}
"""


@pytest.fixture
def _forgetful() -> Iterator[None]:
    """What is known about the compiler is found out anew, and so it is afterwards."""
    caches = (nvrtc._bindings, nvrtc.unavailable_reason)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@needs_compiler
def test_machine_code_for_hopper() -> None:
    binary = nvrtc.compile_source("add", KERNEL, extra=("--ptxas-options=-v",))
    assert binary.cubin.startswith(b"\x7fELF")
    assert b"add" in binary.cubin
    assert "0 bytes spill stores" in binary.log


@needs_compiler
def test_a_rejected_source_is_shown() -> None:
    with pytest.raises(SparseKernelError) as caught:
        nvrtc.compile_source("wrong", "int x = y;")
    text = str(caught.value)
    assert f"NVRTC {nvrtc.version()} does not compile wrong for sm_90a" in text
    assert 'wrong.cu(1): error: identifier "y" is undefined' in text


@needs_compiler
def test_a_patch_release_is_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, str] = {}

    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    build = nvrtc.build.__wrapped__  # what is kept stays as it is
    for patch in ("13.0.88", "13.0.96"):
        installed["nvidia-cuda-nvrtc"] = patch
        assert build() == f"{nvrtc.version()}, nvidia-cuda-nvrtc {patch}"
    installed.clear()
    assert build() == nvrtc.version()


@needs_compiler
def test_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(SparseKernelError, match="does not compile add for sm_12a"):
        nvrtc.compile_source("add", KERNEL, "sm_12a")


@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ImportError("No module named 'cuda'"), "cuda-bindings is missing"),
        (RuntimeError("libnvrtc.so.13 not found\nlong"), "cannot be loaded"),
    ],
)
def test_a_missing_compiler_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    assert not nvrtc.available()
    reason = nvrtc.unavailable_reason()
    assert reason is not None
    assert text in reason
    assert str(error).partition("\n")[0] in reason
    assert "long" not in reason
    assert "pip install 'inductor-sparse[cuda]'" in reason
    with pytest.raises(SparseKernelError, match=text):
        nvrtc.compile_source("add", KERNEL)


@pytest.mark.usefixtures("_forgetful")
def test_an_old_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        @staticmethod
        def nvrtcVersion() -> tuple[int, int, int]:
            return 0, 11, 8

    monkeypatch.setattr(importlib, "import_module", lambda name: Old)
    assert str(nvrtc.unavailable_reason()).startswith("NVRTC is 11.8, 12.2 is needed")


@needs_compiler
@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize("driver", [None, (11, 8), (99, 0)])
def test_a_driver_that_is_older_than_the_compiler_is_named(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(cuda_driver, "version", lambda: driver)
    reason = nvrtc.unavailable_reason()
    if driver != (11, 8):
        assert reason is None
        return
    assert reason is not None
    assert "the driver supports only CUDA 11.8 and cannot load its code" in reason
    assert "update the driver, or install" in reason


def test_a_machine_without_a_driver_has_no_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Missing:
        @staticmethod
        def cuDriverGetVersion() -> tuple[int, int]:
            raise RuntimeError("libcuda.so.1: cannot open shared object file")

    class Newest:
        @staticmethod
        def cuDriverGetVersion() -> tuple[int, int]:
            return 0, 13020

    for bindings, expected in ((Missing, None), (Newest, (13, 2))):
        monkeypatch.setattr(cuda_driver, "_bindings", lambda found=bindings: found)
        cuda_driver.version.cache_clear()
        assert cuda_driver.version() == expected
    cuda_driver.version.cache_clear()
