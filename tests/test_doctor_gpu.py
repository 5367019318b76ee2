"""What ``doctor`` says about GPUs, told of GPUs that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inductor_sparse.doctor import gpu
from inductor_sparse.doctor.checks import CheckStatus
from inductor_sparse.runtime import cubin_cache, nvrtc

PASS, WARN, FAIL = CheckStatus.PASS, CheckStatus.WARN, CheckStatus.FAIL


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """One H200."""
    monkeypatch.setattr(gpu, "devices", lambda: [("NVIDIA H200", "sm_90")])


def pretend(monkeypatch: pytest.MonkeyPatch, *architectures: str) -> None:
    """One GPU of each architecture."""
    found = [("GPU", arch) for arch in architectures]
    monkeypatch.setattr(gpu, "devices", lambda: found)


def test_everything_passes_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(nvrtc, "unavailable_reason", lambda: "NVRTC is gone; install")
    for name, check, _ in gpu.CHECKS:
        assert check()[0] is PASS, name


@pytest.mark.usefixtures("hopper")
def test_names_the_devices() -> None:
    status, detail, _ = gpu.check_devices()
    assert status is PASS
    assert detail.startswith("NVIDIA H200 (sm_90), torch built for ")


@pytest.mark.usefixtures("hopper")
def test_triton_is_required_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu.check_triton()[0] is FAIL


@pytest.mark.usefixtures("hopper")
def test_a_missing_compiler_costs_our_own_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "the Python package cuda-bindings is missing; install them"
    monkeypatch.setattr(nvrtc, "unavailable_reason", lambda: reason)
    status, detail, remedy = gpu.check_nvrtc()
    assert status is WARN
    assert detail.endswith("cuda-bindings is missing")
    assert remedy == "pip install 'inductor-sparse[cuda]'"


def test_no_compiler_is_needed_for_other_architectures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, "sm_89")
    monkeypatch.setattr(nvrtc, "unavailable_reason", lambda: "gone; install")
    assert gpu.check_nvrtc()[0] is PASS


@pytest.mark.usefixtures("hopper")
def test_a_kernel_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cubin_cache, "folder", lambda: tmp_path / "file" / "cache")
    status, detail, remedy = gpu.check_kernel_cache()
    assert status is WARN
    assert "kernels are compiled in every process" in detail
    assert "TORCHINDUCTOR_CACHE_DIR" in remedy
    monkeypatch.setattr(cubin_cache, "folder", lambda: tmp_path / "new")
    assert gpu.check_kernel_cache() == (PASS, str(tmp_path / "new"), "")


@pytest.mark.usefixtures("hopper")
def test_the_library_of_the_vendor_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert gpu.check_cusparselt()[0] is WARN
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 800)
    assert gpu.check_cusparselt() == (PASS, "800", "")


@pytest.mark.parametrize(
    ("architecture", "status", "detail"),
    [
        ("sm_90", PASS, "verified for few tokens; few tokens, gated; many tokens"),
        ("sm_89", WARN, "sm_89: never run for few tokens; few tokens, gated; many"),
        ("sm_70", WARN, "sm_70: no kernels"),
        ("", WARN, ": no kernels"),
    ],
)
def test_what_runs_on_an_architecture(
    architecture: str, status: CheckStatus, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, architecture)
    found, said, remedy = gpu.check_kernels()
    assert found is status
    assert detail in said
    assert ("sparse.allow_unverified" in remedy) == (status is WARN)


def test_mixed_machines_are_described_by_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, "sm_90", "sm_70", "sm_90")
    _, said, _ = gpu.check_kernels()
    assert [part.partition(":")[0] for part in said.split(" | ")] == ["sm_70", "sm_90"]
