"""Generation with a static cache: a prompt, single tokens, a few at a time to verify.

Speculative decoding has a small model write a few tokens, which the large one then
reads in one call, in a number that changes from call to call.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from e2e.checks import outcomes
from static_cache import VOCABULARY, Chain, nemotron

from inductor_sparse.decisions import collect

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")

# Loading a model class meets the deprecations of its own dependencies.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

COUNTS = (96, 1, 1, 2, 3, 4, 5, 6, 7, 8)
WRONG = 1e-4
"""Of the largest logit: float32 differs from float64 by a hundredth of that."""


@torch.no_grad()
def test_every_number_of_tokens_is_right_from_three_graphs() -> None:
    model = nemotron(128, 1024, sum(COUNTS), layers=1)
    exact = Chain(copy.deepcopy(model).double(), sum(COUNTS))
    dense = Chain(model, sum(COUNTS))
    sparse = Chain(model, sum(COUNTS), backend="sparse")
    with collect() as log:
        for count in COUNTS:
            tokens_BT = torch.randint(VOCABULARY, (1, count))
            expected = exact(tokens_BT)
            limit = WRONG * expected.abs().max().item()
            for side in (dense, sparse):
                torch.testing.assert_close(
                    side(tokens_BT).double(), expected, rtol=0, atol=limit
                )
    # The prompt, one token, and any other number of tokens.
    assert len(log.graphs) == 3
    assert [outcomes(graph.decisions) for graph in log.graphs] == [["applied"]] * 3
