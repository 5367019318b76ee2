"""How a site is rewritten, if it is: by skipping zeros, or packed 2:4.

On a CPU skipping zeros is all there is; what a GPU offers is the subject of
:mod:`inductor_sparse.passes.gpu_regimes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx.experimental.symbolic_shapes import statically_known_true

from inductor_sparse import profitability
from inductor_sparse._compat import size_hint
from inductor_sparse.decisions import Decision, Reason
from inductor_sparse.passes.choice import OBSERVED_TOO_DENSE, Choice, Regime
from inductor_sparse.passes.gpu_regimes import choose_on_gpu
from inductor_sparse.passes.sites import Rejection, Site

if TYPE_CHECKING:
    from inductor_sparse.passes.base import PassContext, Rule

ON_GPU = ("cuda",)
"""Types of devices with the regimes of a GPU; ROCm calls its devices so too."""


def choose(
    rule: Rule, site: Site, decision: Decision, context: PassContext
) -> Choice | Rejection:
    """The regime for a site that nothing but its device speaks against."""
    found = too_dense(decision, context)
    if site.device in ON_GPU:
        return found or choose_on_gpu(rule, site, decision, context)
    return found or _choose_on_cpu(rule, site, decision, context)


def too_dense(decision: Decision, context: PassContext) -> Rejection | None:
    """Why a site has too few zeros by its plan, or None."""
    limit = float(context.option("max_density"))
    if decision.density is not None and decision.density > limit:
        return Rejection(
            Reason.TOO_DENSE,
            f"the plan measured density {decision.density:.3g}, above "
            f"sparse.max_density {limit:.3g}",
        )
    return None


def _choose_on_cpu(
    rule: Rule, site: Site, decision: Decision, context: PassContext
) -> Choice | Rejection:
    if context.demoted_from(decision.site) is not None:
        return Rejection(Reason.TOO_DENSE, OBSERVED_TOO_DENSE)
    if not profitability.has_kernel(decision.arch, rule.op, site.dtype):
        return Rejection(
            Reason.NO_KERNEL_YET,
            f"{rule.op} has no {site.dtype} kernel for {site.device} yet",
        )
    op = _form(rule, site, decision, context)
    tokens, density = size_hint(site.sizes[0]), decision.density
    break_even = profitability.break_even_density(tokens, site.dtype)
    if density is not None and density > break_even:
        return Rejection(
            Reason.NOT_PROFITABLE,
            f"the plan measured density {density:.3g}, and with {tokens} tokens of "
            f"{site.dtype} skipping zeros wins below {break_even:.3g}",
        )
    gain = profitability.expected_gain(tokens, density, site.dtype)
    return Choice(Regime.SKIP, gain, op=op)


def _form(rule: Rule, site: Site, decision: Decision, context: PassContext) -> str:
    """The op that skips: without the up projection only for a few tokens."""
    M = site.sizes[0]
    if isinstance(M, int):
        few = profitability.glu_pays(M, decision.density, site.dtype)
    else:
        most = profitability.GLU_MAX_TOKENS
        few = statically_known_true(M > 0) and statically_known_true(most >= M)
    forms = rule.forms(site, context)
    return next(op for op in forms if few or op != "glu_spmm")
