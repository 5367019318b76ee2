"""Gated sites that are packed 2:4: who multiplies the gate, and in how many bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget, skip_where_int8_saturates
from row_quantization import FP8, WAYS, Quantized, product
from torch import Tensor, fx
from tracing import calls, rewrite, trace

from inductor_sparse.decisions import Decision, Status
from inductor_sparse.passes.fx_utils import VIEWS, peel
from inductor_sparse.profitability import cuda

pytestmark = pytest.mark.usefixtures("launched_by_cuda_graphs")

D, H = 4096, 11008
Function = Callable[..., Any]


def relu_glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * F.linear(x, up), down)


def relu2_glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up) * F.relu(F.linear(x, gate)).square(), down)


def biased(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = F.linear(x, gate, x.new_ones(len(gate)))
    u = F.linear(x, up, x.new_ones(len(up)))
    return F.linear(F.relu(g) * u, down, x.new_ones(len(down)))


def squeezed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g, u = (F.linear(x, w).unflatten(-1, (-1, 64)) for w in (gate, up))
    return F.linear((F.relu(g) * u).flatten(-2), down)


def regrouped(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = F.relu(F.linear(x, gate)).unflatten(-1, (-1, 64)).flatten(-2)
    return F.linear((g * F.linear(x, up)).unflatten(-1, (-1, 32)).flatten(-2), down)


def chunked(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, both).chunk(2, -1)
    return F.linear(F.relu(gate) * up, down)


def sliced(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    z, half = F.linear(x, both), len(both) // 2
    parts = [z.narrow(-1, start, half) for start in (0, half)]
    return F.linear(parts[1] * F.relu(parts[0]) ** 2, down)


@pytest.mark.parametrize("quantize", ["none", "fp8", "int8"])
@pytest.mark.parametrize("tokens", [(4096,), (2, 2048)], ids=str)
@pytest.mark.parametrize("fn", [chunked, sliced])
def test_parts_of_one_matmul_are_read_where_they_lie(
    fn: Function, tokens: tuple[int, ...], quantize: str
) -> None:
    shapes = (*tokens, D), (2 * H, D), (D, H)
    args = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes]
    gm = trace(fn, *args, device="cuda")
    options = {"quantize": quantize}
    context = {"architecture": lambda device: "sm_90", "options": options}
    (decision,) = rewrite(gm, static=[1, 2], **context).decisions
    assert decision.activation == ("relu*up" if fn is chunked else "relu2*up")
    assert "not quantized" not in decision.detail
    name = "sparsify24" if quantize == "none" else "sparsify24_quantized"
    (packed,) = calls(gm, name)
    assert len(calls(gm, "quantize_rows")) == (quantize != "none")
    if quantize == "int8":
        assert packed.args[1] == "identity"
        return
    assert packed.args[1] == decision.activation.partition("*")[0]
    assert isinstance(packed.kwargs["up"], fx.Node)
    assert calls(gm, "mul") == []


def run(
    fn: Function,
    tokens: tuple[int, ...] = (4096,),
    sizes: tuple[int, int] = (D, H),
    dtype: torch.dtype = torch.bfloat16,
    **options: str,
) -> tuple[fx.GraphModule, Decision]:
    features, hidden = sizes
    shapes = [(*tokens, features), *[(hidden, features)] * 2, (features, hidden)]
    args = [torch.empty(s, dtype=dtype, device="meta") for s in shapes]
    gm = trace(fn, *args, device="cuda")
    context = {"architecture": lambda device: "sm_90", "options": options}
    (decision,) = rewrite(gm, static=[1, 2, 3], **context).decisions
    return gm, decision


@pytest.mark.parametrize("tokens", [(4096,), (2, 2048)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fn", [relu_glu, relu2_glu, biased, squeezed, regrouped])
def test_the_gate_is_multiplied_where_it_is_packed(
    fn: Function, dtype: torch.dtype, tokens: tuple[int, ...]
) -> None:
    gm, decision = run(fn, tokens, dtype=dtype)
    (packed,) = calls(gm, "sparsify24")
    activation = "relu2" if fn is relu2_glu else "relu"
    assert packed.args[1:3] == (activation, "largest_abs")
    assert isinstance(packed.kwargs["up"], fx.Node)
    assert packed.args[3] is calls(gm, "site_energy")[0]
    assert calls(gm, "relu") == calls(gm, "mul") == []
    name = str(dtype).removeprefix("torch.")
    gain = cuda.prefill_gain(4096, H, D, name, graphs=True, gated=True)
    assert decision.expected_gain == gain


def small(fn: Function, tokens: tuple[int, ...]) -> list[Tensor]:
    """Arguments of which few gates of four are open, so that nothing is dropped."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(128, 64), (128, 64)] if fn not in (chunked, sliced) else [(256, 64)]
    x, first, *others = (
        torch.randn(size, generator=generator).bfloat16()
        for size in ((*tokens, 64), *shapes, (64, 128))
    )
    first[:128:2] = -first[:128:2].abs() - 1
    return [x.abs(), first, *others]


