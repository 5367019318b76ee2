"""The wheel carries everything the package needs, and asks for nothing it does not."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import inductor_sparse
from tools import setup_env

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built without a build environment: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d"]
    subprocess.run([*command, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    """The text of one file of the wheel's ``.dist-info`` folder."""
    (member,) = [m for m in wheel.namelist() if m.endswith(f".dist-info/{name}")]
    return wheel.read(member).decode()


def test_wheel_has_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "inductor_sparse"
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    in_wheel = {m for m in wheel.namelist() if ".dist-info/" not in m}
    assert in_wheel == on_disk
    assert "inductor_sparse/py.typed" in in_wheel
    assert any(m.startswith("inductor_sparse/templates/cpp/") for m in in_wheel)


def test_wheel_registers_the_backend(wheel: zipfile.ZipFile) -> None:
    lines = metadata(wheel, "entry_points.txt").splitlines()
    section = lines.index("[torch_dynamo_backends]")
    assert lines[section + 1] == "sparse = inductor_sparse.backend:sparse"


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    fields = Parser().parsestr(metadata(wheel, "METADATA"))
    required = [r for r in fields.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(required) == ["rich>=13", "torch>=2.11"]
    assert fields["Version"] == inductor_sparse.__version__
    assert fields["Requires-Python"] == ">=3.10"
    assert metadata(wheel, "licenses/LICENSE").startswith("BSD 3-Clause License")


def test_changelog_names_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {inductor_sparse.__version__}" in changelog


def test_torch_is_held_at_the_installed_version() -> None:
    pins = "# why\ntorch==2.13.0\nrich==15.0.0\ntorchfoo==1\n"
    assert setup_env.pinned_torch(pins) == "torch==2.13.0"
    held = setup_env.constraints_for(pins, {"torch": "2.11.0+cpu", "rich": "14.0"})
    assert held == "# why\nrich==15.0.0\ntorchfoo==1\ntorch==2.11.0+cpu\n"


@pytest.mark.parametrize(("torch", "kept"), [("2.13.0+cpu", True), ("2.11.0", False)])
def test_triton_is_pinned_beside_the_torch_it_fits(torch: str, kept: bool) -> None:
    pins = "torch==2.13.0\ntriton==3.7.1\n"
    held = setup_env.constraints_for(pins, {"torch": torch})
    assert ("triton==3.7.1\n" in held) == kept


def test_what_a_torch_for_gpus_brings_is_held_as_it_is() -> None:
    pins = "torch==2.13.0\ntriton==3.7.1\ncuda-bindings==13.5.0\nruff==1\n"
    pins += "nvidia-cuda-nvrtc==13.5.37\n"
    brought = {"torch": "2.15.0", "triton": "3.9.0", "nvidia-cuda-nvrtc": "13.2.86"}
    held = setup_env.constraints_for(pins, brought).splitlines()
    assert held[:2] == ["cuda-bindings==13.5.0", "ruff==1"]
    assert held[2:] == [f"{name}=={brought[name]}" for name in sorted(brought)]


def test_installed_packages_have_names_as_in_requirements() -> None:
    packages = setup_env.installed_packages(Path(sys.executable))
    assert packages["torch"] == importlib.metadata.version("torch")
    assert "pytest-xdist" in packages


def test_committed_pin_is_one_version_of_torch() -> None:
    pins = setup_env.CONSTRAINTS.read_text()
    assert setup_env.pinned_torch(pins).startswith("torch==2.")
