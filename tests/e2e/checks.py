"""Compile a model for real, and compare it with eager under a measured error budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from report_models import FEATURES, HIDDEN
from torch import Tensor, nn

from inductor_sparse.decisions import Decision, Status, collect

Compiled = Callable[..., Any]


def assert_as_good(actual: Tensor, dense: Tensor, exact: Tensor) -> None:
    """Assert that the error of ``actual`` is at most twice that of ``dense``.

    One rounding of the largest element is granted on top: with a handful of elements
    the dense result may be right by luck.  NaN and Inf must be where they should be.
    """
    assert (actual.dtype, actual.shape) == (dense.dtype, exact.shape)
    actual, exact = actual.detach().double(), exact.detach()
    finite = exact.isfinite()
    torch.testing.assert_close(
        actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True
    )
    if not finite.any():
        return
    ours, theirs = ((y - exact)[finite].abs().max() for y in (actual, dense.detach()))
    rounding = torch.finfo(dense.dtype).eps * exact[finite].abs().max()
    assert ours <= 2 * theirs + rounding, f"error {ours:.3g}, dense {theirs:.3g}"


def compare(compiled: Compiled, model: nn.Module, *inputs: Tensor) -> Tensor:
    """Assert that ``compiled(*inputs)`` is as close to float64 as ``model`` is."""
    actual = compiled(*inputs)
    exact = copy.deepcopy(model).double()(*map(_wide, inputs))
    dense = model(*inputs)
    assert_as_good(actual, dense, exact)
    return actual


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def compile_and_compare(
    model: nn.Module, *inputs: Tensor, **compile_args: Any
) -> tuple[Compiled, list[Decision]]:
    """Compile without gradients, compare, and return what was compiled and decided."""
    with collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse", **compile_args)
        compare(compiled, model, *inputs)
    return compiled, log.decisions


def outcomes(decisions: list[Decision]) -> list[str]:
    """``"applied"`` or the reason, one a site."""
    return [
        "applied" if d.status is Status.APPLIED else d.reason.value
        for d in decisions
        if d.status is Status.APPLIED or d.reason is not None
    ]


class Down(nn.Module):
    """A down projection of an activation that the test chooses."""

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(FEATURES, HIDDEN) if weight is None else weight
        )

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(z) ** 2, self.weight)
