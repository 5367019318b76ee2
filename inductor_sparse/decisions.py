"""What happened at each candidate site: plain data, no torch.

A *site* is one matmul whose left operand comes from something that may be full of
zeros.  Each site ends as exactly one :class:`Decision`: applied, or dense with one
:class:`Reason`.  Matmuls that have nothing to do with such a producer are only counted.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Tier(str, enum.Enum):
    """Whether a rewrite can change numbers beyond the rounding of a reordered sum."""

    EXACT = "exact"
    APPROXIMATE = "approximate"


class Status(str, enum.Enum):
    """How a site ended."""

    APPLIED = "applied"
    DENSE = "dense"


class Reason(str, enum.Enum):
    """Why a site stayed dense.  The values are stable: scripts may compare them."""

    ACTIVATION_NOT_SPARSE = "activation-not-sparse"
    CLIPPED_ACTIVATION = "clipped-activation"
    EXPONENT_NOT_TWO = "exponent-not-two"
    SYMBOLIC_EXPONENT = "symbolic-exponent"
    NOT_ZERO_PRESERVING = "not-zero-preserving"
    UNSUPPORTED_DTYPE = "unsupported-dtype"
    UNSUPPORTED_SHAPE = "unsupported-shape"
    WEIGHT_NOT_STATIC = "weight-not-static"
    WEIGHT_UNTRACKED = "weight-untracked"
    TRAINING_GRAPH = "training-graph"
    HIGHER_ORDER_OP = "higher-order-op"
    NO_KERNEL_YET = "no-kernel-yet"
    ARCH_UNSUPPORTED = "arch-unsupported"
    KERNEL_UNVERIFIED = "kernel-unverified"
    NOT_PROFITABLE = "not-profitable"
    TOO_DENSE = "too-dense"
    RULE_DISABLED = "rule-disabled"


@dataclasses.dataclass
class Decision:
    """One site and how it ended.

    ``module`` is the path of the module, as in ``named_modules()``, and ``source`` the
    line of its code, as in ``model.py:41``; empty if unknown.  ``rule`` is the rule
    that decided, ``detail`` a sentence for people.  ``shapes`` holds ``M`` (tokens),
    ``K`` (reduction), ``N`` (output features) as ints or as the text of a symbolic
    size; ``dtype`` is that of the product, as in ``bfloat16``, ``device`` a type, as in
    ``cpu``.  ``density`` and ``dropped_energy`` are fractions in [0, 1], ``None`` until
    measured; ``expected_gain`` is the ratio dense / sparse time of this matmul expected
    by :mod:`inductor_sparse.profitability`; ``weight_copy_bytes`` is the extra memory
    held by a row-contiguous copy of the weight, 0 if none is needed.  ``op`` took the
    place of the matmul, empty if none did; ``activation`` is what feeds it, as in
    ``relu2*up``; ``site`` is the key of the site, in a plan and in its graph; ``arch``
    what kernels are looked up by: ``cpu``, ``sm_90``, empty for a GPU that could not be
    asked.  ``cuda_graphs`` says whether kernels of a GPU were expected to be launched
    by CUDA graphs.  ``kernel`` names the op that packs, then the kernel of the product
    and its tile, ``tflops`` is the measured rate of the product counted as a dense one,
    and ``of_dense_peak`` and ``of_sparse_peak`` that as fractions of the device's: all
    of a 2:4 site on a GPU that ``explain()`` has run.
    """

    module: str
    source: str
    rule: str
    tier: Tier
    status: Status
    reason: Reason | None
    detail: str
    shapes: dict[str, int | str]
    dtype: str
    device: str
    density: float | None = None
    dropped_energy: float | None = None
    expected_gain: float | None = None
    weight_copy_bytes: int = 0
    op: str = ""
    activation: str = ""
    site: str = ""
    arch: str = ""
    cuda_graphs: bool = False
    kernel: str = ""
    tflops: float | None = None
    of_dense_peak: float | None = None
    of_sparse_peak: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; enums become their values."""
        fields = dataclasses.asdict(self)
        fields["tier"] = self.tier.value
        fields["status"] = self.status.value
        fields["reason"] = self.reason.value if self.reason is not None else None
        return fields


@dataclasses.dataclass
class GraphDecisions:
    """Everything decided about one compiled graph.

    ``graph`` is the name that Inductor's own dumps give it; ``other_matmuls`` counts
    the matmuls that are no sites.  ``from_cache`` is true when the graph came from a
    warm compile cache, so that no pass ran and ``decisions`` is empty for that reason
    and no other.
    """

    graph: str
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    other_matmuls: int = 0
    from_cache: bool = False

    @property
    def applied(self) -> list[Decision]:
        """The decisions whose site was rewritten."""
        return [d for d in self.decisions if d.status is Status.APPLIED]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "graph": self.graph,
            "from_cache": self.from_cache,
            "other_matmuls": self.other_matmuls,
            "sites": [d.to_dict() for d in self.decisions],
        }


class DecisionLog:
    """Collects :class:`GraphDecisions` as graphs are compiled; safe across threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs: list[GraphDecisions] = []

    def add(self, graph: GraphDecisions) -> None:
        """Append the decisions of one compiled graph."""
        with self._lock:
            self._graphs.append(graph)

    @property
    def graphs(self) -> list[GraphDecisions]:
        """A copy of what was collected so far, oldest first."""
        with self._lock:
            return list(self._graphs)

    @property
    def decisions(self) -> list[Decision]:
        """All decisions of all graphs, oldest first."""
        return [d for graph in self.graphs for d in graph.decisions]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._graphs.clear()


LOG = DecisionLog()
"""The process-wide log: every graph compiled by the backend is added here."""

_listeners: list[DecisionLog] = []


def record(graph: GraphDecisions) -> None:
    """Add ``graph`` to :data:`LOG` and to every log opened with :func:`collect`."""
    LOG.add(graph)
    for log in list(_listeners):
        log.add(graph)


@contextmanager
def collect() -> Iterator[DecisionLog]:
    """Yield a fresh log that receives the graphs compiled inside the ``with`` block."""
    log = DecisionLog()
    _listeners.append(log)
    try:
        yield log
    finally:
        _listeners.remove(log)
