"""Renderers: what the text, the rich and the HTML view say about made-up decisions."""

from __future__ import annotations

import dataclasses
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from inductor_sparse.decisions import Decision, GraphDecisions, Reason, Status, Tier
from inductor_sparse.report.explanation import Explanation
from inductor_sparse.report.hints import HINTS, hint
from inductor_sparse.report.table import (
    HEADERS,
    bytes_text,
    conclusion,
    percent,
    row,
)


def decision(reason: Reason | None = None, **fields: Any) -> Decision:
    base = Decision(
        module="layers.0.down",
        source="model.py:41",
        rule="relu_squared_matmul",
        tier=Tier.EXACT,
        status=Status.APPLIED if reason is None else Status.DENSE,
        reason=reason,
        detail="",
        shapes={"M": 128, "K": 16384, "N": 4096},
        dtype="float32",
        device="cpu",
        density=0.051,
        dropped_energy=0.0123,
        expected_gain=4.1 if reason is None else None,
        site="layers.0.down:16384x4096",
    )
    return dataclasses.replace(base, **fields)


DENSE = decision(
    Reason.TOO_DENSE, module="layers.1.down", detail="density 0.8", density=0.8
)
MIXED = Explanation(
    (
        GraphDecisions("g0", [decision(weight_copy_bytes=3 * 2**20), DENSE], 2),
        GraphDecisions("g1", [decision(module="tail")], 1),
    )
)


def test_first_line_is_the_conclusion() -> None:
    first = str(MIXED).splitlines()[0]
    assert first == "2 of 3 sites run sparse; 1 dense (too-dense); 3 other matmuls"


@pytest.mark.parametrize(
    ("sites", "graphs", "others", "line"),
    [
        ([], 0, 0, "no graph was compiled"),
        ([], 1, 1, "no candidate site: .*; 1 other matmul$"),
        ([decision()], 1, 0, "^1 of 1 site runs sparse; 0 other matmuls$"),
        (
            [DENSE, DENSE, decision(Reason.UNSUPPORTED_DTYPE)],
            1,
            0,
            r"^0 of 3 sites run sparse; 3 dense \(2 too-dense, 1 unsupported-dtype\);",
        ),
    ],
)
def test_conclusion(sites: list[Decision], graphs: int, others: int, line: str) -> None:
    assert re.search(line, conclusion(sites, graphs, others))


def test_text_shows_every_field_of_a_site() -> None:
    text = str(MIXED)
    lines = text.splitlines()
    assert lines[2].split("  ")[0] == "site"
    assert re.search(
        r"layers\.0\.down +128x16384x4096 +float32 +5\.1 % +1\.2 % +4\.10x +sparse$",
        lines[3],
    )
    assert lines[4] == "  model.py:41, relu_squared_matmul (exact)"
    assert lines[5].endswith("-  too-dense")
    assert lines[6].endswith("(exact), density 0.8")
    assert "The model was compiled as 2 graphs." in text
    assert "copies of weights hold 3.0 MiB" in text
    assert f"Hint: too-dense: {HINTS[Reason.TOO_DENSE]}." in " ".join(lines)


def test_columns_line_up_and_fit_a_small_terminal() -> None:
    lines = str(MIXED).splitlines()
    assert lines[2].index("M") == lines[3].index("128") == lines[5].index("128")
    assert lines[2].index("decision") == lines[3].index("sparse")
    assert lines[2].index("decision") == lines[5].index("too-dense")
    assert max(len(line) for line in lines) <= 80


def test_long_and_symbolic_cells_are_never_cut() -> None:
    module = "model.decoder.layers.11.feed_forward.experts.3.down_projection"
    site = decision(module=module, shapes={"M": "s77*s53", "K": 64, "N": 16})
    text = str(Explanation((GraphDecisions("g", [site]),)))
    assert module in text
    assert "s77*s53x64x16" in text


def test_row_has_a_cell_for_each_header() -> None:
    for site in MIXED.sites:
        assert len(row(site).cells) == len(HEADERS)


