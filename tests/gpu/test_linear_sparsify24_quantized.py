"""``linear_sparsify24_quantized`` on Hopper: the bits of the definition.

Sums of small integers are exact, so that every kernel rounds the same numbers.

Shape legend: ``M`` tokens, ``D`` features of the model, ``K`` neurons.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inductor_sparse import formats, lowerings, ops, reference
from inductor_sparse.lowerings import linear_sparsify24_kernel as hopper
from inductor_sparse.lowerings.linear_sparsify24_kernel import TileConfig

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
OP = torch.ops.inductor_sparse.linear_sparsify24_quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]


def _powers(n: int, low: int, high: int) -> Tensor:
    return 2.0 ** torch.randint(low, high, (n,), device="cuda").float()


def _operands(M: int, D: int, K: int) -> dict[str, Any]:
    """Small integers, scaled by powers of two; row scales that are no powers."""
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (M, D), device="cuda").float()
    w1 = torch.randint(-1, 2, (K, D), device="cuda").float()
    w1 *= torch.rand(K, D, device="cuda") < 64 / D
    return {
        "x": x.to(E4M3),
        "x_scale": _powers(M, -3, 3),
        "w1": w1.to(E4M3),
        "w1_scale": _powers(K, -1, 2),
        "bias": torch.randint(-3, 4, (K,), device="cuda").to(BF16),
        "row_scale": torch.rand(M, device="cuda") * 3 + 1e-3,
    }


def _launch(
    tile: TileConfig, given: dict[str, Any], activation: str, energy: Tensor | None
) -> tuple[Tensor, Tensor]:
    scales = given["x_scale"], given["w1_scale"], given["row_scale"]
    x, w1 = given["x"], given["w1"]
    return hopper.launch(tile, x, w1, given["bias"], activation, energy, scales)


def _check(
    packed: tuple[Tensor, Tensor], given: dict[str, Any], activation: str
) -> None:
    values, metadata = packed
    expected, index = reference.linear_sparsify24_quantized(
        **given, activation=activation, select="largest"
    )
    same = values.view(torch.uint8) == expected.view(torch.uint8)
    nan = values.float().isnan() & expected.float().isnan()
    wrong = (~(same | nan)).nonzero()
    assert not len(wrong), (len(wrong), wrong[:4].tolist())
    assert torch.equal(metadata, formats.pack_index(index, E4M3))


@pytest.mark.parametrize("tile", hopper.TILES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize(
    ("M", "D", "K"),
    [(1, 80, 100), (300, 208, 712), (777, 528, 1000), (2048, 128, 512), (65, 16, 4)],
)
def test_any_size(M: int, D: int, K: int, activation: str, tile: TileConfig) -> None:
    given = _operands(M, D, K)
    assert hopper.refusal(given["x"], given["w1"], activation) is None
    for bias in (None, given["bias"]):
        with_bias = {**given, "bias": bias}
        packed = _launch(tile, with_bias, activation, None)
        _check(packed, with_bias, activation)


def test_many_tiles_of_one_cta() -> None:
    given = _operands(4096, 256, 8192)
    _check(OP(*given.values(), "relu2", "largest"), given, "relu2")


def test_numbers_of_every_size_and_ties() -> None:
    """One feature: neurons in steps of 1/8, and row scales from 2**-2 to 2**13."""
    steps = torch.arange(1, 2049, device="cuda").float() / 8
    given = _operands(64, 16, 4096)
    x = torch.zeros(64, 16, device="cuda")
    x[:, 0] = 1
    w1 = torch.zeros(4096, 16, device="cuda")
    w1[::2, 0] = 1  # two of each four: nothing is dropped
    given |= {"x": x.to(E4M3), "w1": w1.to(E4M3), "bias": None}
    scale = torch.ones(4096, device="cuda")
    scale[::2] = steps
    ones = torch.ones(64, device="cuda")
    given |= {"w1_scale": scale, "x_scale": ones}
    given["row_scale"] = (
        2.0 ** torch.arange(-6, 58, device="cuda").float().div(4).floor()
    )
    _check(OP(*given.values(), "relu", "largest"), given, "relu")


def test_what_is_not_finite() -> None:
    given = _operands(130, 128, 328)
    given["x_scale"][3], given["x_scale"][129] = torch.nan, torch.inf
    given["row_scale"][5], given["row_scale"][64] = torch.nan, torch.inf
    given["row_scale"][7] = 2.0**-118
    for bias in (None, given["bias"]):
        with_bias = {**given, "bias": bias}
        packed = _launch(TileConfig(), with_bias, "relu2", None)
        _check(packed, with_bias, "relu2")


@pytest.mark.parametrize("tile", hopper.TILES, ids=str)
def test_energy_is_that_of_the_wide_values(tile: TileConfig) -> None:
    given = _operands(400, 256, 712)
    energy = torch.ones(256, 2, dtype=torch.float64, device="cuda")
    _launch(tile, given, "relu2", energy)
    z = reference.scaled_linear(*(given[n] for n in list(given)[:5]))
    a = reference.ACTIVATIONS["relu2"](z)
    kept, _ = reference.sparsify24(z, "relu2", "largest")
    sums = [t.double().square().sum() for t in (kept, a)]
    expected = torch.stack(sums) + 256
    torch.testing.assert_close(energy.sum(0), expected, rtol=1e-5, atol=0)


def test_it_agrees_with_the_product_and_the_packing() -> None:
    """Random data: the same scale, and sums that differ in their last bits only."""
    torch.manual_seed(0)
    M, D, K = 1024, 4096, 8192
    x8, x_scale = reference.quantize_rows(torch.randn(M, D, device="cuda"), E4M3)
    w8, w_scale = reference.quantize_rows(torch.randn(K, D, device="cuda"), E4M3)
    column, row = x_scale[:, None], w_scale[None]
    z = torch._scaled_mm(x8, w8.t(), column, row, out_dtype=BF16, use_fast_accum=True)
    *pair, scale = torch.ops.inductor_sparse.sparsify24_quantized(
        z, "relu2", "largest", E4M3
    )
    packed = OP(x8, x_scale, w8, w_scale, None, scale, "relu2", "largest")
    dense, expected = (formats.unpack(*p, K).float() for p in (packed, pair))
    assert (dense - expected).norm() < 0.02 * expected.norm()
    assert (packed[1] != pair[1]).float().mean() < 0.05


def test_compiled_with_tokens_of_any_number() -> None:
    lowerings.register_all()
    compiled = torch.compile(
        lambda given: OP(*given.values(), "relu2", "largest"), dynamic=True
    )
    for M in (1000, 520):
        given = _operands(M, 256, 8192)
        _check(compiled(given), given, "relu2")


def test_another_stream_and_a_cuda_graph() -> None:
    given = _operands(512, 256, 8192)

    def run() -> tuple[Tensor, Tensor]:
        return OP(*given.values(), "relu2", "largest")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = run()
    given["x_scale"].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    _check(packed, given, "relu2")


def test_what_the_kernel_refuses_is_computed_by_the_definition() -> None:
    given = _operands(64, 100, 512)
    assert hopper.refusal(given["x"], given["w1"], "relu") is not None
    _check(OP(*given.values(), "relu", "largest"), given, "relu")
    signed = OP(*given.values(), "identity", "largest_abs")
    expected = ops.linear_sparsify24_quantized(
        *given.values(), "identity", "largest_abs"
    )
    assert torch.equal(signed[1], expected[1])
