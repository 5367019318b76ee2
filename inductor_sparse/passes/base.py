"""What a pass is given, and what a rule has to say about one matmul.

A rule is one object with a ``name``: it says which sites are its own
(:meth:`Rule.match`) and how one is rewritten (:meth:`Rule.rewrite`).  What every site
must pass, whichever rule it belongs to, is checked here once and recorded.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from inductor_sparse import config, profitability
from inductor_sparse._compat import size_hint, uses_cuda_graphs
from inductor_sparse.decisions import Decision, GraphDecisions, Reason, Status, Tier
from inductor_sparse.passes.choice import Choice, Regime
from inductor_sparse.passes.emit import emit_activation_spmm, scaled_and_shifted
from inductor_sparse.passes.fx_utils import (
    module_path,
    op_name,
    replace,
    source_line,
    tensor_of,
)
from inductor_sparse.passes.packing import emit_sparse24
from inductor_sparse.passes.producers import Family, Producer
from inductor_sparse.passes.quantized_ffn import (
    emit_quantized_ffn,
    emit_quantized_rows,
    quantized_bytes,
)
from inductor_sparse.passes.regimes import ON_GPU, choose
from inductor_sparse.passes.sites import SITE_KEY, Rejection, Site, forward_sites
from inductor_sparse.passes.weights import (
    Copy,
    copy_bytes,
    emit_weight,
    resolve_weight,
)

if TYPE_CHECKING:
    from inductor_sparse.plan import Plan

Observer = Callable[[str, str, str, float], None]
"""Called after each pass: its name, the graph's text before and after, and seconds."""


@dataclasses.dataclass
class PassContext:
    """Everything the passes know about one graph besides the graph.

    ``options`` is a snapshot of the ``sparse.*`` options without their prefix; missing
    ones have their configured value.  ``static_inputs`` names the placeholders that are
    parameters or buffers, ``untracked_inputs`` those whose changes cannot be noticed.
    ``demoted`` maps sites that were too dense at run time to the number of tokens from
    which on they must not skip; it is None if none could be compiled again.
    ``packed_from`` is the number of tokens from which on the first site is packed, once
    that is decided and if it is symbolic: others follow it.  ``architecture`` tells
    what the kernels of a device are looked up by.
    """

    options: Mapping[str, Any]
    graph: GraphDecisions
    is_training: bool = False
    static_inputs: frozenset[str] = frozenset()
    untracked_inputs: frozenset[str] = frozenset()
    plan: Plan | None = None
    demoted: Mapping[str, int] | None = None
    packed_from: int | None = None
    observers: list[Observer] = dataclasses.field(default_factory=list)
    architecture: Callable[[torch.device], str] = profitability.architecture

    def option(self, name: str) -> Any:
        """The value of ``sparse.<name>`` for this graph."""
        return self.options[name] if name in self.options else getattr(config, name)

    @property
    def cuda_graphs(self) -> bool:
        """Whether CUDA graphs will launch the kernels of this graph."""
        return bool(self.option("cuda_graphs")) or uses_cuda_graphs()

    def demoted_from(self, site: str) -> int | None:
        """The number of tokens from which on a site was too dense, or None."""
        return (self.demoted or {}).get(site)

    def can_demote(self, arch: str, dtype: str) -> bool:
        """Whether a site of a GPU that is too dense at run time goes back to dense.

        Nobody looks at the counters of a graph that its caller captures and replays,
        and what a model needs while it is trained says little.
        """
        unobserved = self.is_training or self.option("cuda_graphs")
        untried = bool(self.option("allow_unverified"))
        return (
            self.demoted is not None
            and not unobserved
            and profitability.has_kernel(
                arch, "site_counters", dtype, unverified=untried
            )
        )

    @property
    def disabled_rules(self) -> frozenset[str]:
        """The names in the ``sparse.disabled_rules`` option."""
        names = str(self.option("disabled_rules")).split(",")
        return frozenset(name.strip() for name in names if name.strip())