def test_unmeasured_values_show_as_a_dash() -> None:
    site = decision(density=None, dropped_energy=None, expected_gain=None)
    assert row(site).cells[3:6] == ("-", "-", "-")


def test_rich_view_has_the_same_letters_as_the_text() -> None:
    wide = Console(file=io.StringIO(), width=200, force_terminal=False)
    wide.print(MIXED)
    assert wide.file.getvalue().rstrip() == str(MIXED)
    colour = Console(
        file=io.StringIO(), width=80, force_terminal=True, color_system="standard"
    )
    colour.print(MIXED)
    assert "\x1b[32m" in colour.file.getvalue()


class CellCounter(HTMLParser):
    """Counts cells per row and collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += int(dict(attrs).get("colspan") or 1)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_rows_are_as_wide_as_the_header_and_escaped() -> None:
    site = decision(module="<lambda>", detail="a < b & c")
    parser = CellCounter()
    html = Explanation((GraphDecisions("g", [site, DENSE]),))._repr_html_()
    parser.feed(html)
    assert set(parser.rows) == {len(HEADERS)}
    assert len(parser.rows) == 5
    assert "<lambda>" in parser.text
    assert "a < b & c" in parser.text
    assert "<lambda>" not in html


def test_to_dict_lists_every_site_with_its_graph() -> None:
    data = MIXED.to_dict()
    assert (data["applied"], data["dense"], data["other_matmuls"]) == (2, 1, 3)
    assert data["weight_copy_bytes"] == 3 * 2**20
    assert [site["graph"] for site in data["sites"]] == ["g0", "g0", "g1"]
    site = data["sites"][1]
    assert site["module"] == "layers.1.down"
    assert (site["status"], site["reason"]) == ("dense", "too-dense")
    assert (site["tier"], site["rule"]) == ("exact", "relu_squared_matmul")


def test_every_reason_has_a_hint_and_the_commonest_wins() -> None:
    assert set(HINTS) == set(Reason)
    other = decision(Reason.NO_KERNEL_YET)
    assert hint([other, DENSE, DENSE, decision()]).startswith("too-dense: ")
    assert hint([other, DENSE]).startswith("no-kernel-yet: ")
    assert hint([decision()]) == ""
    idle = decision(expected_gain=1.0, density=0.7)
    forced = decision(expected_gain=0.8, tier=Tier.APPROXIMATE)
    assert hint([idle, idle, decision()]).startswith("2 applied sites had too many")
    assert hint([forced, decision()]) == ""
    assert hint([forced, idle]).startswith("1 applied site had too many")
    assert hint([idle, other]).startswith("no-kernel-yet: ")


@pytest.mark.parametrize(
    ("tokens", "density", "device", "said"),
    [
        (4, 0.9, "cpu", False),  # a plan would skip as well: no density loses
        (64, 0.5, "cpu", False),
        (64, 0.7, "cpu", True),
        ("s0", 0.7, "cpu", True),
        (64, None, "cpu", True),
        (4, 0.9, "cuda", True),
    ],
)
def test_a_plan_is_advised_where_it_changes_something(
    tokens: int | str, density: float | None, device: str, said: bool
) -> None:
    shapes: dict[str, int | str] = {"M": tokens, "K": 256, "N": 64}
    idle = decision(expected_gain=1.0, density=0.7)
    idle = dataclasses.replace(idle, density=density, shapes=shapes, device=device)
    assert hint([idle]).startswith("1 applied site had too many") == said


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (3 * 2**40, "3072.0 GiB"),
    ],
)
def test_bytes_text(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (None, "-"),
        (0.0, "0 %"),
        (1e-9, "<0.001 %"),
        (0.0000123, "0.0012 %"),
        (0.0003, "0.03 %"),
        (0.00996, "1 %"),
        (0.0111, "1.1 %"),
        (0.1234, "12 %"),
        (0.5, "50 %"),
        (0.975, "97.5 %"),
        (0.9997, "99.97 %"),
        (1 - 1e-9, ">99.999 %"),
        (1.0, "100 %"),
    ],
)
def test_percent_rounds_nothing_to_zero(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text
