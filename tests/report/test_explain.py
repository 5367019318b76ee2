"""explain(): the right sites, measured, and no trace left behind."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
from report_models import FEATURES, FFN, HIDDEN, Broken, Stack, relu2, tokens
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor_config

from inductor_sparse.errors import SparseOptionError, SparsePlanError
from inductor_sparse.plan import Plan, SitePlan
from inductor_sparse.report.explain import explain
from inductor_sparse.report.explanation import Explanation


def sites_of(explanation: Explanation) -> list[dict[str, Any]]:
    return explanation.to_dict()["sites"]


def test_every_site_in_the_order_of_the_model() -> None:
    gelu = nn.functional.gelu
    sites = sites_of(explain(Stack(relu2, gelu, torch.relu), tokens(2, 5)))
    ended = [(site["module"], site["status"], site["reason"]) for site in sites]
    assert ended == [
        ("layers.0.down", "applied", None),
        ("layers.1.down", "dense", "activation-not-sparse"),
        ("layers.2.down", "applied", None),
    ]
    first = sites[0]
    assert first["shapes"] == {"M": 10, "K": HIDDEN, "N": FEATURES}
    assert (first["dtype"], first["tier"]) == ("float32", "exact")
    assert first["rule"] == "relu_squared_matmul"
    assert first["source"].startswith("report_models.py:")
    assert first["weight_copy_bytes"] == HIDDEN * FEATURES * 4


def test_density_is_that_of_the_operand_also_at_dense_sites() -> None:
    model, x = Stack(relu2, nn.functional.gelu), tokens(3)
    sites = sites_of(explain(model, x))
    with torch.no_grad():
        operand = relu2(model.layers[0].up(x))
    assert sites[0]["density"] == float((operand != 0).double().mean())
    assert 0.0 < sites[0]["dropped_energy"] < 0.2
    assert sites[1]["density"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_density_at_a_dense_site_that_is_a_sum_of_products(dtype: torch.dtype) -> None:
    def matrix_vector(z: Tensor, w: Tensor) -> Tensor:
        products = torch.relu(z).float().unsqueeze(2) * w.float().unsqueeze(0)
        return products.sum(1).to(z.dtype)

    z, w = torch.randn(1, 64).to(dtype), torch.randn(64, 32).to(dtype)
    options = {"sparse.disabled_rules": "relu_matmul"}
    (site,) = sites_of(explain(matrix_vector, z, w, options=options))
    assert site["reason"] == "rule-disabled"
    assert site["density"] == float((z > 0).double().mean())
    assert 0.0 < site["dropped_energy"] < 0.2


def test_matrix_vector_products_are_not_decomposed_for_it() -> None:
    tuned: list[bool] = []

    def look(graph: fx.Graph) -> None:
        tuned.append(inductor_config.coordinate_descent_tuning)

    options = {"coordinate_descent_tuning": True, "joint_custom_pre_pass": look}
    explain(Stack(relu2), tokens(3), options=options)
    assert tuned == [False]


def test_conclusion_counts_the_other_matmuls() -> None:
    text = str(explain(Stack(relu2, nn.functional.gelu), tokens(3)))
    assert text.startswith(
        "1 of 2 sites run sparse; 1 dense (activation-not-sparse); 2 other matmuls\n"
    )


def test_model_without_a_site() -> None:
    explanation = explain(nn.Linear(FEATURES, 3), tokens(2))
    assert explanation.to_dict()["sites"] == []
    assert explanation.other_matmuls == 1
    assert str(explanation).startswith("no candidate site")


def test_nothing_compiled() -> None:
    with torch.compiler.set_stance("force_eager"):
        explanation = explain(FFN(), tokens(2))
    assert str(explanation).startswith("no graph was compiled")


def test_graph_breaks_give_several_graphs_all_listed() -> None:
    explanation = explain(Broken(), tokens(2))
    sites = sites_of(explanation)
    assert [site["module"] for site in sites] == ["first.down", "second.down"]
    assert len({site["graph"] for site in sites}) == len(explanation.graphs) == 2
    assert "compiled as 2 graphs" in str(explanation)


class Looped(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def test_layers_that_share_one_graph_are_one_site() -> None:
    model, x = Looped(relu2, relu2), tokens(2)
    (site,) = sites_of(explain(model, x))
    assert site["module"] == "down"
    with torch.no_grad():
        first = relu2(model.layers[0].up(x))
        second = relu2(model.layers[1].up(model.layers[0].down(first)))
    both = torch.cat([first, second])
    assert site["density"] == pytest.approx(float((both != 0).double().mean()))


def test_symbolic_sizes_are_shown_as_text() -> None:
    x = tokens(7)
    torch._dynamo.mark_dynamic(x, 0)
    (site,) = sites_of(explain(FFN(), x))
    assert isinstance(site["shapes"]["M"], str)
    assert site["density"] is not None


def test_site_run_several_times_is_measured_over_all_of_them() -> None:
    ffn = FFN()

    def twice(x: Tensor) -> Tensor:
        return ffn(ffn(x))

    sites = sites_of(explain(twice, tokens(4)))
    assert [site["status"] for site in sites] == ["applied", "applied"]
    assert sites[1]["site"] == sites[0]["site"] + "#2"


def test_second_call_is_as_complete_as_the_first() -> None:
    model, x = FFN(), tokens(3)
    limit = torch._dynamo.config.recompile_limit
    reports = [sites_of(explain(model, x)) for _ in range(limit + 1)]
    assert [len(sites) for sites in reports] == [1] * (limit + 1)


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch counts all compilations of a code object together",
)
def test_other_compilations_are_not_disturbed() -> None:
    model = FFN()
    for rows in (2, 3, 4):
        (site,) = sites_of(explain(model, tokens(rows)))
        assert site["shapes"]["M"] == rows
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    compiled(tokens(7))
    explain(model, tokens(9))
    compiled(tokens(7))
    assert counter.frame_count == 1
    compiled(tokens(8))
    compiled(tokens(9))
    assert counter.frame_count == 2, "the second size makes it dynamic, as ever"


def test_compiled_model_is_unwrapped() -> None:
    compiled = torch.compile(FFN(), backend="eager")
    (site,) = sites_of(explain(compiled, tokens(2)))
    assert site["module"] == "down"


def test_site_inside_a_higher_order_op_is_listed_unmeasured() -> None:
    ffn = FFN()

    def either(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, ffn, torch.neg, (x,))

    (site,) = sites_of(explain(either, tokens(3)))
    assert (site["status"], site["reason"]) == ("dense", "higher-order-op")
    assert site["density"] is None


class Stateful(FFN):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.register_buffer("cache", torch.zeros(4, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.copy_(x)
        return nn.functional.dropout(super().forward(self.norm(x)))


def test_model_and_generator_are_left_as_they_were() -> None:
    model = Stateful().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    (site,) = sites_of(explain(model, tokens(4)))
    assert site["status"] == "applied"
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_keyword_arguments_and_sparse_options() -> None:
    options = {"sparse.disabled_rules": "relu_squared_matmul", "sparse.strict": True}
    (site,) = sites_of(explain(FFN(), x=tokens(2), options=options))
    assert (site["status"], site["reason"]) == ("dense", "rule-disabled")


def test_bad_options_are_refused_before_anything_runs() -> None:
    with pytest.raises(SparseOptionError, match=r"sparse\.strict"):
        explain(FFN(), tokens(2), options={"sparse.strikt": True})


def site_plan(density: float) -> SitePlan:
    return SitePlan(density, density, None, None, calls=1, tokens=1)


def test_a_plan_decides_as_in_the_backend(tmp_path: Any) -> None:
    key = f"down:{HIDDEN}x{FEATURES}"
    Plan({key: site_plan(0.9)}).save(tmp_path / "plan.json")
    options = {"sparse.plan": str(tmp_path / "plan.json")}
    (site,) = sites_of(explain(FFN(), tokens(2), options=options))
    assert (site["site"], site["reason"]) == (key, "too-dense")
    assert site["density"] < 0.9, "measured now, not taken from the plan"


def test_a_plan_of_another_model_is_an_error_of_ours(tmp_path: Any) -> None:
    Plan({"elsewhere:1x2": site_plan(0.1)}).save(tmp_path / "plan.json")
    options = {"sparse.plan": str(tmp_path / "plan.json")}
    with pytest.raises(SparsePlanError, match="another model"):
        explain(FFN(), tokens(2), options=options)


def test_an_error_of_the_model_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="17"):
        explain(FFN(), torch.randn(2, 17))


def test_empty_batch_has_no_density() -> None:
    for site in sites_of(explain(FFN(), tokens(0))):
        assert site["density"] is None
        assert site["dropped_energy"] is None


def test_threads_do_not_mix_their_sites() -> None:
    models = [Stack(*[relu2] * (i + 1)) for i in range(3)]
    found: dict[int, int] = {}

    def work(i: int) -> None:
        found[i] = len(explain(models[i], tokens(2)).sites)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 1, 1: 2, 2: 3}
