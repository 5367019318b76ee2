"""Plans: saved and loaded unchanged, and every broken file refused with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inductor_sparse.errors import SparsePlanError
from inductor_sparse.plan import FORMAT, VERSION, Plan, SitePlan

SITE = SitePlan(
    density=0.1,
    max_density=0.2,
    dropped_energy=0.01,
    max_dropped_energy=0.05,
    calls=3,
    tokens=96,
)
FRACTION = st.floats(0, 1)
SITE_PLANS = st.builds(
    SitePlan,
    density=FRACTION,
    max_density=FRACTION,
    dropped_energy=st.none() | FRACTION,
    max_dropped_energy=st.none() | FRACTION,
    calls=st.integers(0, 2**40),
    tokens=st.integers(0, 2**40),
)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.dictionaries(st.text(max_size=20), SITE_PLANS, max_size=4))
def test_json_form_round_trips(sites: dict[str, SitePlan]) -> None:
    plan = Plan(sites)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_save_and_load_creates_missing_folders(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "model.json"
    plan = Plan({"layers.0.down:64x16": SITE})
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.load(str(path)).site("layers.0.down:64x16") == SITE
    assert plan.site("layers.1.down:64x16") is None


def valid() -> dict[str, Any]:
    return Plan({"down:64x16": SITE}).to_dict()


def with_field(name: str, value: object) -> dict[str, Any]:
    data = valid()
    data["sites"]["down:64x16"][name] = value
    return data


def without_field(name: str) -> dict[str, Any]:
    data = valid()
    del data["sites"]["down:64x16"][name]
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a plan file"),
        ({}, "not a plan file"),
        ({**valid(), "format": "other"}, "not a plan file"),
        ({**valid(), "version": VERSION + 1}, f"version {VERSION + 1}"),
        ({"format": FORMAT}, "version None"),
        ({**valid(), "sites": []}, "'sites' is not an object"),
        ({**valid(), "sites": {"a": 3}}, "site 'a' must have exactly"),
        (without_field("calls"), "must have exactly the fields"),
        (with_field("colour", 1), "must have exactly the fields"),
        (with_field("density", "0.1"), "density = '0.1' is not a fraction"),
        (with_field("density", None), "density = None is not a fraction"),
        (with_field("max_density", 1.5), "max_density = 1.5"),
        (with_field("density", float("nan")), "density = nan"),
        (with_field("dropped_energy", -0.1), "is not a fraction in [0, 1] or null"),
        (with_field("calls", 1.0), "calls = 1.0 is not a non-negative integer"),
        (with_field("tokens", -1), "tokens = -1"),
        (with_field("tokens", True), "tokens = True"),
    ],
)
def test_rejects_broken_fields(tmp_path: Path, data: object, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SparsePlanError) as caught:
        Plan.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "inductor_sparse.calibrate(" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the plan"),
        (b"", "not valid JSON"),
        (b'{"format": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_rejects_unreadable_file(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SparsePlanError, match=message) as caught:
        Plan.load(path)
    assert "inductor_sparse.calibrate(" in str(caught.value)


def test_save_below_a_file_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "plan.json"
    with pytest.raises(SparsePlanError, match="writable folder") as caught:
        Plan().save(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("sites", [[], ["a:1x2"], ["a:1x2", "z:9x9"]])
def test_plan_of_this_model_matches(sites: list[str]) -> None:
    Plan({"a:1x2": SITE, "b:3x4": SITE}).check_matches(sites)


def test_empty_plan_matches_anything() -> None:
    Plan().check_matches(["a:1x2"])


def test_plan_of_another_model_is_refused() -> None:
    plan = Plan({f"layers.{i}:1x2": SITE for i in range(5)})
    with pytest.raises(SparsePlanError, match="made for another model") as caught:
        plan.check_matches(["blocks.0:1x2"])
    assert "layers.0:1x2, layers.1:1x2, layers.2:1x2 and 2 more" in str(caught.value)
    assert "blocks.0:1x2" in str(caught.value)
