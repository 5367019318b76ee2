from __future__ import annotations

import io
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_sparse.bench import rows
from inductor_sparse.bench.rows import (
    FEW_TOKENS,
    PROTOCOL,
    RowFileError,
    commit,
    machine,
    read_rows,
    write_row,
)


def test_rows_survive_the_file(tmp_path: Path, ffn_row: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as stream:
        write_row(ffn_row, stream)
        write_row({"a": 1}, stream)
    assert read_rows(path) == [ffn_row, {"a": 1}]
    assert len(path.read_text().splitlines()) == 2


def test_a_row_is_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as stream:
        write_row({"a": 1}, stream)
        assert read_rows(path) == [{"a": 1}]


def test_numbers_that_are_not_json_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_row({"ratio": float("nan")}, io.StringIO())


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": 1}\n{oops\n', ":2: not JSON"), (b"[1]\n", ":1: expected a JSON object")],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(RowFileError, match=message):
        read_rows(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_unreadable_files_are_errors(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RowFileError, match="cannot read rows from"):
        read_rows(path)


def test_machine_fields_are_json_and_complete() -> None:
    fields = json.loads(json.dumps(machine("cpu")))
    assert fields["torch"] == torch.__version__
    assert fields["threads"] == torch.get_num_threads()
    assert fields["device"] == "cpu"
    assert fields["device_name"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", fields["timestamp"])


def git(folder: Path, *argv: str) -> str:
    """The output of a git command that knows nobody's settings."""
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org"}
    who |= {key.replace("AUTHOR", "COMMITTER"): value for key, value in who.items()}
    who |= {"PATH": os.environ["PATH"], "HOME": str(folder)}
    command = ["git", *argv]
    return subprocess.run(
        command, cwd=folder, env=who, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository that tracks a file named like the one that asks."""
    (tmp_path / "rows.py").write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "rows.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    git(tmp_path, "tag", "-m", "a name that is no hash", "v1")
    return tmp_path


def test_commit_is_dirty_only_by_tracked_files(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "--short=12", "HEAD").strip()
    (checkout / "unknown.txt").write_text("1")
    assert rows._described.__wrapped__(checkout) == head
    (checkout / "rows.py").write_text("2")
    assert rows._described.__wrapped__(checkout) == f"{head}-dirty"


def test_commit_is_not_that_of_a_checkout_around_an_install(checkout: Path) -> None:
    installed = checkout / "site-packages"
    installed.mkdir()
    (installed / "rows.py").write_text("1")
    assert rows._described.__wrapped__(installed) == "unknown"


def test_commit_of_a_copy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows._described.__wrapped__(tmp_path) == "unknown"
    monkeypatch.setenv("INDUCTOR_SPARSE_COMMIT", "0123456789ab")
    assert machine("cpu")["commit"] == "0123456789ab"
    monkeypatch.setenv("INDUCTOR_SPARSE_COMMIT", "")
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", commit())


@pytest.mark.parametrize(
    "device, tokens, current",
    [("cpu", 512, True), ("cuda", FEW_TOKENS, True), ("cuda", FEW_TOKENS + 1, False)],
)
def test_turns_matter_where_a_clock_settles(
    device: str, tokens: int, current: bool
) -> None:
    row = {"device": device, "tokens": tokens, "protocol": 2}
    assert rows.is_current(row) is current
    assert rows.is_current(row | {"protocol": PROTOCOL})
    assert not rows.is_current(row | {"protocol": 1})


def test_packing_names_no_tokens() -> None:
    assert not rows.is_current({"device": "cuda", "protocol": 2})
