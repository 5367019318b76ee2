"""``activation_spmm`` and ``glu_spmm`` of few tokens, compiled for a GPU.

Truth is float64; the budget is what torch's own dense product in the dtype needs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import assert_within_budget
from torch import Tensor

from inductor_sparse import lowerings, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OPS = torch.ops.inductor_sparse
DENSITIES = (0.0, 0.02, 0.05, 0.1, 0.5, 1.0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [(1, BF16), (2, BF16), (3, BF16), (8, BF16), (17, BF16)]
CASES += [(1, FP16), (4, FP16), (1, FP32), (5, FP32)]


def compiled(fn: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    """``fn`` compiled by Inductor with our lowerings."""
    lowerings.register_all()
    torch._dynamo.reset()
    return torch.compile(fn, dynamic=False, options=options or None)


def sparse(*size: int, density: float, dtype: torch.dtype) -> Tensor:
    """Before a ReLU: positive where active, negative elsewhere."""
    z = torch.rand(size, device="cuda") + 0.1
    return torch.where(torch.rand_like(z) < density, z, -z).to(dtype)


def dense(*size: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(size, device="cuda") / size[-2] ** 0.5).to(dtype)


def check(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Within the budget; few float32 products may be summed exactly by luck."""
    if actual.dtype != FP32:
        assert_within_budget(actual, eager, exact)
        return
    largest = exact.nan_to_num(0, 0, 0).abs().max().item()
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-6 * largest)


def check_product(actual: Tensor, z: Tensor, w: Tensor, activation: str) -> None:
    a = reference.activation(z, activation)
    exact = reference.activation_spmm(a.double(), w.double(), "identity")
    check(actual, a @ w.nan_to_num(0, 0, 0), exact)


@pytest.mark.parametrize(("M", "dtype"), CASES)
def test_any_density(M: int, dtype: torch.dtype) -> None:
    torch.manual_seed(M)
    fn = compiled(lambda z, w: OPS.activation_spmm(z, w, "relu2"))
    w = dense(5000, 1032, dtype=dtype)
    for density in DENSITIES:
        z = sparse(M, 5000, density=density, dtype=dtype)
        actual = fn(z, w)
        check_product(actual, z, w, "relu2")
        assert torch.equal(fn(z, w), actual), "not the same twice"


@pytest.mark.parametrize(("K", "N"), [(1, 1), (77, 33), (16385, 130), (200, 70000)])
@pytest.mark.parametrize("M", [1, 3])
def test_any_size(M: int, K: int, N: int) -> None:
    torch.manual_seed(K)
    fn = compiled(lambda z, w: OPS.activation_spmm(z, w, "relu"))
    z, w = sparse(M, K, density=0.3, dtype=FP16), dense(K, N, dtype=FP16)
    check_product(fn(z, w), z, w, "relu")


@pytest.mark.parametrize("M", [1, 4])
def test_zeros_are_skipped_and_nans_kept(M: int) -> None:
    torch.manual_seed(0)
    fn = compiled(lambda z, w: OPS.activation_spmm(z, w, "relu2"))
    z = sparse(M, 600, density=0.2, dtype=BF16)
    w = dense(600, 300, dtype=BF16)
    w[7], w[8, 5] = torch.inf, torch.nan
    z[:, 7:9] = -1.0
    assert fn(z, w).isfinite().all()
    z[M - 1, 7] = 2.0
    check_product(fn(z, w), z, w, "relu2")
    z[0, 11] = torch.nan
    actual = fn(z, w)
    assert actual[0].isnan().all()
    assert M == 1 or actual[M - 1].isposinf().all()
    assert actual[1 : M - 1].isfinite().all()


def test_a_batch_and_strides() -> None:
    torch.manual_seed(0)
    fn = compiled(lambda z, w: OPS.activation_spmm(z, w, "relu"))
    z = sparse(3, 500, 2, density=0.2, dtype=BF16).mT
    w = dense(3, 200, 500, dtype=BF16).mT
    check_product(fn(z, w), z, w, "relu")


def test_an_epilogue_and_any_number_of_tokens() -> None:
    torch.manual_seed(0)
    lowerings.register_all()
    torch._dynamo.reset()
    fn = torch.compile(
        lambda z, w, r: OPS.activation_spmm(z, w, "relu2").float() * 2 + r, dynamic=True
    )
    w = dense(2000, 520, dtype=BF16)
    for M in (2, 5, 40):
        z = sparse(M, 2000, density=0.1, dtype=BF16)
        residual = torch.randn(M, 520, device="cuda")
        product = (fn(z, w, residual) - residual) / 2
        exact = z.double().relu().square() @ w.double()
        torch.testing.assert_close(product.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("M", "dtype"), [*CASES[:5], (4, FP16), (1, FP32), (5, FP32)])
