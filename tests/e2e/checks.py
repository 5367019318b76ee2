"""Compile a model for real, and compare it with eager under a measured error budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from numerics import assert_within_budget
from report_models import FEATURES, HIDDEN
from torch import Tensor, nn

from inductor_sparse.decisions import Decision, Status, collect

Compiled = Callable[..., Any]


def compare(compiled: Compiled, model: nn.Module, *inputs: Tensor) -> Tensor:
    """Assert that ``compiled(*inputs)`` is as close to float64 as ``model`` is."""
    actual = compiled(*inputs)
    exact = copy.deepcopy(model).double()(*map(_wide, inputs))
    dense = model(*inputs)
    assert_within_budget(actual.detach(), dense.detach(), exact.detach())
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
