"""What is measured at a site: density and 2:4 loss of the operand really multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import inductor_sparse.ops  # noqa: F401 (registers the ops)
from inductor_sparse import reference
from inductor_sparse.decisions import GraphDecisions
from inductor_sparse.passes.sites import SITE_KEY
from inductor_sparse.report import measure
from inductor_sparse.report.measure import (
    MeasuredGraph,
    MeasuringInterpreter,
    SiteStats,
)

ops = torch.ops.inductor_sparse
aten = torch.ops.aten


def run_measured(
    fn: Callable[..., Tensor], target: Any, *args: Any
) -> tuple[Any, SiteStats]:
    """Trace ``fn``, mark every ``target`` node as the site "s", run it."""
    gm: fx.GraphModule = make_fx(fn)(*args)
    for node in gm.graph.find_nodes(op="call_function", target=target):
        node.meta[SITE_KEY] = "s"
    measured = MeasuredGraph(GraphDecisions("g"))
    result = MeasuringInterpreter(gm, measured).run(*args)
    return result, measured.stats["s"]


Z = torch.tensor([[1.0, -1.0, 2.0, 3.0], [-1.0, -2.0, -3.0, 0.0]])
W = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("fn", "target"),
    [
        (lambda z, w: torch.relu(z).square() @ w, aten.mm.default),
        (lambda z, w: torch.addmm(w[0], z.relu() ** 2, w), aten.addmm.default),
        (
            lambda z, w: ops.activation_spmm(z, w, "relu2"),
            ops.activation_spmm.default,
        ),
        (lambda z, w: torch.bmm(z[None].relu() ** 2, w[None])[0], aten.bmm.default),
        (
            lambda z, w: torch.baddbmm(w[None, :1], z[None].relu() ** 2, w[None])[0],
            aten.baddbmm.default,
        ),
    ],
)
def test_operand_of_every_kind_of_site(fn: Callable[..., Tensor], target: Any) -> None:
    result, stats = run_measured(fn, target, Z, W)
    torch.testing.assert_close(result, fn(Z, W))
    assert stats.density == 3 / 8
    assert (stats.tokens, stats.calls, stats.max_density) == (2, 1, 3 / 8)
    # 1, 4 and 9 in one group of four: the smallest is dropped.
    assert stats.dropped_energy == pytest.approx(1 / (1 + 16 + 81))
    assert stats.max_dropped == stats.dropped_energy


def test_gated_site_measures_the_product_of_open_neurons() -> None:
    gate = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    x = torch.tensor([[1.0, 0.0]])
    w_up = torch.tensor([[2.0, 0.0], [math.inf, math.inf], [0.0, 5.0], [1.0, 1.0]])
    _, stats = run_measured(
        lambda g, x, u, d: ops.glu_spmm(g, x, u, d, "relu"),
        ops.glu_spmm.default,
        *(gate, x, w_up, W),
    )
    assert stats.density == 1 / 4
    assert stats.dropped_energy == 0.0


@pytest.mark.parametrize("quantized", [(), (torch.int8,)], ids=["16 bits", "8 bits"])
def test_a_packed_gate_is_measured_with_its_factor(
    quantized: tuple[torch.dtype, ...],
) -> None:
    def fn(z: Tensor, up: Tensor, w: Tensor) -> Tensor:
        op = ops.sparsify24_quantized if quantized else ops.sparsify24
        values, words, *scale = op(z, "relu", "largest_abs", *quantized, up=up)
        w = w.to(*quantized) if quantized else w
        return ops.sparse24_mm(values, words, w, *scale)

    up = torch.tensor([[0.0, 9.0, 0.0, -2.0]] * 2)
    _, stats = run_measured(fn, ops.sparse24_mm.default, Z, up, W)
    _, expected = run_measured(
        lambda z, up, w: (z.relu() * up) @ w, aten.mm.default, Z, up, W
    )
    assert stats == expected
    _, alone = run_measured(lambda z, w: z.relu() @ w, aten.mm.default, Z, W)
    assert stats != alone


def test_row_major_weight_is_viewed_not_copied() -> None:
    weight = torch.randn(3, 4)

    def down(z: Tensor, weight: Tensor) -> Tensor:
        w = ops.row_major_weight(weight, [4, 3], [1, 4], 0, torch.float32)
        return ops.activation_spmm(z, w, "relu2")

    gm = make_fx(down)(Z, weight)
    interpreter = MeasuringInterpreter(gm, MeasuredGraph(GraphDecisions("g")))
    (node,) = gm.graph.find_nodes(
        op="call_function", target=ops.row_major_weight.default
    )
    args = (weight, [4, 3], [1, 4], 0, torch.float32)
    view = interpreter.call_function(node.target, args, {})
    assert view.data_ptr() == weight.data_ptr()
    torch.testing.assert_close(interpreter.run(Z, weight), down(Z, weight))


def test_stats_add_up_over_calls_and_graphs() -> None:
    first, second = SiteStats(), SiteStats()
    first.add(torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    second.add(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    first.merge(second)
    assert first.density == 5 / 12
    assert first.max_density == 1.0
    assert first.dropped_energy == pytest.approx(2 / 5)
    assert first.max_dropped == 0.5
    assert (first.calls, first.tokens) == (2, 3)


@pytest.mark.parametrize(
    ("operand", "density", "dropped"),
    [
        (torch.zeros(2, 8), 0.0, 0.0),
        (torch.empty(0, 8), None, None),
        (torch.empty(2, 0), None, None),
        (torch.tensor([[math.nan, 0.0, 0.0, 0.0]]), 0.25, None),
        (torch.tensor([[math.inf, 1.0, 0.0, 0.0]]), 0.5, None),
        (torch.tensor([[1, 0, 0, 0]]), 0.25, None),
        (torch.tensor([[1.0, -0.0, 1.0]]), 2 / 3, 0.0),
    ],
)
def test_unusual_operands(
    operand: Tensor, density: float | None, dropped: float | None
) -> None:
    stats = SiteStats()
    stats.add(operand)
    assert (stats.density, stats.dropped_energy) == (density, dropped)
    assert stats.calls == 1


def test_large_operands_are_sampled_by_whole_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operand = torch.randn(100, 64).relu()
    monkeypatch.setattr(measure, "ENERGY_SAMPLE", 10 * 64)
    stats = SiteStats()
    stats.add(operand)
    expected = reference.dropped_energy(operand[::10], "identity", "largest_abs")
    assert stats.dropped_energy == pytest.approx(expected)
    assert stats.density == reference.density(operand)
    monkeypatch.setattr(measure, "ENERGY_SAMPLE", 1)
    stats.add(operand)
    assert stats.calls == 2
