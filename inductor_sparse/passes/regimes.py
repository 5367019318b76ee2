"""How a site is rewritten, if it is: by skipping zeros, or packed 2:4.

On a CPU skipping zeros is all there is.  On a GPU it is for a few tokens, the 2:4
format for many, and between the two the site stays dense.  A symbolic number of tokens
is compared with the thresholds under a guard: a graph for prompts and one for single
tokens are compiled from the same weights.

Shape legend: M tokens, K reduction, N output features.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

from inductor_sparse import profitability
from inductor_sparse._compat import decide, size_hint
from inductor_sparse.decisions import Decision, Reason
from inductor_sparse.passes.fx_utils import VIEWS, is_call, tensor_of
from inductor_sparse.passes.sites import MATMULS, Rejection, Site
from inductor_sparse.passes.toolchains import missing_package

if TYPE_CHECKING:
    from inductor_sparse.passes.base import PassContext, Rule


class Regime(enum.Enum):
    """What happens to the zeros of a site."""

    SKIP = "skips zeros"
    PACK = "2:4"


_OPS = {Regime.PACK: ("sparsify24", "sparse24_mm")}


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a site is rewritten; ``note`` says where the limits of the regime are."""

    regime: Regime
    expected_gain: float
    note: str = ""


def choose(
    rule: Rule, site: Site, decision: Decision, context: PassContext
) -> Choice | Rejection:
    """The regime for a site that nothing but its device speaks against."""
    found = too_dense(decision, context)
    if site.device == "cuda":
        return found or _choose_on_gpu(rule, site, decision, context)
    return found or _choose_on_cpu(rule, site, decision)


def too_dense(decision: Decision, context: PassContext) -> Rejection | None:
    """Why a site has too few zeros on any device, or None."""
    demoted = context.demoted.get(decision.site)
    if demoted is not None:
        return Rejection(
            demoted,
            "observed at run time: skipping zeros did not pay; "
            "torch._dynamo.reset() forgets that",
        )
    limit = float(context.option("max_density"))
    if decision.density is not None and decision.density > limit:
        return Rejection(
            Reason.TOO_DENSE,
            f"the plan measured density {decision.density:.3g}, above "
            f"sparse.max_density {limit:.3g}",
        )
    return None


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


def _choose_on_cpu(rule: Rule, site: Site, decision: Decision) -> Choice | Rejection:
    if not profitability.has_kernel(decision.arch, rule.op, site.dtype):
        return Rejection(
            Reason.NO_KERNEL_YET,
            f"{rule.op} has no {site.dtype} kernel for {site.device} yet",
        )
    tokens, density = size_hint(site.sizes[0]), decision.density
    break_even = profitability.break_even_density(tokens, site.dtype)
    if density is not None and density > break_even:
        return Rejection(
            Reason.NOT_PROFITABLE,
            f"the plan measured density {density:.3g}, and with {tokens} tokens of "
            f"{site.dtype} skipping zeros wins below {break_even:.3g}",
        )
    gain = profitability.expected_gain(tokens, density, site.dtype)
    return Choice(Regime.SKIP, gain)


@dataclasses.dataclass(frozen=True)
class _Limits:
    """The numbers of tokens at which the regimes of a site end and begin."""

    skip_up_to: int
    pack_from: int | None

    def __str__(self) -> str:
        skip = f"up to {self.skip_up_to} tokens" if self.skip_up_to else "never"
        pack = "never" if self.pack_from is None else f"from {self.pack_from} tokens on"
        return f"for this shape skipping zeros wins {skip}, 2:4 {pack}"


def _choose_on_gpu(
    rule: Rule, site: Site, decision: Decision, context: PassContext
) -> Choice | Rejection:
    M, K, N = site.sizes
    tokens, features, outputs = (size_hint(size) for size in (M, K, N))
    if tokens is None or features is None or outputs is None:
        return Rejection(Reason.UNSUPPORTED_SHAPE, "a size depends on data")
    obstacles = _obstacles(rule, site, decision, context)
    limits = _limits(site, decision, features, outputs)
    if context.option("activation_format") == "2:4":
        limits = dataclasses.replace(limits, pack_from=1)
    free = [regime for regime, obstacle in obstacles.items() if obstacle is None]
    if Regime.SKIP in free and decide(limits.skip_up_to >= M):
        gain = profitability.cuda.decode_gain(
            tokens, features, outputs, site.dtype, decision.density
        )
        return Choice(Regime.SKIP, gain, str(limits))
    pack_from = limits.pack_from
    if Regime.PACK in free and pack_from is not None and decide(pack_from <= M):
        loss = loses_too_much(decision, context)
        gain = profitability.cuda.prefill_gain(
            tokens,
            features,
            outputs,
            site.dtype,
            replaces_activation=_replaces_activation(site),
        )
        return loss or Choice(Regime.PACK, gain, str(limits))
    return _refusal(obstacles, limits, tokens)


