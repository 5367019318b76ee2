"""Run a compiled graph node by node and measure the operand of every site.

The graph is the one that Inductor would be given, after all passes; running it without
generating kernels makes a report cost one eager forward.

Shape legend: ``K`` reduction axis of a site's matmul, ``R`` rows of its left operand in
all leading axes together (tokens).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from inductor_sparse import reference
from inductor_sparse.decisions import GraphDecisions
from inductor_sparse.errors import SparseShapeError
from inductor_sparse.passes.fx_utils import op_name
from inductor_sparse.passes.sites import OPERAND_KEY, SITE_KEY
from inductor_sparse.report import kernels
from inductor_sparse.report.kernels import KernelUse

ENERGY_SAMPLE = 2**20
"""Elements of one operand that the 2:4 loss is measured on: rows at even distances.
Selecting two of four costs some twenty passes over the data, and the loss is a mean."""

_ops = torch.ops.inductor_sparse
_aten = torch.ops.aten
_PACKERS = {
    _ops.sparsify24.default,
    _ops.sparsify24_quantized.default,
    _ops.linear_sparsify24.default,
    _ops.linear_sparsify24_quantized.default,
}


@dataclasses.dataclass
class SiteStats:
    """What was seen at one site over all its executions; sums, so that they merge.

    ``kernel`` is that of the last execution, known on a GPU only.
    """

    elements: int = 0
    nonzeros: int = 0
    tokens: int = 0
    calls: int = 0
    max_density: float = 0.0
    energy: float = 0.0
    dropped: float = 0.0
    max_dropped: float = 0.0
    has_energy: bool = True
    kernel: KernelUse | None = None

    @property
    def density(self) -> float | None:
        """Fraction of non-zeros, ``None`` if every operand was empty."""
        return self.nonzeros / self.elements if self.elements else None

    @property
    def dropped_energy(self) -> float | None:
        """Energy-weighted mean of the 2:4 loss; ``None`` if it has no meaning here."""
        if not self.has_energy or not self.elements:
            return None
        return min(1.0, self.dropped / self.energy) if self.energy else 0.0

    def add(self, operand_RK: Tensor) -> None:
        """Add one execution; ``operand_RK`` may have any number of leading axes."""
        self.calls += 1
        self.tokens += math.prod(operand_RK.shape[:-1])
        if operand_RK.numel() == 0:
            return
        nonzeros = int(operand_RK.count_nonzero())
        self.elements += operand_RK.numel()
        self.nonzeros += nonzeros
        self.max_density = max(self.max_density, nonzeros / operand_RK.numel())
        self._add_energy(_sample(operand_RK))

    def merge(self, other: SiteStats) -> None:
        """Add everything that ``other`` has seen."""
        for name in ("elements", "nonzeros", "tokens", "calls", "energy", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_density = max(self.max_density, other.max_density)
        self.max_dropped = max(self.max_dropped, other.max_dropped)
        self.has_energy = self.has_energy and other.has_energy
        self.kernel = other.kernel or self.kernel

    def _add_energy(self, sample_RK: Tensor) -> None:
        try:
            share = reference.dropped_energy(sample_RK, "identity", "largest_abs")
        except SparseShapeError:  # a dtype that no op takes
            self.has_energy = False
            return
        energy = float(sample_RK.double().square().sum())
        if not math.isfinite(energy):
            self.has_energy = False
            return
        self.energy += energy
        self.dropped += share * energy
        self.max_dropped = max(self.max_dropped, share)


@dataclasses.dataclass
class MeasuredGraph:
    """One compiled graph: its decisions and, by site key, what its runs have seen."""

    decisions: GraphDecisions
    stats: dict[str, SiteStats] = dataclasses.field(default_factory=dict)

    def put_in_order(self, gm: fx.GraphModule) -> None:
        """Sort the decisions as the sites run; rule by rule is how they were made.

        Sites inside a higher-order op have no node of their own and come last.
        """
        sites = [
            node.meta[SITE_KEY] for node in gm.graph.nodes if SITE_KEY in node.meta
        ]
        position = {site: i for i, site in enumerate(sites)}
        self.decisions.decisions.sort(key=lambda d: position.get(d.site, len(sites)))


class MeasuringInterpreter(fx.Interpreter):
    """Executes a graph with eager ops and adds each site's operand to ``measured``."""

    def __init__(self, gm: fx.GraphModule, measured: MeasuredGraph) -> None:
        super().__init__(gm)
        self._measured = measured
        # What a packed product multiplies is seen where it is packed, and what a site
        # that is spelled otherwise multiplies where that is computed.
        self._sites: dict[fx.Node, list[str]] = {}
        self._operands: dict[str, list[tuple[str, bool]]] = {}
        for node in gm.graph.nodes:
            if OPERAND_KEY in node.meta:
                name, transposed = node.meta[OPERAND_KEY]
                operand = node.meta[SITE_KEY], transposed
                self._operands.setdefault(name, []).append(operand)
            elif SITE_KEY in node.meta:
                at = packer(node) or node
                self._sites.setdefault(at, []).append(node.meta[SITE_KEY])

    def run_node(self, n: fx.Node) -> Any:
        """Compute ``n`` as usual; measure what is read or packed at a site."""
        for site in self._sites.get(n, ()):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            stats = self._measured.stats.setdefault(site, SiteStats())
            stats.add(matmul_operand(n.target, args, kwargs))
        result = super().run_node(n)
        for site, transposed in self._operands.get(n.name, ()):
            stats = self._measured.stats.setdefault(site, SiteStats())
            stats.add(result.mT if transposed else result)
        if n.target is _ops.sparse24_mm.default and SITE_KEY in n.meta:
            self._time(n, result)
        return result

    def _time(self, n: fx.Node, result: Tensor) -> None:
        if result.is_cuda and result.numel():
            args, _ = self.fetch_args_kwargs_from_env(n)
            stats = self._measured.stats.setdefault(n.meta[SITE_KEY], SiteStats())
            again = super().run_node
            stats.kernel = kernels.measure(lambda: again(n), args, packed_by(n))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Compute one op; a weight is viewed, so that a report leaves no copies."""
        if target is _ops.row_major_weight.default:
            weight, size, stride, offset, dtype = args
            window = weight.as_strided(size, stride, weight.storage_offset() + offset)
            return window.to(dtype)
        return super().call_function(target, args, kwargs)


def packer(product: fx.Node) -> fx.Node | None:
    """The node that selects two of four for a ``sparse24_mm``, if there is one."""
    if product.target is not _ops.sparse24_mm.default:
        return None
    values = product.args[0]
    packed = values.args[0] if isinstance(values, fx.Node) and values.args else None
    return packed if isinstance(packed, fx.Node) and packed.target in _PACKERS else None


def packed_by(product: fx.Node) -> str:
    """The name of the op that selects for a ``sparse24_mm``; empty if not known."""
    node = packer(product)
    return "" if node is None else op_name(node)


def matmul_operand(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The left operand that the matmul of a site multiplies, with its zeros.

    For a packed product it is what there was before two of four were selected.

    Args:
        target: the op of the node: one of ours, or the matmul that stayed dense.
        args: its positional arguments as real tensors.
        kwargs: the others.
    """
    if target is _ops.activation_spmm.default:
        z, _, activation, *_counters = args
        return reference.activation(z, activation)
    if target is _ops.glu_spmm.default:
        gate_RK, x, w_up, _, activation, *_counters = args
        open_RK = reference.activation(gate_RK, activation)
        # A closed neuron is skipped whatever the other factor holds, NaN included.
        return torch.where(open_RK == 0, 0, open_RK * (x @ w_up.mT))
    if target is _ops.linear_sparsify24.default:
        x, w1, bias, activation, *_ = args
        return reference.activation(torch.nn.functional.linear(x, w1, bias), activation)
    if target is _ops.linear_sparsify24_quantized.default:
        *layer, _, activation, _ = args[:8]
        return reference.activation(reference.scaled_linear(*layer), activation)
    if target in _PACKERS:
        names = (argument.name for argument in target._schema.arguments)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        activated = reference.activation(given["x"], given["activation"])
        up = given.get("up")  # what a gate is multiplied by
        return activated if up is None else activated * up
    if target in (_aten.addmm.default, _aten.baddbmm.default):
        return args[1]
    return args[0]


def _sample(operand_RK: Tensor) -> Tensor:
    """At most about :data:`ENERGY_SAMPLE` elements, as whole rows at even distances."""
    rows = operand_RK.reshape(-1, operand_RK.shape[-1])
    step = math.ceil(rows.numel() / max(ENERGY_SAMPLE, rows.shape[1]))
    return rows[::step]
