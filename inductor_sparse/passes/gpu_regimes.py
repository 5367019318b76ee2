"""What a GPU offers a site: skipping zeros for a few tokens, 2:4 for many.

Between the two the site stays dense.  A symbolic number of tokens is compared with the
limits under a guard: a graph for prompts and one for single tokens are compiled from
the same weights.  Each guard is one of the whole graph, and Dynamo compiles only so
many: however different its layers are, a graph has three such limits at most.

Shape legend: M tokens, K reduction, N output features.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from inductor_sparse._compat import decide, size_hint
from inductor_sparse.decisions import Decision, Reason
from inductor_sparse.passes.choice import OBSERVED_TOO_DENSE, Choice, Regime
from inductor_sparse.passes.gpu_obstacles import (
    batch_obstacle,
    data_obstacle,
    graph_obstacle,
    kernel_obstacle,
    layout_obstacle,
    order_obstacle,
    wrapper_obstacle,
)
from inductor_sparse.passes.gpu_skipping import (
    NOT_SKIPPING,
    Skipping,
    is_symbolic,
    last,
    read_skipping,
)
from inductor_sparse.passes.packing import read_packable, replaces_activation
from inductor_sparse.passes.quantized_ffn import QuantizedFfn, read_ffn
from inductor_sparse.passes.sites import Rejection, Site
from inductor_sparse.profitability import cuda, has_kernel

if TYPE_CHECKING:
    from inductor_sparse.passes.base import PassContext, Rule

HOST_BOUND = (
    "without CUDA graphs it takes longer to launch the kernels than they would save"
)
"""Why an FFN is packed in 16 bits although 8 were asked for and are possible."""

Obstacles = dict[Regime, Rejection | None]
"""The regimes that the options allow, each with what else is in its way."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a site would be packed.

    ``dtype`` is that of the packed operand; ``from_dtype`` that of the dense product it
    is compared with; ``quantized`` is set where both matmuls of the FFN would run in 8
    bits, and ``note`` says why they do not although that was asked for.  ``graphs``:
    kernels are launched by CUDA graphs; ``gated``: packing multiplies a gate by its
    factor.
    """

    dtype: str
    from_dtype: str
    replaces_activation: bool
    graphs: bool = False
    gated: bool = False
    quantized: QuantizedFfn | None = None
    note: str = ""

    def gain(self, M: int, K: int, N: int) -> float:
        """Expected dense time / sparse time."""
        return cuda.prefill_gain(
            M,
            K,
            N,
            self.from_dtype,
            pack_dtype=self.dtype,
            replaces_activation=self.replaces_activation,
            graphs=self.graphs,
            gated=self.gated,
        )

    def min_tokens(self, K: int, N: int) -> int | None:
        """From how many tokens on it always pays; None if it never does."""
        return cuda.prefill_min_tokens(
            K,
            N,
            self.from_dtype,
            pack_dtype=self.dtype,
            replaces_activation=self.replaces_activation,
            graphs=self.graphs,
            gated=self.gated,
        )


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers of tokens at which the regimes of a site end and begin.

    Without what was observed at run time the first would have ended at
    ``expected_up_to``.  ``regimes`` are those that the options allow, and whose limits
    are told.  Those of a ``symbolic`` number of tokens are narrower.
    """

    skip_up_to: int
    expected_up_to: int
    pack_from: int | None
    graphs: bool
    regimes: frozenset[Regime]
    symbolic: bool = False

    def __str__(self) -> str:
        up_to, begin = self.skip_up_to, self.pack_from
        skip = f"wins up to {_counted(up_to)}" if up_to else "never wins"
        pack = "never wins" if begin is None else f"wins from {begin} tokens on"
        told = {
            Regime.SKIP: f"skipping zeros {skip}",
            Regime.PACK: f"2:4 {pack}",
        }
        limits = ", ".join(told[regime] for regime in told if regime in self.regimes)
        launched = "" if self.graphs else ", without CUDA graphs,"
        which = "a symbolic number of tokens" if self.symbolic else "this shape"
        return f"for {which}{launched} {limits}"


