"""Graphs for GPUs: what is shared, observed, guarded, and refused for its layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from tracing import calls, rewrite, trace

from inductor_sparse import profitability
from inductor_sparse.decisions import GraphDecisions, Reason, Status
from inductor_sparse.plan import Plan, SitePlan

pytestmark = pytest.mark.usefixtures("launched_by_cuda_graphs")

K, N = 16384, 4096
MANY = profitability.cuda.prefill_min_tokens(K, N, "bfloat16", graphs=True)


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def decide(
    fn: Any, *args: Tensor, **context: Any
) -> tuple[fx.GraphModule, GraphDecisions]:
    gm = trace(fn, *args, device="cuda")
    context.setdefault("static", range(1, len(args)))
    context.setdefault("architecture", lambda device: "sm_90")
    return gm, rewrite(gm, **context)


def test_two_matmuls_share_one_pack() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h = F.relu(x) ** 2
        return F.linear(h, w) + F.linear(h, v)

    x = empty(2, 1024, K)
    gm, record = decide(fn, x, empty(N, K), empty(N, K))
    assert [d.op for d in record.decisions] == ["sparse24_mm", "sparse24_mm"]
    assert len(calls(gm, "sparsify24")) == len(calls(gm, "site_energy")) == 1


def test_activation_with_another_reader() -> None:
    def fn(x: Tensor, w: Tensor) -> Any:
        h = F.relu(x) ** 2
        return F.linear(h, w), h

    gm, record = decide(fn, empty(2048, K), empty(N, K))
    (decision,) = record.applied
    assert decision.op == "sparse24_mm"
    assert len(calls(gm, "pow")) == 1
    _, alone = decide(lambda x, w: fn(x, w)[0], empty(2048, K), empty(N, K))
    # The dense activation is written all the same, so that packing costs extra.
    assert alone.applied[0].expected_gain > decision.expected_gain


def up_down(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)) ** 2, down)


def up_down_biased(x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up, bias)), down)


def up_down_twice(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = F.relu(F.linear(x, up)) ** 2
    return F.linear(h, down) + F.linear(h, down * 2)


@pytest.mark.parametrize("x", [empty(2048, N), empty(2, 1024, N)], ids=["2d", "3d"])
@pytest.mark.parametrize("fn", [up_down, up_down_biased])
def test_a_linear_layer_is_packed_where_it_is_computed(fn: Any, x: Tensor) -> None:
    args = [x, empty(K, N), empty(N, K), empty(K)][: fn.__code__.co_argcount]
    gm, record = decide(fn, *args)
    assert [d.op for d in record.applied] == ["sparse24_mm"]
    (packed,) = calls(gm, "linear_sparsify24")
    assert packed.args[1].op == "placeholder"  # the weight as it is stored
    assert (packed.args[2] is not None) == (fn is up_down_biased)
    assert packed.args[5] is calls(gm, "site_energy")[0]
    assert calls(gm, "mm") == calls(gm, "addmm") == calls(gm, "sparsify24") == []


def test_a_linear_layer_that_others_read_is_computed_apart() -> None:
    args = empty(2048, N), empty(K, N), empty(N, K)
    gm, record = decide(up_down_twice, *args)
    assert len(record.applied) == 2
    assert calls(gm, "linear_sparsify24") == []
    assert len(calls(gm, "mm")) == len(calls(gm, "sparsify24")) == 1


def square_relu(x: Tensor, w1: Tensor) -> Tensor:
    return F.relu(x @ w1) ** 2


@pytest.mark.parametrize(
    "layer",
    [
        lambda x, w1, w2, b: F.relu(x @ w1.permute(0, 1)) ** 2 @ w2,
        lambda x, w1, w2, b: F.relu(x @ w1.permute(-1, 0)) ** 2 @ w2,
        lambda x, w1, w2, b: square_relu(x, w1).t() @ w2,
        lambda x, w1, w2, b: F.relu((x @ w1).t()) ** 2 @ w2,
        lambda x, w1, w2, b: (
            square_relu(x, w1).view(-1, 8, 8).transpose(1, 2).reshape(64, 64) @ w2
        ),
        lambda x, w1, w2, b: square_relu(x, w1).view(4, 1024).view(64, 64) @ w2,
        lambda x, w1, w2, b: F.relu(torch.addmm(b.narrow(0, 0, 1), x, w1)) ** 2 @ w2,
        lambda x, w1, w2, b: F.relu(torch.addmm(b, x, w1)) ** 2 @ w2,
        lambda x, w1, w2, b: F.relu(torch.addmm(b.unsqueeze(1), x, w1)) ** 2 @ w2,
    ],
    ids=[
        *("not transposed", "transposed", "rows are columns", "relu of columns"),
        *("channel shuffle", "viewed", "one bias", "bias", "bias by token"),
    ],
)
def test_numbers_of_layers_that_may_be_packed_where_they_are_computed(
    layer: Any,
) -> None:
    x, w1, w2 = (torch.randn(64, 64).bfloat16() for _ in range(3))
    # At most two of four neighbours are active: of a row, a column, or a shuffled row.
    i, j = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    w1 = torch.where((i + j + j // 8) % 2 == 0, w1, 0)
    x = torch.where(torch.eye(64, dtype=torch.bool), x, 0)
    bias = -torch.rand(64).bfloat16()
    gm = trace(layer, x, w1, w2, bias, device="cuda")
    forced = {"activation_format": "2:4"}
    record = rewrite(gm, static=[1, 2], options=forced, architecture=lambda d: "sm_90")
    assert len(record.applied) == 1
    assert_within_budget(
        gm(x, w1, w2, bias).float(),
        layer(x, w1, w2, bias).float(),
        layer(*(t.double() for t in (x, w1, w2, bias))),
    )


def test_energy_is_observed_per_site() -> None:
    gm, record = decide(
        lambda x, w: F.linear(F.relu(x), w), empty(2048, K), empty(N, K)
    )
    (energy,) = calls(gm, "site_energy")
    assert energy.args[1] == record.decisions[0].site
    assert energy.meta["val"].dtype == torch.float64
    (packed,) = calls(gm, "sparsify24")
    assert packed.args[3] is energy
    gm, _ = decide(
        lambda x, w: F.linear(F.relu(x), w),
        empty(2048, K),
        empty(N, K),
        options={"adaptive": False},
    )
    assert calls(gm, "site_energy") == []


def test_bias_stays_outside() -> None:
    gm, record = decide(
        lambda x, w, b: F.linear(F.relu(x), w, b), empty(2048, K), empty(N, K), empty(N)
    )
    assert len(record.applied) == 1
    (add,) = calls(gm, "add")
    assert add.args[0] is calls(gm, "sparse24_mm")[0]


def test_row_contiguous_weight_is_taken_as_it_lies() -> None:
    gm, record = decide(lambda x, w: F.relu(x) @ w, empty(2048, K), empty(K, N))
    assert len(record.applied) == 1
    assert calls(gm, "sparse24_mm")[0].args[2].meta["val"].stride() == (N, 1)


def test_autocast_weight_is_cast_as_before() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.relu(x), w.bfloat16())

    gm, record = decide(fn, empty(2048, K), empty(N, K, dtype=torch.float32))
    assert len(record.applied) == 1
    assert calls(gm, "sparse24_mm")[0].args[2].meta["val"].dtype == torch.bfloat16


READ = "2:4 reads 16 bytes at a time, so it must be a multiple of 8"
APART = "neither its rows nor its columns can be read 16 bytes at a time"
SHARED = "its elements share memory"


@pytest.mark.parametrize(
    ("weight", "offset", "detail"),
    [
        (empty(N, K + 1), 0, f"K is 16385: {READ}"),
        (
            empty(N + 4, K),
            0,
            "N is 4100: only if it is a multiple of 8 can the result be stored 16 "
            "bytes at a time, and no other width was measured",
        ),
        (empty(K, N + 4).t(), 0, f"N is 4100: {READ}"),
        (empty(N, 2 * K)[:, ::2], 0, f"the weight has strides (2, 32768): {APART}"),
        (empty(N, K + 4)[:, :K], 0, f"the weight has strides (1, 16388): {APART}"),
        (empty(1, K).expand(N, K), 0, f"the weight has strides (1, 0): {SHARED}"),
        (empty(1, N).expand(K, N).t(), 0, f"the weight has strides (0, 1): {SHARED}"),
        (
            empty(2 * K + 8 * N).as_strided((N, K), (8, 1)),
            0,
            f"the weight has strides (1, 8): {SHARED}",
        ),
        (
            empty(N, K),
            12,
            "the weight starts 12 elements into its storage, and 2:4 reads from "
            "multiples of 16 bytes, 8 elements",
        ),
        (empty(N, K), 24, None),
    ],
)
def test_layouts_that_bulk_copies_cannot_read(
    weight: Tensor, offset: int, detail: str | None
) -> None:
    strided = (weight.shape, weight.stride(), offset)

    def fn(x: Tensor, base: Tensor) -> Tensor:
        return F.linear(F.relu(x), base.as_strided(*strided))

    x = empty(2048, weight.shape[1])
    _, record = decide(fn, x, empty(2 * K * N + 2 * N))
    (decision,) = record.decisions
    if detail is None:
        assert (decision.status, decision.op) == (Status.APPLIED, "sparse24_mm")
    else:
        assert decision.reason is Reason.UNSUPPORTED_SHAPE
        assert decision.detail == detail


def test_batches_stay_dense() -> None:
    _, record = decide(
        lambda x, w: torch.bmm(F.relu(x), w), empty(2, 1024, K), empty(2, K, N)
    )
    (decision,) = record.decisions
    assert decision.reason is Reason.NO_KERNEL_YET
    assert decision.detail == "a batch of matrices has no GPU kernel yet"


def test_gated_decode_skips_the_up_projection() -> None:
    weights = empty(K, N), empty(K, N), empty(N, K)
    gm, record = decide(glu, empty(1, N), *weights)
    assert [d.op for d in record.decisions] == ["glu_spmm"]
    gm, record = decide(glu, empty(2048, N), *weights)
    assert [d.op for d in record.decisions] == ["sparse24_mm"]
    assert calls(gm, "sparsify24")[0].args[1:3] == ("relu", "largest_abs")


def relu(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x), w)


def glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, gate)) * F.linear(x, up), down)


def symbolic(
    M: int, fn: Any, D: int, *weights: tuple[int, int], **options: str
) -> tuple[GraphDecisions, ShapeEnv]:
    """The decisions about a graph of M tokens that may be another number next time."""
    env, source = ShapeEnv(), ConstantSource("tokens")
    symbol = env.create_symbol(M, source, dynamic_dim=DimDynamic.DYNAMIC)
    tokens = env.create_symintnode(symbol, hint=M, source=source)
    sizes = [(tokens, D), *weights]
    with FakeTensorMode(shape_env=env):
        args = [torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in sizes]
        gm = make_fx(torch.func.functionalize(fn), tracing_mode="symbolic")(*args)
    for node, fake in zip(gm.graph.find_nodes(op="placeholder"), args, strict=True):
        node.meta["val"] = fake
    out, hidden = weights[-1]
    node = ["mm", "mm_1", "mm_2"][len(weights) - 1]
    plan = Plan({f"{node}:{hidden}x{out}": SitePlan(0.03, 0.03, 0.0, 0.0, 1, 5)})
    context = {"static": range(1, len(args)), "plan": plan, "options": options}
    return rewrite(gm, architecture=lambda device: "sm_90", **context), env


def test_gated_decode_of_symbolic_tokens() -> None:
    # So large that skipping rows of both weights saves more even with four tokens.
    F, D = 28672, 8192
    record, _ = symbolic(2, glu, D, (F, D), (F, D), (D, F))
    assert [d.op for d in record.decisions] == ["glu_spmm"]
    record, _ = symbolic(100, glu, D, (F, D), (F, D), (D, F))
    assert [d.op for d in record.decisions] == [""]


@pytest.mark.parametrize(
    ("M", "op", "guard"),
    [
        (2, "activation_spmm", "<= 4"),
        (5, "", "> 4"),
        (100, "", "> 4"),
        (MANY - 1, "", f"{MANY}"),
        (MANY, "sparse24_mm", f"{MANY}"),
        (8200, "sparse24_mm", f"{MANY}"),
    ],
)
def test_symbolic_tokens_are_guarded(M: int, op: str, guard: str) -> None:
    record, env = symbolic(M, relu, K, (N, K))
    (decision,) = record.decisions
    assert decision.op == op
    assert (decision.status is Status.APPLIED) == bool(op)
    assert isinstance(decision.shapes["M"], str)
    assert any(guard in str(found.expr) for found in env.guards)
    assert len(env.guards) <= 2
    wins = "skipping zeros wins up to 4 tokens, 2:4 wins from 2048 tokens on"
    assert decision.detail.endswith(f"for a symbolic number of tokens {wins}")


@pytest.mark.parametrize(("M", "quantized"), [(16, False), (17, True), (8192, True)])
def test_symbolic_tokens_in_int8_are_guarded(M: int, quantized: bool) -> None:
    def ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, up)), down)

    # Any number of tokens is packed; a dense product of int8 takes no fewer than 17.
    options = {"activation_format": "2:4", "quantize": "int8"}
    record, env = symbolic(M, ffn, N, (K, N), (N, K), **options)
    (decision,) = record.applied
    why = "; not quantized: products of int8 need 17 tokens or more"
    assert decision.detail.endswith(why) != quantized
    assert any("17" in str(found.expr) for found in env.guards)
    options = {"quantize": "int8"}
    _, env = symbolic(M, ffn, N, (K, N), (N, K), **options)
    assert not any("17" in str(found.expr) for found in env.guards)


def test_tokens_in_columns_are_not_packed_unless_asked_for() -> None:
    assert MANY is not None

    def layer(z: Tensor, w: Tensor) -> Tensor:
        return w @ F.relu(z) ** 2

    given = empty(K, MANY), empty(N, K)
    _, record = decide(layer, *given)
    (decision,) = record.decisions
    assert decision.reason is Reason.NOT_PROFITABLE
    assert decision.detail.startswith("the tokens are columns in memory")
    _, record = decide(layer, *given, options={"activation_format": "2:4"})
    assert [decision.op for decision in record.decisions] == ["sparse24_mm"]
    _, record = decide(layer, empty(K, 1), empty(N, K))
    assert [decision.op for decision in record.decisions] == ["activation_spmm"]
