"""Generation with a static cache on a GPU, under CUDA graphs: prompt, 1 to 8 tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from static_cache import VOCABULARY, Chain, nemotron

from inductor_sparse.decisions import DecisionLog, collect

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")

pytestmark = [
    # Of the dependencies of transformers, and of torch about empty CUDA graphs.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

FEATURES, HIDDEN, PROMPT, NEW = 4096, 16384, 2048, 16
SEVERAL = (2, 4, 8)
POSITIONS = PROMPT + NEW + sum(SEVERAL)
GRAPHS: dict[str, Any] = {"dynamic": False, "mode": "reduce-overhead"}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_turn(chain: Chain, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The logits of a call, after the buffers of the one before are free."""
    torch.compiler.cudagraph_mark_step_begin()
    return chain(tokens_BT)


def greedy(chain: Chain, text_BT: torch.Tensor) -> list[int]:
    """The tokens that follow a prompt."""
    text = []
    for _ in range(NEW):
        text_BT = in_turn(chain, text_BT)[:, -1:].argmax(dim=-1)
        text.append(int(text_BT))
    return text


def ops_of(log: DecisionLog) -> list[str]:
    """The op of the site of each graph, or why it is dense."""
    return [d.reason.value if d.reason else d.op for d in log.decisions]


@torch.no_grad()
def test_the_greedy_text_is_that_of_the_dense_model() -> None:
    """In float32, where two tokens never tie and no form is approximate."""
    model = nemotron(FEATURES, HIDDEN, POSITIONS, layers=1, device="cuda")
    prompt_BT = torch.randint(VOCABULARY, (1, PROMPT), device="cuda")
    exact: dict[str, Any] = {"sparse.activation_format": "exact"}
    # A mode and options exclude each other.
    exact |= torch._inductor.list_mode_options("reduce-overhead")
    dense = Chain(model, POSITIONS, backend="inductor", **GRAPHS)
    sparse = Chain(model, POSITIONS, backend="sparse", dynamic=False, options=exact)
    expected = greedy(dense, prompt_BT)
    with collect() as log:
        assert greedy(sparse, prompt_BT) == expected
    assert len(log.graphs) == 2
    assert ops_of(log)[1] == "activation_spmm"


@torch.no_grad()
def test_every_number_of_tokens_is_right() -> None:
    """In bfloat16, prompt included: its 2:4 product drops little of a tenth."""
    model = nemotron(FEATURES, HIDDEN, POSITIONS, layers=1, device="cuda").bfloat16()
    dense = Chain(model, POSITIONS)
    sparse = Chain(model, POSITIONS, backend="sparse", **GRAPHS)
    with collect() as log:
        for count in (PROMPT, 1, 1, *SEVERAL, 1):
            tokens_BT = torch.randint(VOCABULARY, (1, count), device="cuda")
            expected, got = dense(tokens_BT).float(), in_turn(sparse, tokens_BT).float()
            error = (got - expected).norm() / expected.norm()
            assert error < 0.05, count
    # Each number of tokens once: neither positions nor the cache compile again.
    assert len(log.graphs) == 2 + len(SEVERAL)
    prompt, one, *_ = ops_of(log)
    assert (prompt, one) == ("sparse24_mm", "activation_spmm")