def _counted(tokens: int) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'}"


def choose_on_gpu(
    rule: Rule, site: Site, decision: Decision, context: PassContext
) -> Choice | Rejection:
    """The regime of a site on a GPU, or why it stays dense."""
    unknown = data_obstacle(site)
    if unknown is not None:
        return unknown
    wanted = context.option("activation_format")
    obstacles: Obstacles = {}
    if wanted != "2:4":
        obstacles[Regime.SKIP] = (
            batch_obstacle(site)
            or wrapper_obstacle()
            or kernel_obstacle((rule.op,), site.dtype, decision.arch, context)
        )
    dense = replaces_activation(site)
    gated = read_packable(site, replaced=dense).up is not None
    packing = Packing(site.dtype, site.dtype, dense, context.cuda_graphs, gated)
    if wanted != "exact" and (rule.packs or wanted == "2:4"):
        packing, found = _packing(rule, site, packing, context)
        unmeasured = None if wanted == "2:4" else order_obstacle(site)
        obstacles[Regime.PACK] = found or unmeasured
    skipping = NOT_SKIPPING
    if Regime.SKIP in obstacles:
        skipping = read_skipping(rule, site, decision, context)
    return choose(site, decision, obstacles, packing, context, skipping)


def choose(
    site: Site,
    decision: Decision,
    obstacles: Obstacles,
    packing: Packing,
    context: PassContext,
    skipping: Skipping = NOT_SKIPPING,
) -> Choice | Rejection:
    """The regime for the number of tokens of a site among those without obstacle."""
    M, K, N = (size_hint(size) or 0 for size in site.sizes)
    steps, expected_up_to = skipping.steps(site, decision, context)
    may_pack = _may_pack(obstacles, packing, decision)
    limits = Limits(
        last(steps),
        expected_up_to,
        _pack_from(site, packing, context) if may_pack else None,
        context.cuda_graphs,
        frozenset(obstacles),
        is_symbolic(site),
    )
    for step in steps if _free(obstacles, Regime.SKIP) else ():
        if decide(site.sizes[0] <= step.up_to):
            return Choice(
                Regime.SKIP,
                skipping.gain(site, decision, context, step),
                f"{limits}{skipping.note}",
                op=skipping.op(step),
                rows=skipping.rows,
            )
    forced = context.option("activation_format") == "2:4"
    if _free(obstacles, Regime.PACK) and (forced or _pack_pays(site, packing, limits)):
        gain, ffn = packing.gain(M, K, N), packing.quantized
        choice = Choice(Regime.PACK, gain, f"{limits}{packing.note}", quantized=ffn)
        return loses_too_much(decision, context) or choice
    return _refusal(obstacles, limits, M, packing.gain(M, K, N))


def _pack_from(site: Site, packing: Packing, context: PassContext) -> int | None:
    """From how many tokens on 2:4 wins; None for never."""
    _, K, N = (size_hint(size) or 0 for size in site.sizes)
    begin = packing.min_tokens(K, N)
    return common_start(begin, context) if is_symbolic(site) else begin


def common_start(begin: int | None, context: PassContext) -> int | None:
    """Where a site may be packed from whose number of tokens is symbolic.

    The first site of a graph decides for those that win no later; all others are packed
    from where every site wins that ever does.
    """
    if begin is None:
        return None
    first = context.packed_from = context.packed_from or begin
    return first if begin <= first else cuda.PREFILL_TOKENS[-1]


def _may_pack(obstacles: Obstacles, packing: Packing, decision: Decision) -> bool:
    """Whether the site could be packed at some number of tokens.

    It could if all that is missing is a package, or leave to run what is unverified.
    """
    if Regime.PACK not in obstacles:
        return False
    obstacle = obstacles[Regime.PACK]
    never = (Reason.UNSUPPORTED_SHAPE, Reason.NOT_PROFITABLE)
    if obstacle is not None and obstacle.reason in never:
        return False
    return has_kernel(decision.arch, "sparse24_mm", packing.dtype, unverified=True)


