"""A plan: what was measured at each site of one model on representative inputs.

``inductor_sparse.calibrate(model, batches, path)`` makes one and
``options={"sparse.plan": path}`` uses it: sites measured too dense stay dense from the
first call on, instead of being found out at run time.  The file is small JSON that can
be read, diffed and committed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inductor_sparse.errors import SparsePlanError

FORMAT = "inductor_sparse.plan"
VERSION = 1

_REMEDY = "make it again with inductor_sparse.calibrate(model, batches, path)"
_COUNTS = ("calls", "tokens")
_OPTIONAL = ("dropped_energy", "max_dropped_energy")


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """The measurements of one site; fractions are in [0, 1].

    ``density`` is the fraction of non-zeros of the matmul's left operand, averaged over
    all elements seen, ``max_density`` that of the densest single call.
    ``dropped_energy`` is the share of the operand's squared norm lost by keeping two of
    every four values, likewise mean (over calls, weighted by energy) and worst call;
    both are ``None`` where the 2:4 format does not apply.  ``calls`` counts executions,
    ``tokens`` the rows of the operand in all of them.
    """

    density: float
    max_density: float
    dropped_energy: float | None
    max_dropped_energy: float | None
    calls: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Measurements by site key; see :attr:`inductor_sparse.decisions.Decision.site`."""

    sites: Mapping[str, SitePlan] = dataclasses.field(default_factory=dict)

    def site(self, site: str) -> SitePlan | None:
        """The measurements of ``site``, or ``None`` if the plan does not know it."""
        return self.sites.get(site)

    def check_matches(self, sites: Iterable[str]) -> None:
        """Check that a compiled graph with these candidate sites belongs to this plan.

        A graph break splits a model into several graphs, so a graph with no candidate
        passes, and so does one that shares a single site with the plan.

        Raises:
            SparsePlanError: both have sites, and not one of them is common.
        """
        wanted = set(sites)
        if not wanted or not self.sites or not wanted.isdisjoint(self.sites):
            return
        raise SparsePlanError(
            "the plan was made for another model: it knows "
            f"{_some(self.sites)}, this graph has {_some(wanted)}; "
            "calibrate this model, or drop the sparse.plan option"
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, sites sorted by key."""
        sites = {key: dataclasses.asdict(self.sites[key]) for key in sorted(self.sites)}
        return {"format": FORMAT, "version": VERSION, "sites": sites}

    @classmethod
    def from_dict(cls, data: object, *, where: str = "plan") -> Plan:
        """Rebuild a plan from :meth:`to_dict`; ``where`` names the culprit in errors.

        Raises:
            SparsePlanError: another format or version, or a field of the wrong type.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise SparsePlanError(f"{where}: not a plan file; {_REMEDY}")
        if data.get("version") != VERSION:
            raise SparsePlanError(
                f"{where}: version {data.get('version')!r}, this package reads version "
                f"{VERSION}; {_REMEDY}"
            )
        sites = data.get("sites")
        if not isinstance(sites, dict):
            raise SparsePlanError(f"{where}: 'sites' is not an object; {_REMEDY}")
        return cls({key: _site_plan(where, key, sites[key]) for key in sites})

    def save(self, path: str | Path) -> None:
        """Write the plan to ``path`` as JSON, creating missing folders.

        Raises:
            SparsePlanError: the path cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise SparsePlanError(
                f"{path}: cannot write the plan ({error.strerror}); "
                "choose a path in a writable folder"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`.

        Raises:
            SparsePlanError: the file is missing, unreadable, not JSON, of another
                version, or has fields of the wrong type; the message says which.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise SparsePlanError(
                f"{path}: cannot read the plan ({error.strerror}); "
                f"correct sparse.plan or {_REMEDY}"
            ) from error
        except UnicodeDecodeError as error:
            raise SparsePlanError(f"{path}: not a text file; {_REMEDY}") from error
        try:
            data = json.loads(text)
        # Deep nesting overflows the parser's stack instead of failing to parse.
        except (json.JSONDecodeError, RecursionError) as error:
            raise SparsePlanError(f"{path}: not valid JSON; {_REMEDY}") from error
        return cls.from_dict(data, where=str(path))


def _site_plan(where: str, key: str, fields: object) -> SitePlan:
    names = [field.name for field in dataclasses.fields(SitePlan)]
    if not isinstance(fields, dict) or sorted(fields) != sorted(names):
        raise SparsePlanError(
            f"{where}: site {key!r} must have exactly the fields "
            f"{', '.join(names)}; {_REMEDY}"
        )
    for name in names:
        if not _is_valid(name, fields[name]):
            raise SparsePlanError(
                f"{where}: site {key!r}: {name} = {fields[name]!r} is not "
                f"{_expected(name)}; {_REMEDY}"
            )
    return SitePlan(**fields)


def _is_valid(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return False
    if name in _COUNTS:
        return isinstance(value, int) and value >= 0
    if value is None:
        return name in _OPTIONAL
    return (
        isinstance(value, int | float) and math.isfinite(value) and 0.0 <= value <= 1.0
    )


def _expected(name: str) -> str:
    if name in _COUNTS:
        return "a non-negative integer"
    return "a fraction in [0, 1]" + (" or null" if name in _OPTIONAL else "")


def _some(sites: Iterable[str], limit: int = 3) -> str:
    keys = sorted(sites)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
