"""How a site of a GPU skips zeros for a few tokens: by which op, of rows of what dtype.

Shape legend: M tokens, K reduction, N output features.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from inductor_sparse._compat import size_hint
from inductor_sparse.passes.fx_utils import changing_input
from inductor_sparse.passes.quantized_ffn import read_rows
from inductor_sparse.passes.weights import Copy
from inductor_sparse.profitability import cuda

if TYPE_CHECKING:
    from inductor_sparse.decisions import Decision
    from inductor_sparse.passes.base import PassContext, Rule
    from inductor_sparse.passes.sites import Site

Steps = tuple[cuda.DecodeStep, ...]

_GATED = "glu_spmm"
"""The form that skips rows of an up projection as well."""


@dataclasses.dataclass(frozen=True)
class Skipping:
    """How a site may skip.

    ``forms`` are the ops that it may become.  ``rows`` is the weight as a window whose
    rows are read in 8 bits, if they are, and ``note`` says so, or why they are not
    although that was asked for.
    """

    forms: tuple[str, ...] = ()
    rows: Copy | None = None
    note: str = ""

    @property
    def read_dtype(self) -> str:
        """The dtype in which rows are read if not in that of the site, else empty."""
        return "" if self.rows is None else self.rows.dtype_name

    def steps(
        self, site: Site, decision: Decision, context: PassContext
    ) -> tuple[Steps, int]:
        """By which form, and up to how many tokens but for what was observed."""
        _, K, N = (size_hint(size) or 0 for size in site.sizes)
        demoted_from = context.demoted_from(decision.site)

        def steps(ends: tuple[int, ...]) -> Steps:
            return cuda.decode_steps(
                *(K, N, site.dtype, decision.density),
                forms=tuple(op == _GATED for op in self.forms),
                graphs=context.cuda_graphs,
                observed=_is_observed(site, decision, context),
                read_dtype=self.read_dtype,
                ends=ends,
            )

        ends = cuda.SYMBOLIC_DECODE_TOKENS if is_symbolic(site) else cuda.DECODE_TOKENS
        expected = steps(ends)
        if demoted_from is None:
            return expected, last(expected)
        return steps(tuple(M for M in ends if demoted_from > M)), last(expected)

    def gain(
        self,
        site: Site,
        decision: Decision,
        context: PassContext,
        step: cuda.DecodeStep,
    ) -> float:
        """Expected dense time / time of skipping."""
        M, K, N = (size_hint(size) or 0 for size in site.sizes)
        return cuda.decode_gain(
            *(M, K, N, site.dtype, decision.density),
            gated=step.gated,
            graphs=context.cuda_graphs,
            read_dtype=self.read_dtype,
        )

    def op(self, step: cuda.DecodeStep) -> str:
        """The form that skips rows of two weights, or of one."""
        return next(op for op in self.forms if (op == _GATED) == step.gated)


NOT_SKIPPING = Skipping()


def read_skipping(
    rule: Rule, site: Site, decision: Decision, context: PassContext
) -> Skipping:
    """How the zeros of a site may be skipped."""
    forms = rule.forms(site, context)
    if context.option("quantize") == "none":
        return Skipping(forms)
    rows: Copy | str = f"{rule.name} does not know them"
    if rule.packs and rule.op == "activation_spmm":
        rows = read_rows(site, decision.arch, context)
    if isinstance(rows, str):
        return Skipping(forms, note=f"; rows not quantized: {rows}")
    note = f"; rows of the weight in {rows.dtype_name}, each with a scale"
    return Skipping(forms, rows, note)


def _is_observed(site: Site, decision: Decision, context: PassContext) -> bool:
    """Whether somebody looks at how dense a site is, and gives it back.

    What its kernels count in is asked for by an input of their device.
    """
    graph, device = site.matmul.graph, site.matmul.meta["val"].device
    anchor = changing_input(graph, device, context.static_inputs)
    return anchor is not None and context.can_demote(decision.arch, site.dtype)


def is_symbolic(site: Site) -> bool:
    """Whether the number of tokens may be another one in the next call."""
    return not isinstance(site.sizes[0], int)


def last(steps: Steps) -> int:
    """Up to how many tokens a site skips at all."""
    return steps[-1].up_to if steps else 0
