"""The documents say what the code does: generated parts, tables, links, code blocks."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import mktestdocs
import pytest

import inductor_sparse
from inductor_sparse import config
from inductor_sparse.decisions import Reason
from tools import api_page, check_sizes, generate_docs

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PAGES_WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def page_id(page: Path) -> str:
    """The name of a page below the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def test_generated_pages_are_fresh() -> None:
    assert list(generate_docs.stale()) == []


def test_every_option_is_listed() -> None:
    listed = {option.name: option for option in generate_docs.declared_options()}
    assert set(listed) == set(config.get_config_copy()) == set(config.HELP)
    assert listed["plan"].variable == "INDUCTOR_SPARSE_PLAN"


def test_every_environment_variable_is_listed() -> None:
    sources = (ROOT / "inductor_sparse").rglob("*.py")
    name = r"\bINDUCTOR_SPARSE_\w+"
    named = {found for path in sources for found in re.findall(name, path.read_text())}
    text = (ROOT / "docs" / "options.md").read_text()
    rows = re.findall(r"^\| `(INDUCTOR_\w+)` \|", text, flags=re.MULTILINE)
    assert rows == sorted(named)
    assert len(rows) == 6


def test_every_public_name_is_on_the_api_page() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [n for n in inductor_sparse.__all__ if f"`{n}`" not in text]
    assert missing == []
    returned = [inspect.signature(f).return_annotation for f in api_page.FUNCTIONS]
    classes = [kind for kind in returned if kind.isidentifier()]
    assert classes == ["Explanation", "Plan", "SiteReport"]
    assert [kind for kind in classes if f"### `{kind}`" not in text] == []


@pytest.mark.parametrize("function", api_page.FUNCTIONS)
def test_docstrings_say_what_is_taken_and_returned(function: Any) -> None:
    page = api_page.section(function)
    assert "\nReturns:\n" in page
    taken = inspect.signature(function).parameters
    assert [name for name in taken if f"\n- `{name}`: " not in page] == []


def test_every_reason_is_explained_once() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", text, flags=re.MULTILINE)
    assert rows == [reason.value for reason in Reason]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [t.partition("#")[0] for t in targets if "://" not in t and t[0] != "#"]
    assert [t for t in local if not (page.parent / t).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=page_id)
def test_code_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The blocks of a page are one program, in order, run in a folder of its own.
    monkeypatch.chdir(tmp_path)
    # What a page sets is set for that page alone.
    with config.patch(config.get_config_copy()):
        mktestdocs.check_md_file(page, memory=True)


def test_no_source_file_is_oversized() -> None:
    assert check_sizes.oversized() == []
