"""Skipping that does not pay on a GPU is given back, by Dynamo and all of our passes.

The passes are told that the CPU is a GPU, and the kernels that count are imitated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from inductor_sparse import _compat, reference
from inductor_sparse.decisions import Decision, Reason, collect
from inductor_sparse.passes import gpu_regimes, joint_pass, observe_density, regimes
from inductor_sparse.passes.base import PassContext
from inductor_sparse.runtime import adaptation
from inductor_sparse.runtime.density_gate import FIRST_LOOK

FEW, MANY = 4, 64
OPS = torch.ops.inductor_sparse


@pytest.fixture(autouse=True)
def _cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    on_hopper = functools.partial(PassContext, architecture=lambda device: "sm_90")
    monkeypatch.setattr(joint_pass, "PassContext", on_hopper)
    monkeypatch.setattr(regimes, "ON_GPU", ("cpu",))
    monkeypatch.setattr(observe_density, "ON_CPU", ())
    cuda = gpu_regimes.cuda
    monkeypatch.setattr(cuda, "PREFILL_TOKENS", (MANY,))
    monkeypatch.setattr(cuda, "PREFILL_MIN_SIZE", 1)
    monkeypatch.setattr(cuda, "decode_max_tokens", lambda *_, **__: FEW)
    monkeypatch.setattr(cuda, "prefill_min_tokens", lambda *_, **__: MANY)
    monkeypatch.setattr(cuda, "prefill_gain", lambda *_, **__: 2.0)
    # Half of the neurons of a random model are active for one token, most for four.
    limits = {1: 0.8, 2: 0.9, 3: 0.7, 4: 0.7}
    monkeypatch.setattr(cuda, "break_even_union", lambda M, *_, **__: limits[M])
    adaptation.reset()
    yield
    adaptation.reset()
    torch._dynamo.reset()


class Kernels(fx.Interpreter):
    """Runs a graph; kernels that skip count the neurons that any token needs."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is OPS.site_counters.default:
            return adaptation.gpu_site_counters(*args, **kwargs)
        if target is OPS.activation_spmm.default:
            z, w, activation, counters = args
            needed = (reference.activation(z, activation) != 0).any(0).sum()
            counters[2:] += torch.tensor([needed, len(w)])
        return super().call_function(target, args, kwargs)


def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """As the real one, but for the kernels."""
    code = _compat.frame_code()
    demoted = adaptation.demoted(code)
    sparse_pass = joint_pass.SparsePass({}, demoted=demoted, dynamo_graph=gm)

    def run(graph: fx.GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
        return make_boxed_func(Kernels(graph).run)

    patches = {"joint_custom_pre_pass": sparse_pass}
    compiled = compile_fx(gm, inputs, inner_compile=run, config_patches=patches)
    return adaptation.observed(compiled, code)


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 256)
        self.down = nn.Linear(256, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) ** 2)


def outcomes(decisions: list[Decision]) -> list[tuple[str, str]]:
    found = [(d.shapes["M"], d.op or d.reason.value) for d in decisions if d.rule]
    return [(str(tokens), outcome) for tokens, outcome in found]


@torch.no_grad()
def test_four_tokens_go_back_to_dense_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = FFN().bfloat16()
    compiled = torch.compile(model, backend=backend, dynamic=False)

    def call(M: int, times: int) -> None:
        for _ in range(times):
            x = torch.randn(M, 32, dtype=torch.bfloat16)
            expected = model(x).float()
            error = (compiled(x).float() - expected).norm() / expected.norm()
            # Half of the neurons of a random model are active: 2:4 drops some.
            assert error < (0.2 if M >= MANY else 0.01)

    with collect() as log:
        call(1, 3 * FIRST_LOOK)
        call(128, 2)
        call(4, FIRST_LOOK + 1)
        assert outcomes(log.decisions) == [
            ("1", "activation_spmm"),
            ("128", "sparse24_mm"),
            ("4", "activation_spmm"),
        ]
        for M in (4, 128, 1, 2, 4):
            call(M, 3 * FIRST_LOOK)
    assert outcomes(log.decisions)[3:] == [
        ("4", Reason.TOO_DENSE.value),
        ("128", "sparse24_mm"),
        ("1", "activation_spmm"),
        ("2", "activation_spmm"),
    ]


@torch.no_grad()
def test_a_symbolic_number_of_tokens() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(FFN().bfloat16(), backend=backend, dynamic=True)
    with collect() as log:
        for M in (3, 4, 2, 100):
            for _ in range(3 * FIRST_LOOK):
                compiled(torch.randn(M, 32, dtype=torch.bfloat16))
    found = [outcome for _, outcome in outcomes(log.decisions)]
    assert found == ["activation_spmm", "too-dense", "sparse24_mm"]
