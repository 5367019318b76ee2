"""``calibrate(model, batches)``: measure every site over real batches, make a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inductor_sparse.errors import SparsePlanError
from inductor_sparse.plan import Plan, SitePlan
from inductor_sparse.report.measure import MeasuredGraph, SiteStats
from inductor_sparse.report.progress import tracked
from inductor_sparse.report.session import measuring


def calibrate(
    model: Any,
    batches: Iterable[Any],
    path: str | Path | None = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Run ``model`` on ``batches`` and return what was measured at each site.

    Use the result with ``options={"sparse.plan": path}``: sites that are too dense on
    your data stay dense from the first call.  The model runs without gradients and
    without generated kernels; its buffers, the inputs and the random generators are as
    before when this returns.

    Args:
        model: a module or a function.
        batches: of inputs; a tuple or list is positional arguments, a mapping keyword
            arguments, anything else the one argument.
        path: where to save the plan; ``None`` to only return it.
        options: as in ``torch.compile``; ``sparse.plan`` and ``sparse.strict`` do not
            apply here.

    Returns:
        The plan.  Sites that saw only empty tensors are not in it.

    Raises:
        SparsePlanError: there is no batch, or ``path`` cannot be written.
        SparseOptionError: an option is unknown or ill-typed.
    """
    without_plan = {**(options or {}), "sparse.plan": ""}
    count = 0
    with measuring(model, without_plan) as session:
        for batch in tracked(batches, "calibrating"):
            args, kwargs = _arguments(batch)
            session.run(*args, **kwargs)
            count += 1
    if count == 0:
        raise SparsePlanError(
            "calibrate() was given no batch; pass at least one, e.g. "
            "calibrate(model, [(inputs,)], path)"
        )
    plan = _plan(session.graphs)
    if path is not None:
        plan.save(path)
    return plan


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, list | tuple):
        return tuple(batch), {}
    return (batch,), {}


def _plan(graphs: Iterable[MeasuredGraph]) -> Plan:
    """Merge what all graphs saw: a recompilation has the same sites, by key."""
    merged: dict[str, SiteStats] = {}
    for graph in graphs:
        for site, stats in graph.stats.items():
            merged.setdefault(site, SiteStats()).merge(stats)
    plans = {site: _site_plan(stats) for site, stats in merged.items()}
    return Plan({site: plan for site, plan in plans.items() if plan is not None})


def _site_plan(stats: SiteStats) -> SitePlan | None:
    density, dropped = stats.density, stats.dropped_energy
    if density is None:
        return None
    return SitePlan(
        density=density,
        max_density=stats.max_density,
        dropped_energy=dropped,
        max_dropped_energy=None if dropped is None else stats.max_dropped,
        calls=stats.calls,
        tokens=stats.tokens,
    )
