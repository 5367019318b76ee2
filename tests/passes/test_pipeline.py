"""The pipeline as a whole: order, observers, and a graph that is never half done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from tracing import calls, listing, rewrite, trace

from inductor_sparse import passes
from inductor_sparse.decisions import GraphDecisions, Status
from inductor_sparse.errors import SparseError
from inductor_sparse.passes.base import PassContext, Rule
from inductor_sparse.passes.cleanup import check_no_half_rewritten_site
from inductor_sparse.passes.producers import Producer
from inductor_sparse.passes.sites import SITE_KEY, Site

X, W = torch.randn(5, 8), torch.randn(6, 8)


def three_sites(x: Tensor, w: Tensor) -> Tensor:
    gated = F.linear(F.relu(x) * (x + 1), w)
    return gated + F.linear(F.relu(x), w) + F.linear(F.relu(x) ** 2, w)


def test_order() -> None:
    names = [step.name for step in passes.PIPELINE]
    opened = ["sparse_compose_matrix_vector", "sparse_transpose_matmul"]
    assert names[:3] == [*opened, "sparse_canonicalize"]
    closed = ["sparse_restore_transposed", "sparse_decompose_matrix_vector"]
    assert names[-3:] == ["sparse_cleanup", *closed]
    assert len(set(names)) == len(names)
    assert all(step.__doc__ for step in passes.PIPELINE)


def test_decisions_come_in_the_order_of_the_graph() -> None:
    record = rewrite(trace(three_sites, X, W), static=[1])
    assert [d.rule for d in record.decisions] == [
        "gated_matmul",
        "relu_matmul",
        "relu_squared_matmul",
    ]


def test_nodes_name_their_site() -> None:
    gm = trace(lambda x, w: three_sites(x, w) + F.linear(F.silu(x), w), X, W)
    record = rewrite(gm, static=[1])
    marked = [n.meta[SITE_KEY] for n in gm.graph.nodes if SITE_KEY in n.meta]
    assert marked == [d.site for d in record.decisions]
    assert [d.status for d in record.decisions].count(Status.DENSE) == 1


def test_new_nodes_have_fake_values() -> None:
    gm = trace(three_sites, X, W)
    rewrite(gm, static=[1])
    for node in gm.graph.nodes:
        assert node.op == "output" or "val" in node.meta, node


def test_a_second_run_changes_nothing() -> None:
    gm = trace(three_sites, X, W)
    rewrite(gm, static=[1], options={"adaptive": False})
    before = listing(gm)
    assert rewrite(gm, static=[1], options={"adaptive": False}).decisions == []
    assert listing(gm) == before


def test_nothing_to_do_leaves_the_graph_alone() -> None:
    gm = trace(lambda x, w: F.linear(x, w).clamp(min=0) ** 2, X, W)
    before = listing(gm)
    assert rewrite(gm, static=[1]).other_matmuls == 1
    assert listing(gm) == before


def test_rules_do_not_need_canonicalize() -> None:
    gm = trace(lambda x, w: F.linear(x.clamp(min=0) * F.relu(x), w), X, W)
    with inductor_config.patch(disabled_passes="sparse_canonicalize"):
        record = rewrite(gm, static=[1])
    assert [d.status for d in record.decisions] == [Status.APPLIED]


def test_observers_see_each_pass() -> None:
    seen: list[tuple[str, bool]] = []

    def observe(name: str, before: str, after: str, seconds: float) -> None:
        assert seconds >= 0
        seen.append((name, before != after))

    rewrite(trace(three_sites, X, W), static=[1], observers=[observe])
    assert [name for name, _ in seen] == [step.name for step in passes.PIPELINE]
    changed = {name for name, is_changed in seen if is_changed}
    assert changed >= {"relu_squared_matmul", "relu_matmul", "gated_matmul"}
    assert "sparse_cleanup" not in changed


def test_a_graph_needs_an_owner() -> None:
    with pytest.raises(SparseError, match="owner"):
        passes.run(fx.Graph(), PassContext({}, GraphDecisions("orphan")))


def test_half_rewritten_site_is_refused() -> None:
    gm = trace(three_sites, X, W)
    record = rewrite(gm, static=[1])
    check_no_half_rewritten_site(gm.graph, record)
    del calls(gm, "activation_spmm")[0].meta[SITE_KEY]
    with pytest.raises(SparseError, match="mm:8x6"):
        check_no_half_rewritten_site(gm.graph, record)


class Drop(Rule):
    """A rule as a user would write it: takes dense sites, and gets them wrong."""

    name = "drop"

    def match(self, site: Site) -> Producer | None:
        return site.producer

    def rewrite(self, site: Site, weight: fx.Node, context: PassContext) -> fx.Node:
        return site.matmul


def test_a_rule_that_does_not_rewrite_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "PIPELINE", (Drop(), passes.cleanup.PASS))
    with pytest.raises(SparseError, match="half-rewritten"):
        rewrite(trace(lambda x, w: F.relu(x) @ w, X, W.T.contiguous()))


@pytest.mark.parametrize("draw", [torch.rand_like, torch.bernoulli])
def test_random_numbers_are_still_drawn(draw: Callable[[Tensor], Tensor]) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear((F.relu(x) ** 2) * (draw(x.abs().clamp(max=1)) > 0.5), w)

    gm = trace(fn, X, W)
    before = trace(fn, X, W)
    rewrite(gm, static=[1])
    torch.manual_seed(1)
    expected = before(X, W)
    torch.manual_seed(1)
    torch.testing.assert_close(gm(X, W), expected)
