"""Which weights are used as they are, which are copied once, and which are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor_config
from tracing import calls, listing, rewrite, rewrite_one, trace

from inductor_sparse.decisions import Reason, Status

K, N = 8, 6


def relu2(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


X = torch.randn(5, K)
VIEWS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor], tuple[Any, ...]]] = {
    "linear": (torch.randn(N, K), lambda w: w.T, ([K, N], [1, K], 0)),
    "mT": (torch.randn(N, K), lambda w: w.mT, ([K, N], [1, K], 0)),
    "window": (torch.randn(9, K), lambda w: w[3:].T, ([K, N], [1, K], 3 * K)),
    "columns": (torch.randn(K, 9), lambda w: w[:, 3:], ([K, N], [9, 1], 3)),
    "expert": (torch.randn(3, N, K), lambda w: w[1].T, ([K, N], [1, K], N * K)),
    "every other": (torch.randn(2 * N, K), lambda w: w[::2].T, ([K, N], [1, 2 * K], 0)),
    "one row": (torch.randn(1, K), lambda w: w.expand(N, K).T, ([K, N], [1, 0], 0)),
    "one column": (
        torch.randn(K, N),
        lambda w: w[:, :1].expand(K, N),
        ([K, N], [N, 0], 0),
    ),
    "heads": (
        torch.randn(2, 3, K),
        lambda w: w.reshape(N, K).T,
        ([K, N], [1, K], 0),
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_copied_once(name: str) -> None:
    weight, view, window = VIEWS[name]
    gm, decision = rewrite_one(lambda x, w: relu2(x) @ view(w), X, weight)
    assert decision.status is Status.APPLIED
    assert decision.weight_copy_bytes == K * N * 4
    (copy,) = calls(gm, "row_major_weight")
    assert copy.args[1:] == (*window, torch.float32)
    torch.testing.assert_close(gm(X, weight), relu2(X) @ view(weight))


def test_weight_with_an_offset_of_its_own() -> None:
    weight = torch.randn(3, N, K)[1]
    gm, _ = rewrite_one(lambda x, w: F.linear(relu2(x), w), X, weight)
    (copy,) = calls(gm, "row_major_weight")
    assert copy.args[3] == 0
    torch.testing.assert_close(gm(X, weight), F.linear(relu2(X), weight))


@pytest.mark.parametrize("static", [[], [1]])
def test_row_contiguous_is_used_as_it_is(static: list[int]) -> None:
    gm, decision = rewrite_one(
        lambda x, w: relu2(x) @ w, X, torch.randn(K, N), static=static
    )
    assert (decision.status, decision.weight_copy_bytes) == (Status.APPLIED, 0)
    assert calls(gm, "row_major_weight") == []


def test_restrided_parameter_needs_no_copy() -> None:
    weight = torch.randn(K, N).T
    _, decision = rewrite_one(lambda x, w: F.linear(relu2(x), w), X, weight)
    assert (decision.status, decision.weight_copy_bytes) == (Status.APPLIED, 0)


@pytest.mark.parametrize("stored", ["[N, K]", "[K, N]"])
def test_autocast_goes_into_the_copy(stored: str) -> None:
    weight = torch.randn(N, K) if stored == "[N, K]" else torch.randn(K, N).T
    x = X.bfloat16()

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(relu2(x), w.bfloat16())

    gm, decision = rewrite_one(fn, x, weight)
    assert decision.weight_copy_bytes == K * N * 2
    (copy,) = calls(gm, "row_major_weight")
    assert copy.args[0].op == "placeholder"
    assert copy.args[4] is torch.bfloat16
    assert calls(gm, "convert_element_type") == []
    torch.testing.assert_close(gm(x, weight), fn(x, weight))


def both(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(relu2(x), w) + w.sum(1)


@pytest.mark.parametrize(
    ("fn", "grad", "discard", "held"),
    [
        (lambda x, w: F.linear(relu2(x), w), False, True, 0),
        (lambda x, w: F.linear(relu2(x), w), False, False, K * N * 4),
        (lambda x, w: F.linear(relu2(x), w), True, True, K * N * 4),
        (both, False, True, K * N * 4),
    ],
)
def test_a_copy_whose_original_is_erased_is_no_second_one(
    fn: Callable[..., Tensor], grad: bool, discard: bool, held: int
) -> None:
    settings = {"freezing": True, "freezing_discard_parameters": discard}
    with inductor_config.patch(settings), torch.set_grad_enabled(grad):
        gm, decision = rewrite_one(fn, X, torch.randn(N, K))
    assert len(calls(gm, "row_major_weight")) == 1
    assert decision.weight_copy_bytes == held


def test_tied_weights_share_a_copy() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(relu2(x), w) @ w), w)

    gm = trace(fn, X, torch.randn(N, K))
    record = rewrite(gm, static=[1])
    assert len(record.applied) == 2
    assert len(calls(gm, "row_major_weight")) == 1
    assert sum(d.weight_copy_bytes for d in record.decisions) == K * N * 4


def test_shared_copy_moves_before_its_first_use() -> None:
    # The ReLU² rule runs first, on the second matmul; the ReLU rule then needs the
    # same copy earlier in the graph.
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(relu2(F.linear(F.relu(x), w) @ w), w)

    # Small whole numbers: their sums are exact in any order.
    x, w = torch.randint(-2, 3, (5, K)).float(), torch.randint(-1, 2, (N, K)).float()
    gm = trace(fn, x, w)
    assert len(rewrite(gm, static=[1]).applied) == 2
    gm.graph.lint()
    torch.testing.assert_close(gm(x, w), fn(x, w), rtol=0, atol=0)


def refused(fn: Callable[..., Tensor], *args: Tensor, **context: Any) -> str:
    gm = trace(fn, *args)
    before = listing(gm)
    context.setdefault("static", [1])
    (decision,) = rewrite(gm, **context).decisions
    assert (decision.status, decision.reason) == (
        Status.DENSE,
        Reason.WEIGHT_NOT_STATIC,
    )
    assert (listing(gm), decision.weight_copy_bytes) == (before, 0)
    return decision.detail


def test_argument_is_not_copied() -> None:
    detail = refused(
        lambda x, w: F.linear(relu2(x), w), X, torch.randn(N, K), static=[]
    )
    assert "passed in" in detail


def test_computed_weight_is_not_copied() -> None:
    refused(lambda x, w: F.linear(relu2(x), w * 2), X, torch.randn(N, K))


def test_weight_cast_twice_is_not_copied() -> None:
    detail = refused(
        lambda x, w: F.linear(relu2(x), w.bfloat16().float()), X, torch.randn(N, K)
    )
    assert "more than once" in detail


def test_weight_that_the_graph_changes_is_not_copied() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(relu2(x), w)
        torch.ops.aten.copy_.default(w, w + 1)
        return y

    gm = trace(fn, X, torch.randn(N, K))
    (w,) = (n for n in gm.graph.find_nodes(op="placeholder") if n.name == "w_1")
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(torch.ops.aten.copy_.default, (w, w))
    (decision,) = rewrite(gm, static=[1]).decisions
    assert decision.reason is Reason.WEIGHT_NOT_STATIC
    assert "changes it" in decision.detail


def test_copies_can_be_forbidden() -> None:
    detail = refused(
        lambda x, w: F.linear(relu2(x), w),
        X,
        torch.randn(N, K),
        options={"weight_copies": False},
    )
    assert "sparse.weight_copies" in detail


def test_forbidden_copies_leave_row_contiguous_casts_alone() -> None:
    gm, decision = rewrite_one(
        lambda x, w: relu2(x) @ w.bfloat16(),
        X.bfloat16(),
        torch.randn(K, N),
        options={"weight_copies": False},
    )
    assert (decision.status, decision.weight_copy_bytes) == (Status.APPLIED, 0)
    assert len(calls(gm, "convert_element_type")) == 1


def test_inference_tensor_cannot_be_tracked() -> None:
    gm = trace(lambda x, w: F.linear(relu2(x), w), X, torch.randn(N, K))
    record = rewrite(gm, static=[1], untracked_inputs=frozenset({"w_1"}))
    (decision,) = record.decisions
    assert decision.reason is Reason.WEIGHT_UNTRACKED


def test_attribute_of_an_exported_graph_is_a_weight() -> None:
    weight = torch.randn(N, K)
    gm = trace(lambda x, w: F.linear(relu2(x), w), X, weight)
    (placeholder,) = (node for node in gm.graph.nodes if node.name == "w_1")
    gm.register_buffer("weight", weight)
    with gm.graph.inserting_after(placeholder):
        attribute = gm.graph.get_attr("weight")
    attribute.meta.update(placeholder.meta)
    placeholder.replace_all_uses_with(attribute)
    gm.graph.erase_node(placeholder)
    (decision,) = rewrite(gm).decisions
    assert decision.status is Status.APPLIED
    torch.testing.assert_close(gm(X), F.linear(relu2(X), weight))
