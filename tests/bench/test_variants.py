from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from inductor_sparse.bench import variants
from inductor_sparse.bench.models import ModelCase
from inductor_sparse.bench.variants import SETTINGS, Setting, Variant, compile_variant
from inductor_sparse.decisions import (
    Decision,
    DecisionLog,
    GraphDecisions,
    Reason,
    Status,
    Tier,
)
from inductor_sparse.errors import NothingAppliedError

CASE = ModelCase("down", False, "relu2", "float32", features=64, hidden=128)
PLAIN = SETTINGS[0]
FROZEN = SETTINGS[1]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leave no compiled graph behind."""
    yield
    variants.release()


def variant_with(*graphs: GraphDecisions) -> Variant:
    """A variant that compiled ``graphs``, oldest first."""
    log = DecisionLog()
    for graph in graphs:
        log.add(graph)
    return Variant("sparse", PLAIN, lambda x: x, log, [])


def graph_with(status: Status, reason: Reason | None) -> GraphDecisions:
    """A graph with one site."""
    decision = Decision(
        *("down", "f.py:1", "rule", Tier.EXACT, status, reason, ""),
        shapes={},
        dtype="float32",
        device="cpu",
    )
    return GraphDecisions("graph", [decision])


def frozen_tensors(variant: Variant) -> list[Tensor]:
    """What Inductor stored in the modules it generated."""
    values = [value for module in variant.modules for value in vars(module).values()]
    return [value for value in values if isinstance(value, Tensor)]


def test_settings_are_the_four_a_user_can_choose() -> None:
    assert (
        Setting("default", freezing=False, max_autotune=False),
        Setting("freezing", freezing=True, max_autotune=False),
        Setting("max-autotune", freezing=False, max_autotune=True),
        Setting("freezing+max-autotune", freezing=True, max_autotune=True),
    ) == SETTINGS


@pytest.mark.slow
def test_each_setting_is_a_graph_of_its_own_and_can_be_freed() -> None:
    model = CASE.build()
    inputs = [CASE.make_input(2, 0.1, seed) for seed in range(2)]
    plain = compile_variant(model, "inductor", PLAIN, inputs)
    frozen = compile_variant(model, "inductor", FROZEN, inputs)
    # Were Dynamo to reuse the first graph for both, nothing would be frozen.
    assert plain.modules
    assert frozen.modules
    assert frozen_tensors(plain) == []
    assert frozen_tensors(frozen) != []
    with torch.no_grad():
        expected = model(inputs[1])
    torch.testing.assert_close(frozen.call(inputs[1]), expected)
    assert torch.equal(plain.run(inputs)(3), plain.call(inputs[1]))
    frozen.close()
    assert frozen_tensors(frozen) == []
    with pytest.raises(RuntimeError, match="closed"):
        frozen.call(inputs[0])


def test_status_of_an_applied_site() -> None:
    assert variant_with(graph_with(Status.APPLIED, None)).status() == ("applied", None)


def test_status_of_a_decided_dense_site_names_the_reason() -> None:
    variant = variant_with(graph_with(Status.DENSE, Reason.TOO_DENSE))
    assert variant.status() == ("dense", "too-dense")


def test_status_is_that_of_the_graph_compiled_last() -> None:
    applied = graph_with(Status.APPLIED, None)
    demoted = graph_with(Status.DENSE, Reason.TOO_DENSE)
    assert variant_with(applied, demoted).status() == ("dense", "too-dense")


@pytest.mark.parametrize("graphs", [(), (GraphDecisions("empty"),)])
def test_rejects_a_comparison_of_a_graph_with_itself(
    graphs: tuple[GraphDecisions, ...],
) -> None:
    with pytest.raises(NothingAppliedError, match="nothing to compare"):
        variant_with(*graphs).status()


def test_settings_leave_no_trace() -> None:
    import torch._inductor.config as inductor_config

    before = inductor_config.get_config_copy()
    with variants.compiling(SETTINGS[3]):
        assert inductor_config.freezing
        assert not inductor_config.fx_graph_cache
    assert inductor_config.get_config_copy() == before