def test_gated(M: int, dtype: torch.dtype) -> None:
    torch.manual_seed(M)
    fn = compiled(lambda *t: OPS.glu_spmm(*t, "relu"))
    x = torch.randn(M, 520, device="cuda", dtype=dtype)
    w_up = dense(520, 3000, dtype=dtype).t().contiguous()
    w_down = dense(3000, 392, dtype=dtype)
    w_up[3], w_down[3] = torch.inf, torch.nan
    for density in DENSITIES:
        gate = sparse(M, 3000, density=density, dtype=dtype)
        gate[:, 3] = -1.0
        wide = [t.double() for t in (gate, x, w_up, w_down)]
        exact = reference.glu_spmm(*wide, "relu")
        eager = reference.glu_spmm(gate, x, w_up, w_down, "relu")
        actual = fn(gate, x, w_up, w_down)
        check(actual, eager, exact)
        assert torch.equal(fn(gate, x, w_up, w_down), actual), "not the same twice"


@pytest.mark.parametrize(("M", "dtype"), [(1, BF16), (2, BF16), (4, FP16), (3, FP32)])
def test_a_gate_that_has_its_zeros_already(M: int, dtype: torch.dtype) -> None:
    relu, identity = (
        compiled(lambda *t, name=name: OPS.glu_spmm(*t, name))
        for name in ("relu", "identity")
    )
    x = torch.randn(M, 520, device="cuda", dtype=dtype)
    w_up, w_down = dense(3000, 520, dtype=dtype), dense(3000, 392, dtype=dtype)
    for density in DENSITIES:
        gate = sparse(M, 3000, density=density, dtype=dtype)
        expected = relu(gate, x, w_up, w_down)
        assert torch.equal(identity(gate.relu(), x, w_up, w_down), expected)


@pytest.mark.parametrize("M", [1, 4])
def test_a_cuda_graph_replays_with_other_densities(M: int) -> None:
    torch.manual_seed(0)
    fn = compiled(lambda *t: OPS.glu_spmm(*t, "relu") + 1)
    x = torch.randn(M, 256, device="cuda", dtype=BF16)
    w_up, w_down = dense(1000, 256, dtype=BF16), dense(1000, 256, dtype=BF16)
    gate = sparse(M, 1000, density=0.1, dtype=BF16)
    fn(gate, x, w_up, w_down)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn(gate, x, w_up, w_down)
    for density in (*DENSITIES, 0.1, 0.0):
        gate.copy_(sparse(M, 1000, density=density, dtype=BF16))
        graph.replay()
        assert torch.equal(out, fn(gate, x, w_up, w_down))


def two_layers(gate: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Kernels for few tokens, one after the other and with others in between."""
    h = OPS.glu_spmm(gate, x, w_up, w_down, "relu")
    h = OPS.activation_spmm(h @ w_up.t(), w_down, "relu2")
    return OPS.activation_spmm(h, w_down[:256], "relu") + h


# Torch's own: its graph trees begin with one.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("M", [1, 4])
def test_kernels_that_are_launched_before_those_before_them_have_ended(M: int) -> None:
    torch.manual_seed(0)
    plain = compiled(two_layers)
    x = torch.randn(M, 256, device="cuda", dtype=BF16)
    w_up, w_down = dense(4000, 256, dtype=BF16), dense(4000, 256, dtype=BF16)
    gates = [sparse(M, 4000, density=d, dtype=BF16) for d in DENSITIES]
    expected = [plain(gate, x, w_up, w_down).clone() for gate in gates]
    early = compiled(two_layers, **{"triton.cudagraphs": True})
    for _ in range(20):
        for gate, result in zip(gates, expected, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(early(gate, x, w_up, w_down), result)


def test_a_graph_of_the_caller_with_copies_and_two_streams() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = torch.nn.Linear(16384, 4096, bias=False, device="cuda", dtype=BF16)
    model = torch.nn.Sequential(torch.nn.ReLU(), layer)
    way = {"sparse.cuda_graphs": True}
    fn = torch.compile(model, backend="sparse", dynamic=False, options=way)
    sources = [sparse(1, 16384, density=d, dtype=BF16) for d in (0.05, 0.3)]
    inputs = [torch.empty_like(source) for source in sources]
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        expected = [fn(source).clone() for source in sources]
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                inputs[1].copy_(sources[1])
                second = fn(inputs[1])
            inputs[0].zero_()
            inputs[0].copy_(sources[0])
            first = fn(inputs[0])
            torch.cuda.current_stream().wait_stream(side)
            total = first + second
    for _ in range(50):
        for tensor in (*inputs, first, second, total):
            tensor.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first, expected[0])
        assert torch.equal(second, expected[1])
        assert torch.equal(total, expected[0] + expected[1])
