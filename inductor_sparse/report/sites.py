"""``inductor_sparse.report()``: the sites of this process that run sparse, as they ran.

Unlike :func:`inductor_sparse.explain` it compiles and runs nothing: it reads what the
compiled models of this process have counted so far.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from inductor_sparse import decisions
from inductor_sparse.decisions import Decision
from inductor_sparse.report.table import UNKNOWN, percent
from inductor_sparse.runtime import site_energy
from inductor_sparse.runtime.site_energy import Energy

_HEADERS = ("site", "device", "format", "calls", "kept", "dropped")
_LEFT_ALIGNED = 3
_PACKED = "2:4"
_NO_SITE = "no site runs sparse in this process; inductor_sparse.explain() says why"


@dataclasses.dataclass(frozen=True)
class ReportedSite:
    """A site that runs sparse.

    ``site`` is its key, as in ``Decision.site``; ``device`` a type, as in ``cpu``;
    ``format`` is ``exact`` where zeros are skipped, or ``2:4``.  ``calls``,
    ``kept_energy`` and ``dropped_energy`` (fractions of the sum of squares of its
    activation) are None where nothing is counted: a site that skips zeros drops
    nothing, and one that has not run has seen nothing.
    """

    site: str
    device: str
    format: str
    calls: int | None
    kept_energy: float | None
    dropped_energy: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        calls = UNKNOWN if self.calls is None else str(self.calls)
        energies = (percent(self.kept_energy), percent(self.dropped_energy))
        return (self.site, self.device, self.format, calls, *energies)


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """The answer of :func:`report`: print it, or take ``.to_dict()``."""

    sites: tuple[ReportedSite, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: one dict for each site."""
        return {"sites": [dataclasses.asdict(site) for site in self.sites]}

    def __str__(self) -> str:
        if not self.sites:
            return _NO_SITE
        rows = [_HEADERS, *(site.cells for site in self.sites)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths) for row in rows)

    def __repr__(self) -> str:
        return str(self)


def report() -> SiteReport:
    """The sites that run sparse, how often they ran and what 2:4 dropped there.

    Reading waits for nothing that the GPU has yet to do, so the last calls may be
    missing: ``torch.cuda.synchronize()`` first if they should be in it.

    A model from a warm compile cache has no decisions: of its sites those in the 2:4
    format are listed, once they have run.

    Returns:
        The :class:`SiteReport`: print it, or take ``.to_dict()``.
    """
    measured: dict[str, list[Energy]] = {}
    for energy in site_energy.read():
        measured.setdefault(energy.site, []).append(energy)
    sites: dict[str, list[ReportedSite]] = {}
    for graph in decisions.LOG.graphs:
        for decision in graph.applied:
            if decision.site not in measured:
                sites[decision.site] = [_uncounted(decision)]
    for name, energies in measured.items():
        sites[name] = [_counted(energy) for energy in energies]
    return SiteReport(tuple(site for group in sites.values() for site in group))


def _uncounted(decision: Decision) -> ReportedSite:
    form = "exact" if decision.tier is decisions.Tier.EXACT else _PACKED
    return ReportedSite(decision.site, decision.device, form, None, None, None)


def _counted(energy: Energy) -> ReportedSite:
    dropped = energy.dropped
    kept = None if dropped is None else 1.0 - dropped
    return ReportedSite(
        energy.site, energy.device, _PACKED, energy.calls, kept, dropped
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [
        cell.ljust(width) if i < _LEFT_ALIGNED else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()
