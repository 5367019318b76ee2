"""Compiled kernels on disk: shared, checked, and never needed."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from two_processes import WAIT, at_once

from inductor_sparse.runtime import cubin_cache

CUBIN = bytes(range(256)) * 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cubins"
    monkeypatch.setenv(cubin_cache.VARIABLE, str(place))
    return place


def test_what_is_stored_is_loaded() -> None:
    assert cubin_cache.load("kernel") is None
    cubin_cache.store("kernel", CUBIN)
    assert cubin_cache.load("kernel") == CUBIN


def test_without_the_variable_it_is_inside_inductors_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cubin_cache.VARIABLE)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert cubin_cache.folder() == tmp_path / "inductor" / "inductor_sparse"


@given(cut=st.integers(0, len(CUBIN) + 40), flip=st.integers(0, 255))
def test_a_damaged_entry_is_not_loaded(cut: int, flip: int) -> None:
    cubin_cache.store("kernel", CUBIN)
    path = cubin_cache.folder() / "kernel.cubin"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    assert cubin_cache.load("kernel") is None
    changed = bytes([whole[cut] ^ flip])
    path.write_bytes(whole[:cut] + changed + whole[cut + 1 :])
    assert cubin_cache.load("kernel") == (None if flip else CUBIN)


parts = st.tuples(st.text(max_size=4), st.lists(st.text(max_size=4), max_size=3))


@given(first=parts, second=parts, versions=st.tuples(st.text(), st.text()))
def test_keys_differ_wherever_anything_does(
    first: tuple[str, list[str]],
    second: tuple[str, list[str]],
    versions: tuple[str, str],
) -> None:
    keys = [
        cubin_cache.key(source, options, version)
        for (source, options), version in zip((first, second), versions, strict=True)
    ]
    same = first == second and versions[0] == versions[1]
    assert (keys[0] == keys[1]) == same


def test_a_folder_that_cannot_be_made_is_reported_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file is in the way")
    with caplog.at_level(logging.WARNING, cubin_cache.log.name):
        for _ in range(2):
            cubin_cache.store("kernel", CUBIN)
    (record,) = caplog.records
    assert str(folder) in record.getMessage()
    assert cubin_cache.VARIABLE in record.getMessage()
    assert cubin_cache.load("kernel") is None


def test_inductors_folder_that_cannot_be_made_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.delenv(cubin_cache.VARIABLE)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "inductor"))
    monkeypatch.setattr(cubin_cache, "_warned", set())
    with caplog.at_level(logging.WARNING, cubin_cache.log.name):
        for _ in range(2):
            cubin_cache.store("kernel", CUBIN)
    (record,) = caplog.records
    assert "cannot be saved in Inductor's cache folder" in record.getMessage()
    assert cubin_cache.load("kernel") is None


def test_a_full_disk_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with caplog.at_level(logging.WARNING, cubin_cache.log.name):
        cubin_cache.store("kernel", CUBIN)
    assert "No space left on device" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_read_only_folder_is_still_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    cubin_cache.store("kernel", CUBIN)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with caplog.at_level(logging.WARNING, cubin_cache.log.name):
        cubin_cache.store("other", CUBIN)
    assert "Permission denied" in caplog.text
    assert cubin_cache.load("kernel") == CUBIN
    assert cubin_cache.load("other") is None


WRITE = """
from inductor_sparse.runtime import cubin_cache
for i in range(300):
    cubin = bytes([i % 7]) * 20000
    cubin_cache.store(str(i % 7), cubin)
    assert cubin_cache.load(str(i % 7)) == cubin
"""


def test_two_processes_write_the_same_entries_at_once(folder: Path) -> None:
    at_once("from inductor_sparse.runtime import cubin_cache" + WAIT + WRITE)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"{i}.cubin" for i in range(7)]