EVERY = [relu_glu, relu2_glu, squeezed, regrouped, chunked, sliced]


@pytest.mark.parametrize("tokens", [(70,), (2, 35)], ids=str)
@pytest.mark.parametrize("fn", EVERY)
@pytest.mark.parametrize("quantize", ["none", "fp8", "int8"])
def test_it_computes_the_same(
    quantize: str, fn: Function, tokens: tuple[int, ...]
) -> None:
    if quantize == "int8":
        skip_where_int8_saturates()
    given = small(fn, tokens)
    gm = trace(fn, *given, device="cuda")
    options = {"activation_format": "2:4", "quantize": quantize}
    context = {"architecture": lambda device: "sm_90", "options": options}
    (decision,) = rewrite(gm, static=range(1, len(given)), **context).decisions
    assert decision.status is Status.APPLIED
    assert "not quantized" not in decision.detail
    exact = fn(*(one.double() for one in given))
    if quantize == "none":
        assert_within_budget(gm(*given), fn(*given), exact)
    else:
        found = gm(*given).double()
        assert 1e-4 < (found - exact).norm() / exact.norm() < 0.08


def read_elsewhere(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Any:
    h = F.relu(F.linear(x, gate)) * F.linear(x, up)
    return F.linear(h, down), h.sum()


def both_rectified(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * F.relu(F.linear(x, up)), down)


def computed_gate(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate) - 0.5) * F.linear(x, up), down)


def wider_gate(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.relu(F.linear(x, gate).float()) * F.linear(x, up).float()
    return F.linear(h.bfloat16(), down)


def scaled(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * F.linear(x, up) * 2, down)


def viewed_and_scaled(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.relu(F.linear(x, gate)) * F.linear(x, up)
    return F.linear((h.unflatten(-1, (-1, 64)) * 2).flatten(-2), down)


@pytest.mark.parametrize(
    "fn",
    [
        *(read_elsewhere, both_rectified, computed_gate, wider_gate, scaled),
        viewed_and_scaled,
    ],
)
def test_what_is_written_anyway_is_packed_from_there(fn: Function) -> None:
    gm, decision = run(fn)
    (packed,) = calls(gm, "sparsify24")
    assert packed.args[1:3] == ("identity", "largest_abs")
    assert packed.kwargs == {}
    gain = cuda.prefill_gain(
        *(4096, H, D, "bfloat16"), graphs=True, replaces_activation=False
    )
    assert decision.expected_gain == gain


def test_a_gate_of_integers_is_multiplied_before() -> None:
    def fn(g: Tensor, mask: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.relu(g) * mask, down)

    g, down = (
        torch.empty(n, H, dtype=torch.bfloat16, device="meta") for n in (4096, D)
    )
    mask = torch.empty(4096, H, dtype=torch.int32, device="meta")
    gm = trace(fn, g, mask, down, device="cuda")
    record = rewrite(gm, static=[2], architecture=lambda device: "sm_90")
    assert len(record.applied) == 1
    assert calls(gm, "sparsify24")[0].args[1] == "identity"


@pytest.mark.parametrize("quantize", ["none", "fp8", "int8"])
@pytest.mark.parametrize("tokens", [(4096,), (2, 2048)], ids=str)
def test_two_matmuls_share_what_is_packed(
    tokens: tuple[int, ...], quantize: str
) -> None:
    def fn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, other: Tensor) -> Tensor:
        h = F.relu(F.linear(x, gate)) * F.linear(x, up)
        return F.linear(h, down) + F.linear(h, other)

    args = [(*tokens, D), (H, D), (H, D), (D, H), (D, H)]
    given = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in args]
    gm = trace(fn, *given, device="cuda")
    record = rewrite(
        gm,
        static=[1, 2, 3, 4],
        architecture=lambda device: "sm_90",
        options={"quantize": quantize},
    )
    assert len(record.applied) == len(calls(gm, "sparse24_mm")) == 2
    gains = [decision.expected_gain for decision in record.applied]
    assert min(gains) > 1.5 or max(gains) < 1.5
    assert (min(gains) > 1.5) == (quantize != "none")
    packing = "sparsify24" if quantize == "none" else "sparsify24_quantized"
    assert len(calls(gm, packing)) == 1
    assert len(calls(gm, "quantize_rows")) == (quantize != "none")


