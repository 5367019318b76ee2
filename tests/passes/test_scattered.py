"""Zeros into which few values are written, as the top-k of a sparse autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tracing import (
    compile_eagerly,
    rewrite,
    rewrite_skipping,
    trace,
)

HIDDEN = 32


def top_k(z: Tensor, k: int = 4) -> Tensor:
    values, index = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter_(-1, index, F.relu(values))


def masked_top_k(z: Tensor) -> Tensor:
    _, index = z.topk(4, dim=-1)
    return z * z.new_zeros(z.shape).scatter(1, index, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("act", "rule", "activation"),
    [
        (top_k, "relu_matmul", "scatter"),
        (masked_top_k, "gated_matmul", "scatter*up"),
        (lambda z: top_k(z) ** 2, "relu_matmul", "scatter"),
        (lambda z: F.gelu(top_k(z)), "relu_matmul", "gelu(scatter)"),
    ],
    ids=["values", "mask", "squared", "gelu"],
)
def test_what_was_not_written_is_skipped(
    act: Callable[[Tensor], Tensor], rule: str, activation: str, dtype: torch.dtype
) -> None:
    z, w = torch.randn(5, HIDDEN).to(dtype), torch.randn(6, HIDDEN).to(dtype)
    decision = rewrite_skipping(act, z, w)
    assert (decision.rule, decision.activation) == (rule, activation)


def into_ones(z: Tensor) -> Tensor:
    values, index = z.topk(4, dim=-1)
    return torch.ones_like(z).scatter(-1, index, values)


def along_tokens(z: Tensor) -> Tensor:
    values, index = z.topk(1, dim=0)
    return torch.zeros_like(z).scatter(0, index, values)


@pytest.mark.parametrize(
    "act",
    [lambda z: top_k(z, k=9), into_ones, along_tokens],
    ids=["more than a quarter", "into ones", "along tokens"],
)
def test_others_are_no_sites(act: Callable[[Tensor], Tensor]) -> None:
    z, w = torch.randn(5, HIDDEN), torch.randn(6, HIDDEN)
    gm = trace(lambda z, w: F.linear(act(z), w), z, w)
    assert rewrite(gm, static=[1]).decisions == []


def test_a_zero_that_is_a_constant_of_the_graph() -> None:
    layer = torch.nn.Linear(8, 6).requires_grad_(False)

    def fn(x: Tensor) -> Tensor:
        return layer(torch.where(x > 0, x, torch.tensor(0.0)))

    x = torch.randn(5, 8)
    compiled = compile_eagerly(fn)
    torch.testing.assert_close(compiled(x), fn(x))
    assert [decision.activation for decision in compiled.decisions] == ["relu"]
