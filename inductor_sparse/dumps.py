"""A folder per compiled graph that shows what each pass did to it.

Under ``sparse.dump_dir`` each graph gets a folder of numbered files: for every pass
that changed something the graph before and after as readable Python and their diff,
then ``decisions.json``, the generated code, and ``index.md`` which lists them in order.
``index.md`` at the top lists the graphs, oldest first.  The same texts go to
``TORCH_TRACE`` (read them with tlparse) whether or not a folder is set, and one line
per pass goes to the log (``TORCH_LOGS="+inductor_sparse"``).

A folder that cannot be written costs one warning, never the compilation.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections import Counter
from pathlib import Path

from torch._guards import CompileContext
from torch._logging import trace_structured

from inductor_sparse.decisions import GraphDecisions

log = logging.getLogger(__name__)
pass_log = logging.getLogger("inductor_sparse.passes")

# The assignment of a printed node; comments may quote user code that looks like one.
_OP = re.compile(r"^[^#\n]*? = torch\.ops\.(\w+\.\w+)", re.MULTILINE)
_UNSAFE = re.compile(r"[^\w.-]+")
_warned_dirs: set[str] = set()


def op_count_changes(before: str, after: str) -> list[str]:
    """How many times each op is called in two printed graphs, where that differs.

    Overloads count as one op: ``["aten.mm: 24 -> 0", "aten.relu: 24 -> 0"]``.
    """
    counts_before = Counter(_OP.findall(before))
    counts_after = Counter(_OP.findall(after))
    return [
        f"{op}: {counts_before[op]} -> {counts_after[op]}"
        for op in sorted(counts_before.keys() | counts_after.keys())
        if counts_before[op] != counts_after[op]
    ]


class DumpWriter:
    """Writes the dump of one graph; one writer per graph, used by one thread.

    Args:
        dump_dir: the user's folder, created if missing; empty for none, in which case
            only the log and the structured trace are written.
        graph_name: what AOTAutograd calls the graph, e.g. ``model__0_inference_0``.
    """

    def __init__(self, dump_dir: str, graph_name: str) -> None:
        self._root = Path(dump_dir) if dump_dir else None
        self._name = _safe(graph_name)
        compile_id = CompileContext.current_compile_id()
        self._compile_id = str(compile_id) if compile_id is not None else ""
        self._folder: Path | None = None
        self._files = 0
        self._pass_rows: list[str] = []
        self._decisions: GraphDecisions | None = None
        self._links: list[str] = []

    @property
    def folder(self) -> Path | None:
        """The folder of this graph; ``None`` before its first file is written."""
        return self._folder

    def on_pass(self, name: str, before: str, after: str, seconds: float) -> None:
        """Record one pass: its graph as Python text before and after, and its time."""
        changes = op_count_changes(before, after)
        changed = before != after
        summary = ", ".join(changes) or ("ops unchanged" if changed else "no change")
        level = logging.INFO if changed else logging.DEBUG
        pass_log.log(
            level, "%s: %s: %s (%.1f ms)", self._name, name, summary, seconds * 1e3
        )
        links = self._dump_pass(name, before, after) if changed else []
        cells = (name, f"{seconds * 1e3:.1f}", "<br>".join(changes) or summary)
        self._pass_rows.append(f"| {' | '.join((*cells, ' '.join(links)))} |")

    def decisions(self, decisions: GraphDecisions) -> None:
        """Record how each site of the graph ended, as ``decisions.json``."""
        self._decisions = decisions
        text = json.dumps(decisions.to_dict(), indent=2) + "\n"
        self._write("decisions.json", text)
        self._trace("decisions", text, encoding="json")

    def generated_code(self, name: str, text: str) -> None:
        """Record generated code; a ``name`` without a suffix gets that of Python."""
        name = name if Path(name).suffix else f"{name}.py"
        link = self._write(self._numbered(name), text)
        if link is not None:
            self._links.append(link)
        self._trace(name, text)

    def finish(self) -> None:
        """Write ``index.md`` of the graph; call again after adding more files."""
        self._write("index.md", self._index())

    def _dump_pass(self, name: str, before: str, after: str) -> list[str]:
        diff = "\n".join(
            difflib.unified_diff(
                before.splitlines(), after.splitlines(), "before", "after", lineterm=""
            )
        )
        self._trace(f"{name}.diff", diff)
        stem = self._numbered(name)
        texts = {"before.py": before, "after.py": after, "diff": diff + "\n"}
        links = [self._write(f"{stem}.{end}", text) for end, text in texts.items()]
        return [
            f"[{end}]({link})"
            for end, link in zip(texts, links, strict=True)
            if link is not None
        ]

    def _numbered(self, name: str) -> str:
        self._files += 1
        return f"{self._files:02d}_{_safe(name)}"

    def _trace(self, name: str, text: str, encoding: str = "string") -> None:
        label = f"inductor_sparse.{self._name}.{name}"
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": label, "encoding": encoding},
            payload_fn=lambda: text,
        )

    def _write(self, name: str, text: str) -> str | None:
        """Write one file and return its name; ``None`` if there is nowhere to write."""
        if self._root is None:
            return None
        try:
            if self._folder is None:
                self._folder = self._create_folder(self._root)
            (self._folder / name).write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            _warn_once(self._root, error)
            self._root = None
            return None
        return name

    def _create_folder(self, root: Path) -> Path:
        """Make a folder that no other graph, thread or process has."""
        root.mkdir(parents=True, exist_ok=True)
        stem = f"{self._name}-p{os.getpid()}"
        if self._compile_id:
            stem += f"-c{_safe(self._compile_id)}"
        number = sum(1 for entry in root.iterdir() if entry.is_dir())
        while True:
            folder = root / f"{number:03d}-{stem}"
            try:
                # mkdir is atomic: of two writers that want one name, one fails here.
                folder.mkdir()
            except FileExistsError:
                number += 1
                continue
            # Appending keeps the lines of concurrent writers whole.
            with (root / "index.md").open("a", encoding="utf-8") as index:
                index.write(f"- [{folder.name}]({folder.name}/index.md)\n")
            return folder

    def _index(self) -> str:
        title = f"# {self._name}\n"
        if self._compile_id:
            title += f"\ncompile id {self._compile_id}, process {os.getpid()}\n"
        parts = [title]
        if self._pass_rows:
            header = "| pass | ms | ops | files |\n|---|---|---|---|\n"
            parts.append("## Passes\n\n" + header + "\n".join(self._pass_rows) + "\n")
        if self._decisions is not None:
            parts.append(_decision_section(self._decisions))
        if self._links:
            items = "\n".join(f"- [{link}]({link})" for link in self._links)
            parts.append(f"## Generated code\n\n{items}\n")
        return "\n".join(parts)


def _decision_section(graph: GraphDecisions) -> str:
    lines = ["## Decisions", ""]
    if graph.from_cache:
        lines.append("Loaded from the compile cache: no pass ran in this process.")
    for decision in graph.decisions:
        reason = f" ({decision.reason.value})" if decision.reason is not None else ""
        lines.append(
            f"- `{decision.site}` {decision.source}: {decision.rule or 'no rule'}: "
            f"{decision.status.value}{reason} {decision.detail}".rstrip()
        )
    lines.append(f"- {graph.other_matmuls} other matmuls")
    lines += ["", "All fields: [decisions.json](decisions.json)", ""]
    return "\n".join(lines)


def _warn_once(root: Path, error: Exception) -> None:
    if str(root) in _warned_dirs:
        return
    _warned_dirs.add(str(root))
    log.warning(
        "cannot write to the dump folder %s (%s); compilation goes on without a dump. "
        "Point sparse.dump_dir at a folder that you can write to.",
        root,
        getattr(error, "strerror", None) or error,
    )


def _safe(name: str) -> str:
    return _UNSAFE.sub("_", name).strip("_.") or "graph"
