"""The laws about imports that import-linter has no contract for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "inductor_sparse"
COMPILER_FREE = (
    "config",
    "decisions",
    "errors",
    "formats",
    "ops",
    "ops24",
    "reference",
)


def imported(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file it does so."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", COMPILER_FREE)
def test_semantics_know_no_compiler(module: str) -> None:
    files = [PACKAGE / f"{module}.py", *(PACKAGE / module).glob("*.py")]
    names = {name for path in files if path.is_file() for name in imported(path)}
    assert names
    assert [
        n for n in names if n.startswith(("torch._inductor", "torch._dynamo"))
    ] == []


def test_torch_versions_are_never_compared() -> None:
    # The reports may print the version; nothing may branch on it.
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                assert "torch.__version__" not in ast.unparse(node), path


def test_nothing_is_patched_with_a_tool_for_tests() -> None:
    # torch's own config.patch is another thing: a setting for one compilation.
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.startswith("unittest") for name in imported(path)), path
