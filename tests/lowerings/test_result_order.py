"""Whether a product is wanted transposed is read off the graph behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tracing import calls, trace

from inductor_sparse.lowerings.result_order import is_read_transposed

Function = Callable[..., Any]


def wanted(fn: Function) -> bool:
    """Whether ``fn`` reads the product of its two arguments transposed."""

    def call(a: Tensor, b: Tensor) -> Any:
        return fn(a @ b)

    gm = trace(call, torch.randn(6, 4), torch.randn(4, 6))
    return is_read_transposed(calls(gm, "mm")[0])


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: y.t().contiguous(),
        lambda y: F.relu(y * 2).bfloat16().transpose(0, 1).contiguous(),
        lambda y: y.permute(-1, 0).contiguous() + 1,
    ],
)
def test_wanted(fn: Function) -> None:
    assert wanted(fn)


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: y.t(),
        lambda y: y * 2,
        lambda y: (y.t().contiguous(), y * 2),
        lambda y: (y.t().contiguous(), y.t() + 1),
        lambda y: y.t().clone(),
        lambda y: y.permute(0, 1).clone(memory_format=torch.contiguous_format),
        lambda y: y.view(2, 3, 6).transpose(0, 1).contiguous(),
        lambda y: y.sum(0).expand(6, 6).t().contiguous(),
        lambda y: y.cumsum(0).t().contiguous(),
        lambda y: (y + torch.ones(2, 6, 6)).sum(0).t().contiguous(),
    ],
)
def test_not_wanted(fn: Function) -> None:
    assert not wanted(fn)