def _limits(site: Site, decision: Decision, K: int, N: int) -> _Limits:
    return _Limits(
        profitability.cuda.decode_max_tokens(K, N, site.dtype, decision.density),
        profitability.cuda.prefill_min_tokens(
            K, N, site.dtype, replaces_activation=_replaces_activation(site)
        ),
    )


def _refusal(
    obstacles: dict[Regime, Rejection | None], limits: _Limits, tokens: int
) -> Rejection:
    """Why none of the regimes is taken for so many tokens."""
    wanted = None
    if tokens <= limits.skip_up_to:
        wanted = obstacles.get(Regime.SKIP)
    elif limits.pack_from is not None and tokens >= limits.pack_from:
        wanted = obstacles.get(Regime.PACK)
    found = [obstacle for obstacle in obstacles.values() if obstacle is not None]
    if wanted is None and len(found) == len(obstacles):
        wanted = found[0]
    return wanted or Rejection(
        Reason.NOT_PROFITABLE, f"with {tokens} tokens the dense product wins; {limits}"
    )


def _obstacles(
    rule: Rule, site: Site, decision: Decision, context: PassContext
) -> dict[Regime, Rejection | None]:
    """The regimes that the options allow, each with what else is in its way."""
    wanted = context.option("activation_format")
    obstacles: dict[Regime, Rejection | None] = {}
    if wanted != "2:4":
        obstacles[Regime.SKIP] = _batched(site) or kernel_obstacle(
            (rule.op,), site.dtype, decision.arch, context
        )
    if wanted != "exact" and (rule.packs or wanted == "2:4"):
        obstacles[Regime.PACK] = _pack_obstacle(rule, site, decision, context)
    return obstacles


def _batched(site: Site) -> Rejection | None:
    value = tensor_of(site.lhs)
    if value is None or value.ndim == 2:
        return None
    return Rejection(Reason.NO_KERNEL_YET, "a batch of matrices has no GPU kernel yet")


def _pack_obstacle(
    rule: Rule, site: Site, decision: Decision, context: PassContext
) -> Rejection | None:
    if not rule.packs:
        return Rejection(Reason.NO_KERNEL_YET, f"{rule.name} does not know 2:4")
    found = _batched(site) or kernel_obstacle(
        _OPS[Regime.PACK], site.dtype, decision.arch, context
    )
    if found is not None:
        return found
    if context.is_training:
        return Rejection(
            Reason.TRAINING_GRAPH,
            "the graph has a backward, and 2:4 drops values: the model would learn "
            "something else; call it under torch.no_grad() for inference",
        )
    return layout_obstacle(site)


def kernel_obstacle(
    ops: tuple[str, ...], dtype: str, arch: str, context: PassContext
) -> Rejection | None:
    """Why these ops cannot run in a dtype on an architecture, or None."""
    has = profitability.has_kernel
    for op in ops:
        if not profitability.knows(arch, op):
            where = arch or "a GPU that this process cannot ask for its architecture"
            return Rejection(Reason.ARCH_UNSUPPORTED, f"{op} has no kernel for {where}")
        if not has(arch, op, dtype, unverified=True):
            return Rejection(
                Reason.NO_KERNEL_YET, f"{op} has no {dtype} kernel for {arch} yet"
            )
    for op in ops:
        if not has(arch, op, dtype) and not context.option("allow_unverified"):
            return Rejection(
                Reason.KERNEL_UNVERIFIED,
                f"the {dtype} kernel of {op} never ran on {arch}; "
                "sparse.allow_unverified lets it",
            )
        missing = missing_package(op, arch)
        if missing:
            return Rejection(
                Reason.NO_KERNEL_YET, f"{op} cannot be compiled: {missing}"
            )
    return None


def layout_obstacle(site: Site, itemsize: int | None = None) -> Rejection | None:
    """Why the weight cannot be read as it lies by bulk copies, or None."""
    value = tensor_of(site.rhs)
    assert value is not None
    _, K, N = site.sizes
    step = 16 // (itemsize or value.itemsize)
    for name, size in (("K", K), ("N", N)):
        if not isinstance(size, int) or size % step:
            return Rejection(
                Reason.UNSUPPORTED_SHAPE,
                f"{name} is {size}: 2:4 reads 16 bytes at a time, so it must be a "
                f"multiple of {step}",
            )
    lead = [stride for stride in value.stride() if stride != 1]
    if len(lead) != 1 or not isinstance(lead[0], int) or lead[0] % step:
        return Rejection(
            Reason.UNSUPPORTED_SHAPE,
            f"the weight has strides {tuple(value.stride())}: neither its rows nor its "
            "columns can be read 16 bytes at a time",
        )
    return None


def _replaces_activation(site: Site) -> bool:
    """Whether a pack takes the place of the kernel that writes the activation.

    It does not if something besides matmuls reads the dense activation as well.
    """
    producer = site.producer
    if producer is None or producer.z is None:
        return False
    readers = set(producer.node.users)
    while readers:
        node = readers.pop()
        if is_call(node, VIEWS):
            readers |= set(node.users)
        elif not is_call(node, MATMULS):
            return False
    return True
