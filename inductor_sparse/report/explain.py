"""``explain(model, *args)``: what the backend does with a model, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from inductor_sparse import profitability
from inductor_sparse.decisions import Decision, GraphDecisions, Status, Tier
from inductor_sparse.report.explanation import Explanation
from inductor_sparse.report.kernels import KernelUse
from inductor_sparse.report.measure import MeasuredGraph, SiteStats
from inductor_sparse.report.session import measuring


def explain(
    model: Any,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """Compile ``model`` as ``backend="sparse"`` would, run it once, report each site.

    The passes are the backend's own and see the same graphs, but no kernel is
    generated: the graphs are run node by node, which is what allows to measure each
    site's density and 2:4 loss, of dense sites as well.  Compile caches are not used.
    The model runs without gradients, in the mode (train or eval) it is in; buffers, the
    inputs and the random generators are as before when this returns.  Not undone are
    changes to parameters, to plain attributes, and to cache objects that pytree does
    not know: pass a fresh cache.

    Args:
        model: a module or a function; a result of ``torch.compile`` is unwrapped.
        args: its positional arguments; tensors of any shape, dtype and device that it
            takes, with real values.
        options: as in ``torch.compile(..., options=...)``; ``sparse.strict`` does not
            apply here.
        kwargs: its keyword arguments, except one called ``options``: wrap such a model
            in a function.

    Returns:
        The :class:`Explanation`: print it, or take ``.to_dict()``.

    Raises:
        SparseOptionError: an option is unknown or ill-typed.
        SparsePlanError: the plan in the options cannot be used.
    """
    with measuring(model, options) as session:
        session.run(*args, **kwargs)
    return Explanation(tuple(_measured(graph) for graph in session.graphs))


def _measured(graph: MeasuredGraph) -> GraphDecisions:
    """The graph's decisions with the measurements filled in."""
    decisions = [
        _with_stats(decision, graph.stats.get(decision.site))
        for decision in graph.decisions.decisions
    ]
    return dataclasses.replace(graph.decisions, decisions=decisions)


def _with_stats(decision: Decision, stats: SiteStats | None) -> Decision:
    if stats is None or stats.density is None:
        return decision
    measured = dataclasses.replace(
        decision,
        density=stats.density,
        dropped_energy=stats.dropped_energy,
        expected_gain=_expected_gain(decision, stats),
    )
    return measured if stats.kernel is None else _with_kernel(measured, stats.kernel)


def _expected_gain(decision: Decision, stats: SiteStats) -> float | None:
    """The gain at the measured density; that of 2:4 does not depend on it."""
    gain = decision.expected_gain
    if gain is None or decision.status is not Status.APPLIED:
        return gain
    if decision.tier is Tier.APPROXIMATE:
        return gain
    rows, features, outputs = (decision.shapes[axis] for axis in "MKN")
    tokens = rows if isinstance(rows, int) else stats.tokens // stats.calls
    if not decision.device.startswith("cuda"):
        return profitability.expected_gain(tokens, stats.density, decision.dtype)
    if not isinstance(features, int) or not isinstance(outputs, int):
        return gain
    return profitability.cuda.decode_gain(
        *(tokens, features, outputs, decision.dtype, stats.density),
        gated=decision.op == "glu_spmm",
        graphs=decision.cuda_graphs,
    )


def _with_kernel(decision: Decision, used: KernelUse) -> Decision:
    dense, sparse = used.dense_peak, used.sparse_peak
    return dataclasses.replace(
        decision,
        kernel=str(used),
        tflops=used.tflops,
        of_dense_peak=None if dense is None else used.tflops / dense,
        of_sparse_peak=None if sparse is None else used.tflops / sparse,
    )
