from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_sparse.bench.rows import (
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


def test_commit_is_a_hash_or_unknown() -> None:
    assert re.fullmatch(r"[0-9a-f]{7,12}(-dirty)?|unknown", commit())
