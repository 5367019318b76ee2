"""Decode kernels that count what they read, and sites that go back to dense for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_sparse import decisions, lowerings, ops
from inductor_sparse.decisions import Decision
from inductor_sparse.runtime.density_gate import FIRST_LOOK

pytestmark = [
    # Torch's own: its graph trees begin with one.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OPS = torch.ops.inductor_sparse
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ALLOWED = {} if HOPPER else {"sparse.allow_unverified": True}
D, H = 4096, 16384


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sparse(*size: int, dtype: torch.dtype, density: float = 0.1) -> Tensor:
    z = torch.rand(size, device="cuda") + 0.1
    return torch.where(torch.rand_like(z) < density, z, -z).to(dtype)


def block(M: int) -> int:
    """Tokens of a program."""
    return min(8, 1 << (M - 1).bit_length())


def check_counts(fn: Callable[..., Tensor], z: Tensor, *rest: Tensor) -> None:
    """Counted are the neurons that any token of a program needs; results are equal."""
    lowerings.register_all()
    counters = torch.zeros(len(ops.COUNTERS), dtype=torch.int64, device="cuda")
    compiled = torch.compile(fn, dynamic=False)
    plain = compiled(z, *rest, None)
    for _ in range(2):
        assert torch.equal(compiled(z, *rest, counters), plain)
    blocks = z.split(block(len(z)))
    needed = sum((part > 0).any(0).sum().item() for part in blocks)
    assert counters.tolist() == [0, 0, 2 * needed, 2 * z.shape[1] * len(blocks)]


@pytest.mark.parametrize(
    ("M", "dtype"),
    [(1, BF16), (2, BF16), (3, BF16), (8, BF16), (17, BF16), (4, FP16), (1, FP32)],
)
def test_neurons_are_counted(M: int, dtype: torch.dtype) -> None:
    torch.manual_seed(M)
    z = sparse(M, 5000, dtype=dtype)
    w = torch.randn(5000, 1032, device="cuda", dtype=dtype)
    check_counts(lambda z, w, c: OPS.activation_spmm(z, w, "relu2", c), z, w)


@pytest.mark.parametrize("M", [1, 4])
def test_neurons_of_a_gated_product_are_counted(M: int) -> None:
    torch.manual_seed(M)
    gate, x = sparse(M, 3000, dtype=BF16), torch.ones(M, 520, device="cuda").to(BF16)
    up = torch.rand(3000, 520, device="cuda").to(BF16)
    down = torch.randn(3000, 392, device="cuda", dtype=BF16)
    check_counts(lambda g, *t: OPS.glu_spmm(g, *t[:3], "relu", t[3]), gate, x, up, down)


class FFN(nn.Module):
    """A ReLU² FFN whose density its bias sets: 0 is half, 3 nearly everything."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.up = nn.Linear(D, H)
        self.down = nn.Linear(H, D, bias=False)
        nn.init.constant_(self.up.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) ** 2)


def model(bias: float) -> FFN:
    torch.manual_seed(0)
    return FFN(bias).cuda().bfloat16().eval()


class Run:
    """A compiled model, and how its site ended each time."""

    def __init__(self, module: nn.Module, **how: Any) -> None:
        options = {**ALLOWED, "triton.cudagraphs": True, **how}
        self.module = module
        self.compiled = torch.compile(
            module, backend="sparse", options=options, dynamic=False
        )

    @torch.no_grad()
    def __call__(self, M: int, times: int = 3 * FIRST_LOOK) -> None:
        for _ in range(times):
            x = torch.randn(M, D, device="cuda", dtype=BF16)
            torch.compiler.cudagraph_mark_step_begin()
            actual, expected = self.compiled(x).float(), self.module(x).float()
            error = (actual - expected).norm() / expected.norm()
            assert error < 0.02
            torch.cuda.synchronize()


def outcomes(found: list[Decision]) -> list[tuple[int | str, str]]:
    return [
        (d.shapes["M"], d.op or (d.reason.value if d.reason else "")) for d in found
    ]


def test_a_dense_model_goes_back_to_dense_under_cuda_graphs() -> None:
    with decisions.collect() as log:
        Run(model(bias=3.0))(1)
    assert outcomes(log.decisions) == [(1, "activation_spmm"), (1, "too-dense")]


def test_the_default_device_may_be_a_gpu() -> None:
    with torch.device("cuda"), decisions.collect() as log:
        Run(model(bias=3.0))(1)
    assert outcomes(log.decisions) == [(1, "activation_spmm"), (1, "too-dense")]


def test_a_sparse_model_goes_on_skipping() -> None:
    with decisions.collect() as log:
        run = Run(model(bias=-0.75))
        for M in (1, 4):
            run(M)
    assert outcomes(log.decisions) == [(1, "activation_spmm"), (4, "activation_spmm")]


def test_four_tokens_of_a_random_model_are_too_dense_and_one_is_not() -> None:
    with decisions.collect() as log:
        run = Run(model(bias=0.0))
        for M in (1, 4, 1, 4, 2):
            run(M)
    assert outcomes(log.decisions) == [
        (1, "activation_spmm"),
        (4, "activation_spmm"),
        (4, "too-dense"),
        (1, "activation_spmm"),
        (2, "activation_spmm"),
    ]


def test_nothing_is_counted_where_the_caller_captures() -> None:
    with decisions.collect() as log:
        Run(model(bias=3.0), **{"sparse.cuda_graphs": True})(1)
    assert outcomes(log.decisions) == [(1, "activation_spmm")]


def test_two_threads_share_a_compiled_model() -> None:
    # Graph trees belong to one thread: this one runs without them, on a large weight.
    where = {"device": "cuda", "dtype": BF16}
    module = nn.Sequential(nn.ReLU(), nn.Linear(53248, 16384, bias=False, **where))
    compiled = torch.compile(module, backend="sparse", options=ALLOWED, dynamic=False)
    x = torch.rand(1, 53248, device="cuda", dtype=BF16)
    errors: list[BaseException] = []

    @torch.no_grad()
    def call() -> None:
        try:
            for _ in range(3 * FIRST_LOOK):
                error = (compiled(x).float() - module(x).float()).abs().max()
                assert error < 0.1
        except BaseException as error:
            errors.append(error)

    with decisions.collect() as log, torch.no_grad():
        compiled(x)
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert outcomes(log.decisions)[:2] == [(1, "activation_spmm"), (1, "too-dense")]
