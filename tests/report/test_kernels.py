"""The kernel of a 2:4 site on a GPU: its name, its rate, and what is said of both."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import inductor_sparse.ops  # noqa: F401 (registers the ops)
from inductor_sparse import profitability, reference
from inductor_sparse.decisions import Decision, GraphDecisions, Status, Tier
from inductor_sparse.passes.sites import SITE_KEY
from inductor_sparse.report import kernels, table
from inductor_sparse.report.explain import _with_stats
from inductor_sparse.report.kernels import KernelUse
from inductor_sparse.report.measure import (
    MeasuredGraph,
    MeasuringInterpreter,
    SiteStats,
    packed_by,
)

ops = torch.ops.inductor_sparse

PACKED = Decision(
    module="down",
    source="ffn.py:3",
    rule="relu_squared_matmul",
    tier=Tier.APPROXIMATE,
    status=Status.APPLIED,
    reason=None,
    detail="",
    shapes={"M": 8192, "K": 8192, "N": 8192},
    dtype="bfloat16",
    device="cuda",
    expected_gain=1.3,
    arch="sm_90",
)


PACKED_BY = {
    "packed": "sparsify24",
    "quantized": "sparsify24_quantized",
    "linear": "linear_sparsify24",
    "both": "linear_sparsify24_quantized",
}


def measured(gm: fx.GraphModule, *args: torch.Tensor) -> dict[str, SiteStats]:
    """Run a graph whose 2:4 products are sites, numbered in their order."""
    nodes = gm.graph.find_nodes(op="call_function", target=ops.sparse24_mm.default)
    for i, node in enumerate(nodes):
        node.meta[SITE_KEY] = str(i)
    graph = MeasuredGraph(GraphDecisions("g"))
    MeasuringInterpreter(gm, graph).run(*args)
    return graph.stats


@pytest.mark.parametrize("kind", ["packed", "quantized", "linear", "both"])
def test_a_packed_site_is_measured_before_packing(kind: str) -> None:
    x, w = torch.randn(64, 64).bfloat16(), torch.randn(64, 32).bfloat16()
    if kind == "both":
        x = x.to(torch.float8_e4m3fn).bfloat16()
    w1 = torch.eye(64).bfloat16()

    def product(x: torch.Tensor, w: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
        if kind == "linear":
            packed = ops.linear_sparsify24(x, w1, None, "relu2", "largest")
        elif kind == "packed":
            packed = ops.sparsify24(x, "relu2", "largest")
        elif kind == "both":
            e4m3, ones = torch.float8_e4m3fn, torch.ones(64)
            layer = (x.to(e4m3), ones, w1.to(e4m3), ones, None)
            packed = ops.linear_sparsify24_quantized(*layer, ones, "relu2", "largest")
            return ops.sparse24_mm(*packed, w.to(e4m3), ones)
        else:
            packed = ops.sparsify24_quantized(x, "relu2", "largest", torch.int8)
            return ops.sparse24_mm(*packed[:2], w.to(torch.int8), packed[2])
        return ops.sparse24_mm(*packed, w)

    gm = make_fx(product)(x, w, w1)
    stats = measured(gm, x, w, w1)["0"]
    (product,) = gm.graph.find_nodes(op="call_function", target=ops.sparse24_mm.default)
    assert packed_by(product) == PACKED_BY[kind]
    activation = reference.activation(x, "relu2")
    assert stats.density == activation.count_nonzero().item() / activation.numel()
    assert stats.dropped_energy == pytest.approx(
        reference.dropped_energy(activation, "identity", "largest_abs")
    )
    assert stats.kernel is None


def test_two_products_of_one_packed_activation() -> None:
    def products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        values, metadata = ops.sparsify24(x, "relu2", "largest")
        first = ops.sparse24_mm(values, metadata, w)
        return first + ops.sparse24_mm(values, metadata, w * 2)

    x, w = torch.randn(64, 64).bfloat16(), torch.randn(64, 32).bfloat16()
    stats = measured(make_fx(products)(x, w), x, w)
    assert stats["0"] == stats["1"]


@pytest.mark.parametrize(
    ("arch", "M", "name"),
    [
        ("sm_90", 8192, "sparse24_mm_bf16 256x192 cluster 2 stages 4"),
        ("sm_90", 0, "masked dense"),
        ("sm_80", 8192, "cutlass"),
        ("sm_75", 8192, "masked dense"),
    ],
)
def test_names(arch: str, M: int, name: str) -> None:
    values = torch.empty(M, 4096, dtype=torch.bfloat16, device="meta")
    w = torch.empty(8192, 8192, dtype=torch.bfloat16, device="meta").t()
    assert kernels.name(values, w, arch, 132) == name


def test_a_product_that_the_vendor_refuses_is_named_dense() -> None:
    values = torch.empty(512, 4096, dtype=torch.bfloat16, device="meta")
    w = torch.empty(8192, 8192, dtype=torch.bfloat16, device="meta").t()
    assert kernels.name(values, w, "sm_80", 108, scaled=True) == "masked dense"
    assert kernels.name(values, w[:, :-1], "sm_80", 108) == "masked dense"


def test_peaks_are_those_of_the_data_sheets() -> None:
    assert kernels.dense_peak("sm_90", torch.bfloat16, 132) == pytest.approx(989.4)
    assert kernels.dense_peak("sm_90", torch.int8, 132) == pytest.approx(1978.8)
    assert kernels.dense_peak("sm_80", torch.float16, 108) == pytest.approx(312)
    assert kernels.dense_peak("gfx942", torch.float16, 304) is None


def explained(used: KernelUse) -> Decision:
    stats = SiteStats(elements=100, nonzeros=10, tokens=8, calls=1, kernel=used)
    return _with_stats(PACKED, stats)


def test_a_decision_says_how_near_the_peak_it_comes() -> None:
    decision = explained(KernelUse("sparse24_mm_bf16 128x256", 1131.0, 1000.0, 2000.0))
    assert decision.tflops == 1131.0
    assert decision.of_dense_peak == pytest.approx(1.131)
    assert decision.of_sparse_peak == pytest.approx(0.5655)
    assert decision.expected_gain == 1.3
    assert table.row(decision).note == (
        "ffn.py:3, relu_squared_matmul (approximate), sparse24_mm_bf16 128x256: "
        "1131 TFLOP/s, 113 % of the dense and 57 % of the sparse peak"
    )


def test_a_decision_names_both_kernels() -> None:
    decision = explained(KernelUse("cusparselt", 99.6, packed_by="sparsify24"))
    assert table.row(decision).note.endswith("sparsify24, cusparselt: 100 TFLOP/s")


def test_a_device_without_a_known_peak() -> None:
    decision = explained(KernelUse("cusparselt", 99.6))
    assert decision.of_dense_peak is None
    assert table.row(decision).note.endswith("cusparselt: 100 TFLOP/s")


def test_the_gain_of_few_tokens_on_a_gpu_follows_the_density() -> None:
    decode = dataclasses.replace(
        PACKED,
        tier=Tier.EXACT,
        shapes={"M": 1, "K": 16384, "N": 4096},
        cuda_graphs=True,
    )
    gains = [
        _with_stats(
            decode, SiteStats(elements=100, nonzeros=n, tokens=1, calls=1)
        ).expected_gain
        for n in (5, 50)
    ]
    assert gains[0] is not None
    assert gains[1] is not None
    assert gains[0] > 2 * gains[1]


@pytest.mark.parametrize("graphs", [False, True])
def test_the_gain_of_a_gated_site_is_that_of_both_products(graphs: bool) -> None:
    gain = functools.partial(
        profitability.cuda.decode_gain,
        *(1, 28672, 8192, "bfloat16"),
        gated=True,
        graphs=graphs,
    )
    decode = dataclasses.replace(
        PACKED,
        op="glu_spmm",
        tier=Tier.EXACT,
        shapes={"M": 1, "K": 28672, "N": 8192},
        expected_gain=gain(None),
        cuda_graphs=graphs,
    )
    stats = SiteStats(elements=100, nonzeros=20, tokens=1, calls=1)
    assert _with_stats(decode, stats).expected_gain == gain(0.2)


def test_the_gain_is_that_of_the_launches_that_were_assumed() -> None:
    # Half of this weight takes longer than any launch, a hundredth of it does not.
    gain = functools.partial(
        profitability.cuda.decode_gain, 1, 53248, 16384, "bfloat16"
    )
    assert gain(0.5) == gain(0.5, graphs=False)
    assert gain(0.01) > gain(0.01, graphs=False)
    decode = dataclasses.replace(
        PACKED,
        op="activation_spmm",
        tier=Tier.EXACT,
        shapes={"M": 1, "K": 53248, "N": 16384},
        density=0.5,
        expected_gain=gain(0.5),
        cuda_graphs=True,
    )
    stats = SiteStats(elements=100, nonzeros=1, tokens=1, calls=1)
    assert _with_stats(decode, stats).expected_gain == gain(0.01)
