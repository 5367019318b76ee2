"""Random programs compute, and lay out, what they did before the passes.

Each takes an input in some layout, views it, zeroes a part of it in one of many
spellings, views that, and multiplies it by one or more weights in different ways.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import event, given, settings
from hypothesis import strategies as st
from spellings import RELU, RELU2, RELU2_KEPT, RELU_KEPT
from torch import Tensor
from tracing import rewrite, trace

from inductor_sparse.decisions import Status

View = Callable[[Tensor], Tensor]

LAYOUTS: dict[str, View] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "other order": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "gaps": lambda x: F.pad(x, (2, 3))[..., 2:-3],
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[..., :1, :].expand(x.shape),
}
VIEWS: dict[str, View] = {
    "none": lambda x: x,
    "flat": lambda x: x.reshape(-1, x.shape[-1]),
    "batch": lambda x: x.unsqueeze(0),
    "first": lambda x: x[:1],
    "narrow": lambda x: x[..., 1:],
    "half": lambda x: x.chunk(2, -1)[0],
    "transposed": lambda x: x.mT,
    "swapped": lambda x: x.transpose(0, -2),
    "split": lambda x: x.unflatten(-1, (1, -1)).flatten(-2),
    "copied": lambda x: x.clone(),
    "scaled": lambda x: x * 0.5,
    "reversed": lambda x: x.flip(-1),
    "doubled": lambda x: torch.cat([x, -x], -1),
}


ACTIVATIONS: dict[str, View] = {
    **{f"relu: {name}": act for name, act in (RELU | RELU_KEPT).items()},
    **{f"relu2: {name}": act for name, act in (RELU2 | RELU2_KEPT).items()},
    "maximum, row-major": lambda x: torch.maximum(torch.zeros(x.shape), x),
    "masked_fill": lambda x: x.masked_fill(x <= 0, 0),
    "threshold": lambda x: F.threshold(x, 0.3, 0),
    "hardshrink": lambda x: F.hardshrink(x, 0.5),
    "relu6": F.relu6,
    "relu, shifted": lambda x: F.relu(x - 0.5),
    "gate": lambda x: F.relu(x) * x.flip(-1),
    "gate, silu": lambda x: F.hardshrink(F.silu(x), 0.3) * x,
    "relu of relu": lambda x: F.relu(F.relu(x)),
    "relu of abs": lambda x: x.abs().relu(),
    "no zeros": lambda x: F.leaky_relu(x, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """``multiply(a, w)``, and the size of ``w`` for that of ``a``."""

    size: Callable[[torch.Size], tuple[int, ...]]
    multiply: Callable[[Tensor, Tensor], Tensor]


ROWS = 6
PRODUCTS: dict[str, Product] = {
    "linear": Product(lambda s: (ROWS, s[-1]), F.linear),
    "bias": Product(lambda s: (ROWS, s[-1]), lambda a, w: F.linear(a, w, w[:, 0])),
    "columns": Product(lambda s: (s[-1], ROWS), torch.matmul),
    "vector": Product(lambda s: (s[-1],), torch.matmul),
    "left": Product(lambda s: (ROWS, s[-2]), lambda a, w: w @ a),
    "batches": Product(lambda s: (*s[:-2], s[-1], ROWS), torch.matmul),
    "addmm": Product(
        lambda s: (ROWS, s[-1]),
        lambda a, w: torch.addmm(w[:, 0], a.flatten(0, -2), w.t(), alpha=0.5),
    ),
    "einsum": Product(
        lambda s: (ROWS, s[-1]), lambda a, w: torch.einsum("...k,nk->n...", a, w)
    ),
    "part": Product(
        lambda s: (ROWS, s[-1]), lambda a, w: F.linear(a[..., :3], w[:, :3])
    ),
    "then": Product(
        lambda s: (ROWS, s[-1]), lambda a, w: F.gelu(F.linear(a, w)).sum(-1)
    ),
    "again": Product(lambda s: (ROWS, s[-1]), lambda a, w: F.relu(F.linear(a, w)) @ w),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What it computes of an input and of one weight for each product."""

    view: str
    activation: str
    after: str
    products: tuple[str, ...]
    returns_activation: bool

    def activated(self, x: Tensor) -> Tensor:
        """What all the products read."""
        return VIEWS[self.after](ACTIVATIONS[self.activation](VIEWS[self.view](x)))

    def weights(self, x: Tensor) -> list[Tensor]:
        """Random weights of the sizes that the products need."""
        size = self.activated(x).shape
        sizes = [PRODUCTS[name].size(size) for name in self.products]
        return [torch.randn(one) for one in sizes]

    def __call__(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        a = self.activated(x)
        named = zip(self.products, weights, strict=True)
        results = [PRODUCTS[name].multiply(a, w) for name, w in named]
        return (*results, a) if self.returns_activation else tuple(results)


PROGRAMS = st.builds(
    Program,
    view=st.sampled_from(list(VIEWS)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    after=st.sampled_from(["none", "none", *VIEWS]),
    products=st.lists(st.sampled_from(list(PRODUCTS)), min_size=1, max_size=3).map(
        tuple
    ),
    returns_activation=st.booleans(),
)
SIZES = st.sampled_from([(5, 8), (1, 8), (9, 33), (2, 3, 16), (3, 1, 7), (2, 2, 3, 8)])
SPECIAL = (math.nan, math.inf, -math.inf, -0.0)


def strides(x: Tensor) -> list[int]:
    """Those that say where an element lies: not of dimensions of size 1."""
    steps = zip(x.stride(), x.shape, strict=True)
    return [step for step, size in steps if size > 1]


@settings(max_examples=150)
@given(PROGRAMS, st.sampled_from(list(LAYOUTS)), SIZES, st.booleans(), st.integers(0))
def test_passes_change_neither_values_nor_layouts(
    program: Program, layout: str, size: tuple[int, ...], special: bool, seed: int
) -> None:
    torch.manual_seed(seed % 2**31)
    x = torch.randn(size)
    if special:
        x.flatten()[: len(SPECIAL)] = torch.tensor(SPECIAL)
    x = LAYOUTS[layout](x)
    weights = program.weights(x)
    before = trace(program, x, *weights)
    after = trace(program, x, *weights)
    record = rewrite(after, static=range(1, 1 + len(weights)))
    event(f"applied: {sum(d.status is Status.APPLIED for d in record.decisions)}")
    for actual, expected in zip(after(x, *weights), before(x, *weights), strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=2e-5, atol=2e-5, equal_nan=True
        )
        assert strides(actual) == strides(expected)
