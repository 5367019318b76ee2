"""``linear_sparsify24`` on Hopper: the bits of the reference where sums are exact.

Shape legend: ``M`` tokens, ``D`` features of the model, ``K`` neurons.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inductor_sparse import formats, lowerings, reference
from inductor_sparse.lowerings import linear_sparsify24_kernel as hopper
from inductor_sparse.lowerings.linear_sparsify24_kernel import TileConfig

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]


def _operands(
    M: int, D: int, K: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: every sum is exact, and there are many ties."""
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (M, D), device="cuda").to(dtype)
    w1 = torch.randint(-1, 2, (K, D), device="cuda").to(dtype)
    w1 *= torch.rand(K, D, device="cuda") < 64 / D
    return x, w1, torch.randint(-3, 4, (K,), device="cuda").to(dtype)


def _hidden(x: Tensor, w1: Tensor, bias: Tensor | None) -> Tensor:
    h = x.double() @ w1.double().t()
    return (h if bias is None else h + bias.double()).to(x.dtype)


def _check(packed: tuple[Tensor, Tensor], h: Tensor, activation: str) -> None:
    values, metadata = packed
    expected, index = reference.sparsify24(h, activation, "largest")
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(values[~values.isnan()]).any()
    assert torch.equal(metadata, formats.pack_index(index, h.dtype))


@pytest.mark.parametrize("tile", hopper.TILES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.bfloat16, "relu2"), (torch.float16, "relu")]
)
@pytest.mark.parametrize(
    ("M", "D", "K"),
    [(1, 72, 100), (300, 200, 712), (777, 520, 1000), (2048, 64, 512), (65, 8, 4)],
)
def test_any_size(
    M: int, D: int, K: int, dtype: torch.dtype, activation: str, tile: TileConfig
) -> None:
    x, w1, bias = _operands(M, D, K, dtype)
    assert hopper.refusal(x, w1, activation) is None
    for given in (None, bias):
        packed = hopper.launch(tile, x, w1, given, activation, None)
        _check(packed, _hidden(x, w1, given), activation)


def test_many_tiles_of_one_cta() -> None:
    x, w1, bias = _operands(4096, 128, 8192)
    for given in (None, bias):
        op = torch.ops.inductor_sparse.linear_sparsify24
        assert hopper.best_tile(4096, 8192, 132) is not None
        packed = op(x, w1, given, "relu2", "largest")
        _check(packed, _hidden(x, w1, given), "relu2")


def test_nan_and_inf_are_kept() -> None:
    x, w1, bias = _operands(130, 128, 328)
    x[3, 5], x[129, 1], x[64, 0] = torch.nan, torch.inf, -torch.inf
    for given in (None, bias):
        packed = hopper.launch(TileConfig(), x, w1, given, "relu2", None)
        _check(packed, _hidden(x, w1, given), "relu2")


def test_strided_rows_and_refused_layouts() -> None:
    x, w1, _ = _operands(1024, 256, 8192)
    wide = torch.cat((x, x), dim=1)
    for given in (wide[:, :256], x.t().contiguous().t(), wide[:, 1:257]):
        packed = torch.ops.inductor_sparse.linear_sparsify24(
            given, w1, None, "relu", "largest_abs"
        )
        _check(packed, _hidden(given, w1, None), "relu")


@pytest.mark.parametrize("tile", hopper.TILES, ids=str)
def test_energy_is_added_up(tile: TileConfig) -> None:
    x, w1, bias = _operands(400, 256, 712)
    energy = torch.ones(256, 2, dtype=torch.float64, device="cuda")
    values, _ = hopper.launch(tile, x, w1, bias, "relu2", energy)
    total = torch.relu(_hidden(x, w1, bias)).square().double().square().sum()
    expected = torch.stack((values.double().square().sum(), total)) + 256
    torch.testing.assert_close(energy.sum(0), expected, rtol=1e-5, atol=0)


# Said by torch itself while it autotunes.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("options", [{}, {"max_autotune": True}])
def test_compiled_with_tokens_of_any_number(options: dict[str, Any]) -> None:
    lowerings.register_all()
    _, w1, bias = _operands(1, 256, 8192)

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        op = torch.ops.inductor_sparse.linear_sparsify24
        return op(x * 2, w1, bias, "relu2", "largest")

    compiled = torch.compile(block, dynamic=True, options=options)
    for M in (1000, 520):
        x, _, _ = _operands(M, 256, 1)
        _check(compiled(x), _hidden(x * 2, w1, bias), "relu2")


def test_another_stream_and_a_cuda_graph() -> None:
    x, w1, _ = _operands(512, 256, 8192)

    def run() -> tuple[Tensor, Tensor]:
        return torch.ops.inductor_sparse.linear_sparsify24(
            x, w1, None, "relu2", "largest"
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = run()
    x.neg_()
    graph.replay()
    torch.cuda.synchronize()
    _check(packed, _hidden(x, w1, None), "relu2")
