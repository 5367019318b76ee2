"""Dumps: what is in the folder, what is logged, and what happens when it cannot be."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._guards import CompileContext, CompileId, compile_context

from inductor_sparse import dumps
from inductor_sparse.decisions import Decision, GraphDecisions, Reason, Status, Tier
from inductor_sparse.dumps import DumpWriter, op_count_changes

BEFORE = """\
def forward(self, z, w):
    # File: model.py:3 in forward, code: y = torch.ops.aten.relu.default(z)
    relu: "f32[2, 4]" = torch.ops.aten.relu.default(z);  z = None
    pow_1: "f32[2, 4]" = torch.ops.aten.pow.Tensor_Scalar(relu, 2);  relu = None
    mm: "f32[2, 3]" = torch.ops.aten.mm.default(pow_1, w);  pow_1 = w = None
    return (mm,)
"""
AFTER = """\
def forward(self, z, w):
    mm: "f32[2, 3]" = torch.ops.inductor_sparse.activation_spmm.default(z, w, 'relu2')
    return (mm,)
"""


def dense_decision() -> Decision:
    return Decision(
        module="layers.0.down",
        source="model.py:3",
        rule="relu_squared_matmul",
        tier=Tier.EXACT,
        status=Status.DENSE,
        reason=Reason.TOO_DENSE,
        detail="density 0.8 > 0.6",
        shapes={"M": 2, "K": 4, "N": 3},
        dtype="float32",
        device="cpu",
        site="layers.0.down:4x3",
    )


def test_op_count_changes_name_only_what_changed() -> None:
    after = AFTER.replace("return", "x = torch.ops.aten.mul.Tensor(mm, mm)\n    return")
    assert op_count_changes(BEFORE, after) == [
        "aten.mm: 1 -> 0",
        "aten.mul: 0 -> 1",
        "aten.pow: 1 -> 0",
        "aten.relu: 1 -> 0",
        "inductor_sparse.activation_spmm: 0 -> 1",
    ]
    assert op_count_changes(BEFORE, BEFORE) == []


def test_folder_holds_numbered_files_and_an_index(tmp_path: Path) -> None:
    writer = DumpWriter(str(tmp_path / "new" / "dump"), "model__0_inference_0")
    writer.on_pass("canonicalize", BEFORE, BEFORE, 0.001)
    writer.on_pass("relu_squared_matmul", BEFORE, AFTER, 0.0025)
    writer.decisions(GraphDecisions("g", [dense_decision()], other_matmuls=2))
    writer.generated_code("kernel.cpp", "// code")
    writer.generated_code("forward", "import torch")
    writer.finish()
    assert writer.folder is not None
    assert sorted(path.name for path in writer.folder.iterdir()) == [
        "01_relu_squared_matmul.after.py",
        "01_relu_squared_matmul.before.py",
        "01_relu_squared_matmul.diff",
        "02_kernel.cpp",
        "03_forward.py",
        "decisions.json",
        "index.md",
    ]
    diff = (writer.folder / "01_relu_squared_matmul.diff").read_text()
    assert "-    relu: " in diff
    assert "activation_spmm" in diff
    sites = json.loads((writer.folder / "decisions.json").read_text())["sites"]
    assert sites[0]["reason"] == "too-dense"
    index = (writer.folder / "index.md").read_text()
    assert "| canonicalize | 1.0 | no change |" in index
    assert "| relu_squared_matmul | 2.5 | aten.mm: 1 -> 0<br>" in index
    assert "dense (too-dense) density 0.8 > 0.6" in index
    assert "- 2 other matmuls" in index
    assert "[02_kernel.cpp](02_kernel.cpp)" in index


def test_every_link_of_the_indexes_leads_to_a_file(tmp_path: Path) -> None:
    for name in ("first", "second"):
        writer = DumpWriter(str(tmp_path), name)
        writer.on_pass("relu_matmul", BEFORE, AFTER, 0.001)
        writer.decisions(GraphDecisions("g"))
        writer.finish()
    top = (tmp_path / "index.md").read_text()
    assert [line.split("-")[2] for line in top.splitlines()] == ["first", "second"]
    for index in tmp_path.rglob("index.md"):
        links = [part.split(")")[0] for part in index.read_text().split("](")[1:]]
        assert links
        for link in links:
            assert (index.parent / link).is_file()


def test_table_rows_have_as_many_cells_as_the_header(tmp_path: Path) -> None:
    writer = DumpWriter(str(tmp_path), "graph")
    writer.on_pass("a", BEFORE, AFTER, 0.001)
    writer.on_pass("b", AFTER, AFTER, 0.001)
    writer.on_pass("c", AFTER, AFTER + "\n", 0.001)
    writer.finish()
    assert writer.folder is not None
    index = (writer.folder / "index.md").read_text()
    rows = [line for line in index.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {5}
    assert len(rows) == 5
    assert "| ops unchanged |" in index


def test_threads_and_equal_names_never_share_a_folder(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    folders: list[Path | None] = []

    def dump() -> None:
        barrier.wait()
        for _ in range(5):
            writer = DumpWriter(str(tmp_path), "model__0_inference_0")
            writer.finish()
            folders.append(writer.folder)

    threads = [threading.Thread(target=dump) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == len(folders) == 40
    assert len((tmp_path / "index.md").read_text().splitlines()) == 40


def test_folder_names_the_compile_id_and_unsafe_names_are_cleaned(
    tmp_path: Path,
) -> None:
    with compile_context(CompileContext(CompileId(frame_id=3, frame_compile_id=1))):
        writer = DumpWriter(str(tmp_path), "../we ird/name")
    writer.finish()
    assert writer.folder is not None
    assert writer.folder.parent == tmp_path
    assert writer.folder.name.endswith("-c3_1")
    assert "compile id 3/1" in (writer.folder / "index.md").read_text()


@pytest.mark.parametrize("inside", ["file/dump", "nul\0byte"])
def test_unwritable_folder_warns_once_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, inside: str
) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / inside)
    with caplog.at_level(logging.WARNING, logger="inductor_sparse"):
        for _ in range(2):
            writer = DumpWriter(folder, "graph")
            writer.on_pass("a", BEFORE, AFTER, 0.001)
            writer.decisions(GraphDecisions("g"))
            writer.generated_code("kernel.cpp", "// code")
            writer.finish()
            assert writer.folder is None
    assert len(caplog.records) == 1
    assert folder in caplog.text
    assert "sparse.dump_dir" in caplog.text


def test_without_a_folder_only_the_log_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.DEBUG, logger="inductor_sparse"):
        writer = DumpWriter("", "graph")
        writer.on_pass("canonicalize", BEFORE, BEFORE, 0.001)
        writer.on_pass("relu_squared_matmul", BEFORE, AFTER, 0.002)
        writer.finish()
    assert list(tmp_path.iterdir()) == []
    ours = [r for r in caplog.records if r.name == "inductor_sparse.passes"]
    assert [record.levelname for record in ours] == ["DEBUG", "INFO"]
    assert "graph: canonicalize: no change (1.0 ms)" in caplog.text
    assert "aten.relu: 1 -> 0" in caplog.text


def test_artifacts_reach_the_structured_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[str, str]] = {}

    def record(
        kind: str,
        metadata_fn: Callable[[], dict[str, str]],
        payload_fn: Callable[[], str],
    ) -> None:
        assert kind == "artifact"
        metadata = metadata_fn()
        seen[metadata["name"]] = (metadata["encoding"], payload_fn())

    monkeypatch.setattr(dumps, "trace_structured", record)
    writer = DumpWriter("", "graph")
    writer.on_pass("canonicalize", BEFORE, BEFORE, 0.001)
    writer.on_pass("relu_squared_matmul", BEFORE, AFTER, 0.002)
    writer.decisions(GraphDecisions("g", [dense_decision()]))
    assert set(seen) == {
        "inductor_sparse.graph.relu_squared_matmul.diff",
        "inductor_sparse.graph.decisions",
    }
    encoding, payload = seen["inductor_sparse.graph.decisions"]
    assert encoding == "json"
    assert json.loads(payload)["sites"][0]["module"] == "layers.0.down"
