from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inductor_sparse import doctor
from inductor_sparse.doctor import Check, CheckStatus, has_failure, run_checks


def fresh_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_check_passes_or_says_what_to_do() -> None:
    checks = list(run_checks())
    assert [check.name for check in checks] == [name for name, _, _ in doctor.CHECKS]
    for check in checks:
        assert check.detail
        assert bool(check.remedy) == (check.status is not CheckStatus.PASS)


def test_checks_are_json_ready() -> None:
    check = Check("torch", CheckStatus.WARN, "old", "update")
    assert json.loads(json.dumps(check.to_dict())) == {
        "name": "torch",
        "status": "warn",
        "detail": "old",
        "remedy": "update",
    }


def test_only_failures_count_as_failure() -> None:
    passed = Check("a", CheckStatus.PASS, "fine")
    warned = Check("b", CheckStatus.WARN, "slow", "do this")
    failed = Check("c", CheckStatus.FAIL, "broken", "do that")
    assert not has_failure([passed, warned])
    assert has_failure([passed, failed])


def test_works_without_torch_rich_and_triton() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'rich', 'triton'): sys.modules[name] = None\n"
        "from inductor_sparse.cli import main\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = fresh_python(code)
    report = json.loads(done.stdout)
    status = {check["name"]: check["status"] for check in report["checks"]}
    remedy = {check["name"]: check["remedy"] for check in report["checks"]}
    assert done.returncode == 1, done.stderr
    assert not report["ok"]
    assert status["torch"] == "fail"
    assert "reinstall torch" in remedy["torch"]
    assert status["python"] == status["C++ compiler"] == "pass"


def test_an_exception_becomes_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> doctor.Outcome:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "CHECKS", (("bomb", explode, "call for help"),))
    assert list(run_checks()) == [
        Check("bomb", CheckStatus.FAIL, "RuntimeError: first line", "call for help")
    ]


def test_names_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_compiler", lambda: None)
    status, detail, remedy = doctor.check_compiler()
    assert (status, detail) == (CheckStatus.FAIL, "no C++ compiler found")
    assert "CXX" in remedy


def test_names_a_compiler_that_cannot_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'no omp.h here' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(doctor, "_compiler", lambda: str(compiler))
    status, detail, _ = doctor.check_compiler()
    assert status is CheckStatus.FAIL
    assert detail.endswith("cannot build with OpenMP: no omp.h here")


def test_names_an_entry_point_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ENTRY_POINT", "no_such_backend")
    status, detail, remedy = doctor.check_entry_point()
    assert status is CheckStatus.FAIL
    assert "no_such_backend" in detail
    assert "pip install" in remedy


def test_names_a_cache_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(in_the_way))
    status, detail, remedy = doctor.check_cache_dir()
    assert status is CheckStatus.FAIL
    assert str(in_the_way) in detail
    assert "TORCHINDUCTOR_CACHE_DIR" in remedy


def test_warns_of_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    status, detail, remedy = doctor.check_threads()
    assert status is CheckStatus.WARN
    assert detail.startswith("10000 of ")
    assert remedy.startswith("set OMP_NUM_THREADS=")


@pytest.mark.parametrize(
    ("capabilities", "status"),
    [
        ({"avx512_bf16": True}, CheckStatus.PASS),
        ({"avx512_bf16": False}, CheckStatus.WARN),
        ({}, CheckStatus.WARN),
    ],
)
def test_bf16_instructions_are_never_required(
    monkeypatch: pytest.MonkeyPatch,
    capabilities: dict[str, bool],
    status: CheckStatus,
) -> None:
    monkeypatch.setattr(doctor, "_cpu_capabilities", lambda: capabilities)
    assert doctor.check_avx512_bf16()[0] is status


@pytest.mark.parametrize(
    ("capability", "machine", "status", "detail"),
    [
        ("AVX512", "x86_64", CheckStatus.PASS, "AVX512 (the CPU; not tried with"),
        ("AVX2", "x86_64", CheckStatus.WARN, "AVX2 (the CPU; not tried with"),
        ("SVE256", "aarch64", CheckStatus.WARN, "SVE256 (the CPU; not tried with"),
        ("DEFAULT", "x86_64", CheckStatus.WARN, "none: kernels are scalar"),
        ("DEFAULT", "aarch64", CheckStatus.WARN, "not determined on aarch64"),
    ],
)
def test_vector_instructions_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    machine: str,
    status: CheckStatus,
    detail: str,
) -> None:
    def compile_nothing() -> None:
        raise AssertionError("this takes long")

    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", compile_nothing)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: machine)
    found, said, remedy = doctor.check_vector_isa()
    assert found is status
    assert said.startswith(detail)
    assert bool(remedy) == (status is CheckStatus.WARN)