class GraphPass(Protocol):
    """One step of the pipeline: changes the graph, or records something about it."""

    @property
    def name(self) -> str:
        """What dumps, options and ``disabled_passes`` call it."""
        ...

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Run on one graph."""
        ...


class Rule(abc.ABC):
    """Rewrites the matmuls of one kind of producer into an op that skips zeros.

    ``op`` is what :meth:`rewrite` inserts.  A rule that ``packs`` also lets its sites
    be rewritten to the 2:4 format where that is better, the same way for every rule.
    """

    name: str
    tier: Tier = Tier.EXACT
    op: str = "activation_spmm"
    packs: bool = False

    @abc.abstractmethod
    def match(self, site: Site) -> Producer | None:
        """The producer of ``site`` if this rule is the one to decide about it."""

    @abc.abstractmethod
    def rewrite(self, site: Site, weight: fx.Node, context: PassContext) -> fx.Node:
        """Insert the replacement of ``lhs @ rhs`` before the matmul and return it.

        ``weight`` is the row-contiguous ``rhs``.  Bias, replacement of uses and
        clean-up are the caller's business.
        """

    def forms(self, site: Site, context: PassContext) -> tuple[str, ...]:
        """The ops that could take the place of ``site``; one of them is chosen."""
        return (self.op,)

    def rewrite_as(
        self, op: str, site: Site, weight: fx.Node, context: PassContext
    ) -> fx.Node:
        """:meth:`rewrite` for a rule with several :meth:`forms`, into one of them."""
        return self.rewrite(site, weight, context)

    def __call__(self, graph: fx.Graph, context: PassContext) -> None:
        """Decide every site of this rule."""
        self.decide_all(graph, context, disabled=self.name in context.disabled_rules)

    def decide_all(
        self, graph: fx.Graph, context: PassContext, *, disabled: bool
    ) -> None:
        """Decide every site of this rule, which may itself be turned off."""
        for site in forward_sites(graph):
            producer = self.match(site)
            if producer is None:
                continue
            decision = open_decision(site, producer, context, self.name, self.tier)
            chosen = self._obstacle(site, producer, disabled) or choose(
                self, site, decision, context
            )
            product = (
                chosen
                if isinstance(chosen, Rejection)
                else self._rewrite_as(chosen, site, decision, context)
            )
            if isinstance(product, Rejection):
                close_dense(decision, product, site.matmul)
            else:
                close_applied(decision, site, product)

    def _obstacle(
        self, site: Site, producer: Producer, disabled: bool
    ) -> Rejection | None:
        if producer.reason is not None:
            return Rejection(producer.reason, producer.detail)
        if disabled:
            return Rejection(Reason.RULE_DISABLED, f"{self.name} is turned off")
        return unsupported(site)

    def _rewrite_as(
        self, chosen: Choice, site: Site, decision: Decision, context: PassContext
    ) -> fx.Node | Rejection:
        decision.expected_gain, decision.detail = chosen.expected_gain, chosen.note
        if chosen.regime is Regime.PACK:
            decision.tier = Tier.APPROXIMATE
            if chosen.quantized is None:
                fuse = profitability.has_kernel(
                    decision.arch, "linear_sparsify24", site.dtype
                )
                return emit_sparse24(site, fuse=fuse)
            ffn = chosen.quantized
            decision.weight_copy_bytes = ffn.weight_bytes
            return emit_quantized_ffn(site, ffn)
        if chosen.rows is not None:
            decision.tier = Tier.APPROXIMATE
            decision.weight_copy_bytes = quantized_bytes(chosen.rows)
            return emit_quantized_rows(site, chosen.rows)
        weight = resolve_weight(site.rhs, context)
        if isinstance(weight, Rejection):
            return weight
        if isinstance(weight, Copy) and not _copy_pays(site, context):
            return _TRAINING_REJECTION
        row_major = emit_weight(weight, site.matmul)
        product = self.rewrite_as(chosen.op, site, row_major, context)
        decision.weight_copy_bytes = copy_bytes(product, site.matmul)
        return product


class FamilyRule(Rule):
    """A rule for all sites of one ``family``, whose left operand stays as it is."""

    family: Family

    def match(self, site: Site) -> Producer | None:
        """The producer if it is of the family."""
        producer = site.producer
        is_mine = producer is not None and producer.family is self.family
        return producer if is_mine else None

    def rewrite(self, site: Site, weight: fx.Node, context: PassContext) -> fx.Node:
        """Insert ``activation_spmm``."""
        return emit_activation_spmm(site, weight)


_TRAINING_REJECTION = Rejection(
    Reason.TRAINING_GRAPH,
    "the graph has a backward, so the weight copy may be made again every step, which "
    "this number of tokens does not pay for; call the model under torch.no_grad() for "
    "inference",
)


def open_decision(
    site: Site, producer: Producer, context: PassContext, rule: str, tier: Tier
) -> Decision:
    """Add the decision of a site to the graph's list, dense until proven otherwise."""
    _, K, N = site.sizes
    module, source = module_path(site.matmul), source_line(site.matmul)
    where = module or source or site.matmul.name
    key = _unique(f"{where}:{K}x{N}", context.graph)
    measured = context.plan.site(key) if context.plan is not None else None
    density = measured.density if measured is not None else None
    decision = Decision(
        module=module,
        source=source,
        rule=rule,
        tier=tier,
        status=Status.DENSE,
        reason=None,
        detail="",
        shapes=_shapes(site),
        dtype=site.dtype,
        device=site.device,
        density=density,
        dropped_energy=measured.dropped_energy if measured is not None else None,
        activation=producer.activation,
        site=key,
        arch=context.architecture(site.matmul.meta["val"].device),
        cuda_graphs=site.device in ON_GPU and context.cuda_graphs,
    )
    context.graph.decisions.append(decision)
    return decision