def _free(obstacles: Obstacles, regime: Regime) -> bool:
    return regime in obstacles and obstacles[regime] is None


def _wins(site: Site, packing: Packing) -> bool:
    """Whether 2:4 wins for the number of tokens, or for any if that is symbolic."""
    M, K, N = (size_hint(size) or 0 for size in site.sizes)
    if is_symbolic(site):
        return packing.min_tokens(K, N) is not None
    large = cuda.PREFILL_TOKENS[0] <= M and min(K, N) >= cuda.PREFILL_MIN_SIZE
    return large and packing.gain(M, K, N) >= cuda.PREFILL_MARGIN


def _pack_pays(site: Site, packing: Packing, limits: Limits) -> bool:
    """Whether 2:4 wins for the number of tokens, or for every one that is guarded."""
    if not is_symbolic(site):
        return _wins(site, packing)
    begin = limits.pack_from
    return begin is not None and decide(begin <= site.sizes[0])


def loses_too_much(decision: Decision, context: PassContext) -> Rejection | None:
    """Why the 2:4 format would lose too much of a site's activation, or None."""
    limit = float(context.option("max_dropped_energy"))
    dropped = decision.dropped_energy
    if dropped is None or dropped <= limit:
        return None
    return Rejection(
        Reason.TOO_DENSE,
        f"the plan measured that 2:4 drops {dropped:.3g} of the energy, above "
        f"sparse.max_dropped_energy {limit:.3g}",
    )


def _refusal(
    obstacles: Obstacles, limits: Limits, tokens: int, pack_gain: float
) -> Rejection:
    """Why none of the regimes is taken for so many tokens; 2:4 would gain so much."""
    if limits.skip_up_to < tokens <= limits.expected_up_to:
        return Rejection(Reason.TOO_DENSE, f"{OBSERVED_TOO_DENSE}; {limits}")
    wanted = None
    if tokens <= limits.skip_up_to:
        wanted = obstacles.get(Regime.SKIP)
    elif tokens >= cuda.PREFILL_TOKENS[0]:
        wanted = obstacles.get(Regime.PACK)
    found = [obstacle for obstacle in obstacles.values() if obstacle is not None]
    if wanted is None and len(found) == len(obstacles) and found:
        wanted = found[0]
    why = f"with {_counted(tokens)} the dense product wins"
    if limits.pack_from is not None and tokens >= limits.pack_from:
        why = (
            f"with {tokens} tokens 2:4 is expected to gain {pack_gain:.2f}x, and a "
            f"static number of tokens must gain {cuda.PREFILL_MARGIN}x"
        )
    return wanted or Rejection(Reason.NOT_PROFITABLE, f"{why}; {limits}")


def _packing(
    rule: Rule, site: Site, plain: Packing, context: PassContext
) -> tuple[Packing, Rejection | None]:
    """How a site would be packed, in 8 bits if that is asked for and possible."""
    if not rule.packs:
        why = f"the rule {rule.name} has no 2:4 rewrite"
        return plain, Rejection(Reason.NO_KERNEL_YET, why)
    arch = context.architecture(site.matmul.meta["val"].device)
    general = batch_obstacle(site) or graph_obstacle(context)
    if context.option("quantize") != "none" and general is None:
        ffn = read_ffn(site, context)
        if isinstance(ffn, QuantizedFfn):
            dtype = ffn.dtype_name
            ops = ("sparsify24_quantized", "sparse24_mm")
            obstacle = kernel_obstacle(ops, dtype, arch, context)
            if obstacle is None:
                packing = dataclasses.replace(
                    plain, dtype=dtype, quantized=ffn, note=ffn.note
                )
                forced = context.option("activation_format") == "2:4"
                if forced or _wins(site, packing) or not _wins(site, plain):
                    return packing, None
                ffn = HOST_BOUND
            else:
                ffn = obstacle.detail
        plain = dataclasses.replace(plain, note=f"; not quantized: {ffn}")
    ops = ("sparsify24", "sparse24_mm")
    found = kernel_obstacle(ops, site.dtype, arch, context)
    return plain, found or general or layout_obstacle(site)