@pytest.mark.parametrize("tokens", [(4096,), (2, 2048)], ids=str)
@pytest.mark.parametrize("fn", [relu_glu, relu2_glu, biased, squeezed, regrouped])
@pytest.mark.parametrize(
    ("quantize", "first"), [("fp8", "_scaled_mm"), ("int8", "_int_mm")]
)
def test_all_three_matmuls_run_in_8_bits(
    fn: Function, quantize: str, first: str, tokens: tuple[int, ...]
) -> None:
    gm, decision = run(fn, tokens, quantize=quantize)
    assert "not quantized" not in decision.detail
    assert decision.weight_copy_bytes == 3 * D * H + 4 * (2 * H + D)
    assert len(calls(gm, first)) == 2
    assert len(calls(gm, "quantize_rows")) == 1
    assert len(calls(gm, "quantized_weight")) == 3
    assert calls(gm, "mm") == calls(gm, "addmm") == calls(gm, "sparsify24") == []
    (packed,) = calls(gm, "sparsify24_quantized")
    # Products of int8 are scaled by a kernel, which may as well multiply the gate.
    assert ("up" in packed.kwargs) == (quantize == "fp8")
    assert (packed.args[1] == "identity") == (quantize == "int8")


@pytest.mark.parametrize("other", [torch.sum, lambda u: u * 3, torch.relu])
def test_up_that_something_else_reads_is_not_quantized(other: Function) -> None:
    def fn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Any:
        u = F.linear(x, up)
        return F.linear(F.relu(F.linear(x, gate)) * u, down), other(u)

    gm, decision = run(fn, quantize="fp8")
    why = "; not quantized: the layer before the activation is read by something else"
    assert decision.detail.endswith(why)
    assert len(calls(gm, "sparsify24")) == 1


def test_scales_of_a_gated_product_are_not_predicted() -> None:
    gm, decision = run(relu_glu, quantize="fp8", quantize_scales="predicted")
    assert decision.detail.endswith("; scales not predicted: the activation is a gate")
    assert len(calls(gm, "sparsify24_quantized")) == 1


@pytest.mark.parametrize("tokens", [(4096,), (2, 2048)], ids=str)
@pytest.mark.parametrize("quantize", WAYS)
def test_a_product_that_was_quantized_before(
    quantize: Callable[[Tensor], Quantized], tokens: tuple[int, ...]
) -> None:
    def fn(g: Tensor, u: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return product(*quantize(F.relu(g) ** 2 * u), w, t)

    g = torch.empty(*tokens, H, dtype=torch.bfloat16, device="meta")
    w = torch.empty(D, H, dtype=FP8, device="meta")
    gm = trace(fn, g, g, w, torch.empty(1, D, device="meta"), device="cuda")
    context = {"architecture": lambda device: "sm_90"}
    (decision,) = rewrite(gm, static=[2, 3], **context).decisions
    (packed,) = calls(gm, "sparsify24_quantized")
    assert packed.args[1:4] == ("relu2", "largest_abs", FP8)
    up = packed.kwargs["up"]
    assert isinstance(up, fx.Node) and up.meta["val"].shape == (4096, H)
    assert peel(up, VIEWS)[0] is gm.graph.find_nodes(op="placeholder")[1]
    gain = cuda.prefill_gain(4096, H, D, "float8_e4m3fn", graphs=True, gated=True)
    assert decision.expected_gain == gain


def test_a_scaled_product_that_was_quantized_is_written_before() -> None:
    def fn(g: Tensor, u: Tensor, w: Tensor, t: Tensor) -> Tensor:
        h = (F.relu(g) * u).neg().neg() * u.narrow(1, 0, 1)
        return product(*WAYS[0](h), w, t)

    g = torch.empty(4096, H, dtype=torch.bfloat16, device="meta")
    w = torch.empty(D, H, dtype=FP8, device="meta")
    gm = trace(fn, g, g, w, torch.empty(1, D, device="meta"), device="cuda")
    rewrite(gm, static=[2, 3], architecture=lambda device: "sm_90")
    (packed,) = calls(gm, "sparsify24_quantized")
    assert packed.args[1] == "identity"
