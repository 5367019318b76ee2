"""``bench compile``: what the backend adds to compile time.

A stack of ReLU² transformer blocks is compiled by ``inductor`` and by ``sparse`` in
turn, each time from an empty cache folder and a fresh Dynamo, first call included.
``ratio`` is sparse over inductor seconds: 1.10 means that compiling takes 10 % longer.

Shape legend: ``B`` batch, ``T`` tokens, ``D`` features, ``H`` heads.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from inductor_sparse import decisions
from inductor_sparse.bench.ffn import ratio_fields
from inductor_sparse.bench.intervals import median, paired_ratio
from inductor_sparse.bench.rows import Row, machine
from inductor_sparse.bench.variants import release
from inductor_sparse.errors import NothingAppliedError

Report = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """The model to compile and how often; ``rounds`` compilations per backend."""

    layers: int = 24
    features: int = 512
    hidden: int = 2048
    heads: int = 8
    tokens: int = 128
    rounds: int = 5
    device: str = "cpu"


class Block(nn.Module):
    """Pre-norm attention and a ReLU² FFN, both residual."""

    def __init__(self, features: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(features)
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)
        self.ffn_norm = nn.RMSNorm(features)
        self.up = nn.Linear(features, hidden, bias=False)
        self.down = nn.Linear(hidden, features, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """One block, shape kept."""
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.attention_norm(x_BTD)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        hidden = torch.relu(self.up(self.ffn_norm(x_BTD))).square()
        return x_BTD + self.down(hidden)


def run(case: CompileCase, report: Report = lambda message: None) -> Row:
    """Compile both ways ``rounds`` times, alternately, after one discarded pair.

    Raises:
        NothingAppliedError: the sparse backend rewrote no site, so that both sides
            compiled the same graph.
    """
    torch.manual_seed(0)
    blocks = (Block(case.features, case.hidden, case.heads) for _ in range(case.layers))
    model = nn.Sequential(*blocks).to(case.device).eval()
    x_BTD = torch.randn(1, case.tokens, case.features, device=case.device)
    seconds: dict[str, list[float]] = {"inductor": [], "sparse": []}
    applied = 0
    for round_index in range(case.rounds + 1):
        for backend, samples in seconds.items():
            report(f"round {round_index} of {case.rounds}: {backend}")
            elapsed, applied = compile_seconds(model, backend, x_BTD)
            # The first pair pays for imports, worker processes and the file cache.
            if round_index > 0:
                samples.append(elapsed)
    if applied == 0:
        raise NothingAppliedError(
            "the sparse backend rewrote no site of this model, so there is no overhead "
            "to measure; use a larger --hidden"
        )
    return _describe(case, seconds, applied)


def compile_seconds(model: nn.Module, backend: str, x_BTD: Tensor) -> tuple[float, int]:
    """Seconds to compile and run once from nothing, and the number of applied sites."""
    from torch._inductor.utils import fresh_cache

    release()
    with fresh_cache(), torch.no_grad(), decisions.collect() as log:
        start = time.perf_counter()
        torch.compile(model, backend=backend, dynamic=False)(x_BTD)
        elapsed = time.perf_counter() - start
    release()
    return elapsed, sum(len(graph.applied) for graph in log.graphs)


def _describe(case: CompileCase, seconds: dict[str, list[float]], applied: int) -> Row:
    """The row of all rounds."""
    ratio = paired_ratio(seconds["sparse"], seconds["inductor"])
    # A ratio above 1 is slower here, the reverse of the other benchmarks.
    words = {"faster": "slower", "slower": "faster", "tie": "tie"}
    return {
        "op": "compile",
        **dataclasses.asdict(case),
        "inductor_s": median(seconds["inductor"]),
        "sparse_s": median(seconds["sparse"]),
        **ratio_fields(ratio),
        "verdict": words[ratio.verdict],
        "sites_applied": applied,
        **machine(case.device),
    }
