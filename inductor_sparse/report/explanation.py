"""The answer of ``explain()``: plain data with a text, a rich and an HTML view."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from inductor_sparse.decisions import Decision, GraphDecisions, Status
from inductor_sparse.report import html, table, text
from inductor_sparse.report.hints import hint

if TYPE_CHECKING:
    from rich.text import Text


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How each candidate site of a model ended, and what was measured there.

    ``graphs`` has one entry per compiled graph in the order of compilation; a model
    without graph breaks has one.  ``print(explanation)`` shows the table.
    """

    graphs: tuple[GraphDecisions, ...]

    @property
    def sites(self) -> list[Decision]:
        """The decisions of all graphs, in order."""
        return [decision for graph in self.graphs for decision in graph.decisions]

    @property
    def applied(self) -> list[Decision]:
        """The sites that run sparse."""
        return [site for site in self.sites if site.status is Status.APPLIED]

    @property
    def other_matmuls(self) -> int:
        """Matmuls that have no possibly sparse operand."""
        return sum(graph.other_matmuls for graph in self.graphs)

    @property
    def weight_copy_bytes(self) -> int:
        """Memory held by row-contiguous copies of weights, summed over applied sites.

        A weight shared by several sites is copied once and counted once per site, so
        this is an upper bound for models with tied weights.
        """
        return sum(site.weight_copy_bytes for site in self.applied)

    @property
    def conclusion(self) -> str:
        """One line, e.g. ``2 of 3 sites run sparse; 1 dense (too-dense); ...``."""
        return table.conclusion(self.sites, len(self.graphs), self.other_matmuls)

    @property
    def notes(self) -> list[str]:
        """The lines below the table: weight copies, graph breaks, and one hint."""
        notes = []
        if len(self.graphs) > 1:
            notes.append(f"The model was compiled as {len(self.graphs)} graphs.")
        if self.weight_copy_bytes:
            notes.append(
                f"Row-contiguous copies of weights hold "
                f"{table.bytes_text(self.weight_copy_bytes)}; "
                "inductor_sparse.prepare(model) avoids them."
            )
        advice = hint(self.sites)
        if advice:
            notes.append(f"Hint: {advice}.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; each of ``sites`` is a decision plus the name of its graph."""
        sites = [
            {**decision.to_dict(), "graph": graph.graph}
            for graph in self.graphs
            for decision in graph.decisions
        ]
        return {
            "conclusion": self.conclusion,
            "applied": len(self.applied),
            "dense": len(self.sites) - len(self.applied),
            "other_matmuls": self.other_matmuls,
            "weight_copy_bytes": self.weight_copy_bytes,
            "graphs": [graph.graph for graph in self.graphs],
            "sites": sites,
        }

    def to_html(self) -> str:
        """A self-contained HTML fragment."""
        return html.render(self.conclusion, self._rows(), self.notes)

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        return text.render(self.conclusion, self._rows(), self.notes)

    def __rich__(self) -> Text:
        return text.render_rich(self.conclusion, self._rows(), self.notes)

    def _rows(self) -> list[table.Row]:
        return [table.row(decision) for decision in self.sites]