def close_dense(decision: Decision, why: Rejection, matmul: fx.Node) -> None:
    """Record that a site stays dense, and mark its matmul as decided."""
    decision.reason, decision.detail = why.reason, why.detail
    decision.expected_gain = None
    matmul.meta[SITE_KEY] = decision.site


def close_applied(decision: Decision, site: Site, product: fx.Node) -> None:
    """Record that ``product`` takes the place of a site's matmul, and let it."""
    decision.status = Status.APPLIED
    decision.op = op_name(product)
    product.meta[SITE_KEY] = decision.site
    finish_site(site, product)


def _unique(key: str, graph: GraphDecisions) -> str:
    taken = {decision.site for decision in graph.decisions}
    repeat, unique = 1, key
    while unique in taken:
        repeat += 1
        unique = f"{key}#{repeat}"
    return unique


def _shapes(site: Site) -> dict[str, int | str]:
    names = dict(zip("MKN", site.sizes, strict=True))
    lhs = tensor_of(site.lhs)
    if lhs is not None and lhs.ndim == 3:
        names["B"] = lhs.shape[0]
    return {k: v if isinstance(v, int) else str(v) for k, v in names.items()}


def unsupported(site: Site) -> Rejection | None:
    """Why no op is defined for this site's dtype or shape, or None."""
    if site.dtype not in profitability.DTYPES:
        supported = ", ".join(sorted(profitability.DTYPES))
        return Rejection(
            Reason.UNSUPPORTED_DTYPE, f"{site.dtype}; supported are {supported}"
        )
    return unsupported_size(site)


def unsupported_size(site: Site) -> Rejection | None:
    """Why no op is defined for this site's shape, or None."""
    M, K, N = site.sizes
    for name, size, least in (
        ("K", K, profitability.MIN_SIZE),
        ("N", N, profitability.MIN_SIZE),
        ("M", M, 1),
    ):
        if isinstance(size, int) and size < least:
            return Rejection(Reason.UNSUPPORTED_SHAPE, f"{name} is {size}")
    return None


def _copy_pays(site: Site, context: PassContext) -> bool:
    tokens = size_hint(site.sizes[0])
    return not context.is_training or profitability.training_copy_pays(tokens)


def finish_site(site: Site, product: fx.Node) -> None:
    """Add the bias to a rewritten product and let it take the matmul's uses."""
    replace(site.matmul, scaled_and_shifted(site, product))
