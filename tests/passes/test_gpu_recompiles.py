"""A symbolic number of tokens: one graph for each regime, whatever sizes are met.

Dynamo and AOTAutograd as on a GPU; the passes are told that the CPU is one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing import Compiled, compile_eagerly

from inductor_sparse.decisions import GraphDecisions
from inductor_sparse.passes import gpu_regimes, joint_pass, regimes
from inductor_sparse.passes.base import PassContext

FEW, MANY = 4, 64


@pytest.fixture(autouse=True)
def _cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    on_hopper = functools.partial(PassContext, architecture=lambda device: "sm_90")
    monkeypatch.setattr(joint_pass, "PassContext", on_hopper)
    monkeypatch.setattr(regimes, "ON_GPU", ("cpu",))
    cuda = gpu_regimes.cuda
    monkeypatch.setattr(cuda, "PREFILL_TOKENS", (MANY,))
    monkeypatch.setattr(cuda, "PREFILL_MIN_SIZE", 1)
    monkeypatch.setattr(cuda, "decode_max_tokens", lambda *_, **__: FEW)
    monkeypatch.setattr(cuda, "prefill_min_tokens", lambda *_, **__: MANY)
    monkeypatch.setattr(
        cuda, "prefill_gain", lambda M, *_, **__: 2.0 if M >= MANY else 0.5
    )
    yield
    torch._dynamo.reset()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(32, 64) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(64, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)) ** 2)
        return x


def call(compiled: Compiled, M: int) -> None:
    x = torch.randn(M, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled(x)


def ops(compiled: Compiled) -> list[set[str]]:
    return [{d.op for d in p.graphs[-1].decisions} for p in compiled.passes]


def test_each_regime_is_compiled_once() -> None:
    compiled = compile_eagerly(Layers().bfloat16(), dynamic=True)
    for M in (100, 3, 16, 70, 2, 33, 128, 64, 4, 5, 63):
        call(compiled, M)
    assert ops(compiled) == [{"sparse24_mm"}, {"activation_spmm"}, {""}]


def test_one_token_and_dynamic_by_itself() -> None:
    compiled = compile_eagerly(Layers().bfloat16())
    for M in (128, 1, 200, 300, 1, 2, 3, 4, 1, 400):
        call(compiled, M)
    found = ops(compiled)
    # Static for the first prompt and for one token, then a symbol for each regime.
    assert found.count({"sparse24_mm"}) == 2
    assert found.count({"activation_spmm"}) == 2
    assert len(found) == 4


def test_sizes_of_speculative_decoding() -> None:
    compiled = compile_eagerly(Layers().bfloat16())
    for M in (1, *range(2, 9), *range(2, 9), 1):
        call(compiled, M)
    assert len(compiled.passes) <= 4


def test_both_regimes_use_the_same_weights() -> None:
    model = Layers().bfloat16()
    compiled = compile_eagerly(model, dynamic=True)
    x = torch.randn(128, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(2):
            for M in (128, 4):
                expected = model(x[:M]).float()
                error = (compiled(x[:M]).float() - expected).norm()
                # Half of the neurons of a random model are active: 2:4 drops some.
                assert error < 0.1 * expected.norm()
            for layer in model.down:
                layer.weight.mul_(-1)


LIMITS = [(0, None), (1, 8192), (2, 512), (4, 1024), (8, 2048), (8, 4096)]
"""Of layers as unlike as they can be: where skipping ends, and where packing begins."""


class Unlike(nn.Module):
    """Layers of unlike widths, of which a test says where their regimes end."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        hidden = [8 * (2 + i) for i in order]
        self.up = nn.ModuleList(nn.Linear(8, size) for size in hidden)
        self.down = nn.ModuleList(nn.Linear(size, 8) for size in hidden)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)) ** 2)
        return x


@pytest.mark.parametrize(
    ("first", "order"), [(1, [0, 1, 2, 3, 4, 5]), (3000, [5, 4, 2, 3, 1, 0])]
)
def test_unlike_layers_need_no_more_graphs_than_dynamo_compiles(
    first: int, order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = gpu_regimes.cuda
    ends = {8 * (2 + i): limits for i, limits in enumerate(LIMITS)}
    monkeypatch.setattr(cuda, "PREFILL_TOKENS", (512, 1024, 2048, 4096, 8192))
    monkeypatch.setattr(cuda, "decode_max_tokens", lambda K, *_, **__: ends[K][0])
    monkeypatch.setattr(cuda, "prefill_min_tokens", lambda K, *_, **__: ends[K][1])
    compiled = compile_eagerly(Unlike(order).bfloat16())
    edges = [M for pair in LIMITS for M in pair if M]
    counts = {M + step for M in edges for step in (-1, 0, 1)} | {64, 16384}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for M in (first, *sorted(counts - {0})):
            with torch.no_grad():
                compiled(torch.zeros(M, 8, dtype=torch.bfloat16))
    assert len(compiled.passes) <= 6 < torch._dynamo.config.recompile_limit
    for decision in compiled.decisions:
        symbolic = isinstance(decision.shapes["M"], str)
        assert ("symbolic number" in decision.detail) == symbolic


def test_layers_that_begin_later_than_the_first_begin_last() -> None:
    record = GraphDecisions("test")
    context = PassContext({}, record)
    begin = functools.partial(gpu_regimes.common_start, context=context)
    assert [begin(M) for M in (1024, None, 512, 2048, 1024)] == [
        *(1024, None, 1024),
        *(gpu_regimes.cuda.PREFILL_TOKENS[-1], 1024),
    ]
