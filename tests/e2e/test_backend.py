"""The backend as a user meets it: modes, shapes, gradients, options, passes, AOT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.checks import Down, assert_as_good, compare, compile_and_compare, outcomes
from report_models import FEATURES, FFN, HIDDEN, Stack, relu2, tokens
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

import inductor_sparse
from inductor_sparse.decisions import collect
from inductor_sparse.errors import NothingAppliedError, SparseOptionError
from inductor_sparse.runtime import adaptation


@pytest.mark.parametrize(
    "mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]
)
def test_modes(mode: str) -> None:
    _, decisions = compile_and_compare(FFN(), tokens(5), mode=mode)
    assert outcomes(decisions) == ["applied"]


@pytest.mark.parametrize("bits", [1, 256])
def test_cpus_with_narrow_vectors_or_none(bits: int) -> None:
    z = torch.randn(70, HIDDEN)
    options = {"cpp.simdlen": bits}
    _, decisions = compile_and_compare(Down(), z, options=options)
    assert outcomes(decisions) == ["applied"]


def test_cpp_wrapper() -> None:
    model, x = FFN(), tokens(8)
    options = {"cpp_wrapper": True}
    compiled, decisions = compile_and_compare(model, x, options=options)
    assert outcomes(decisions) == ["applied"]
    with torch.no_grad():
        model.down.weight.mul_(2)
        compare(compiled, model, x)


def test_dynamic_rows_share_one_graph() -> None:
    model = FFN()
    compiled, decisions = compile_and_compare(model, tokens(5), dynamic=True)
    assert outcomes(decisions) == ["applied"]
    assert decisions[0].shapes["M"] != 5
    with collect() as log, torch.no_grad():
        for rows in (2, 4, 64, 65, 600):
            compare(compiled, model, tokens(rows))
    assert log.graphs == []


def test_marked_rows_share_one_graph() -> None:
    model = FFN()
    with collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse")
        for shape in ((2, 5), (2, 9), (2, 3)):
            x = tokens(*shape)
            torch._dynamo.mark_dynamic(x, 1)
            compare(compiled, model, x)
    assert outcomes(log.decisions) == ["applied"]


def gradients(model: nn.Module, forward: Any, x: Tensor) -> list[Tensor]:
    """Those of the input and of the parameters, for the loss ``|y|²``."""
    x = x.detach().clone().requires_grad_()
    forward(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("rows", "outcome"), [(64, "applied"), (1, "applied"), (20, "training-graph")]
)
def test_gradients_are_those_of_the_dense_graph(rows: int, outcome: str) -> None:
    model, x = FFN(), tokens(rows)
    with collect() as log:
        compiled = torch.compile(model, backend="sparse")
        ours = gradients(model, compiled, x)
    assert outcomes(log.decisions) == [outcome]
    exact_model = copy.deepcopy(model).double()
    exact = gradients(exact_model, exact_model, x.double())
    for mine, dense, truth in zip(ours, gradients(model, model, x), exact, strict=True):
        assert_as_good(mine, dense, truth)


def test_training_follows_the_dense_model() -> None:
    """Each step changes the weights: a stale copy would part the two at once."""
    models = [FFN(), FFN()]
    models[1].load_state_dict(models[0].state_dict())
    forwards = [torch.compile(models[0], backend="sparse"), models[1]]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.2) for model in models]
    losses: list[list[float]] = [[], []]
    for _ in range(6):
        for i in range(2):
            loss = (forwards[i](tokens(64)) - 1).square().mean()
            optimizers[i].zero_grad()
            loss.backward()
            optimizers[i].step()
            losses[i].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.7 * losses[0][0]


def test_eval_without_no_grad_at_one_token() -> None:
    model = FFN().eval()
    with collect() as log:
        compiled = torch.compile(model, backend="sparse")
        assert compare(compiled, model, tokens(1)).requires_grad
        model.down.weight.data.mul_(2)
        compare(compiled, model, tokens(1))
    assert outcomes(log.decisions) == ["applied"]


def test_autocast_to_bfloat16() -> None:
    model, x = FFN(), tokens(5)
    compiled = torch.compile(model, backend="sparse")
    half = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(half).double()

    def check() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            actual, dense = compiled(x), model(x)
        assert_as_good(actual, dense, exact(x.bfloat16().double()))

    with collect() as log, torch.no_grad():
        check()
        # The cast copy follows the float32 weight.
        for changed in (model, exact):
            changed.down.weight.mul_(2)
        check()
    assert outcomes(log.decisions) == ["applied"]
    assert log.decisions[0].weight_copy_bytes == FEATURES * HIDDEN * 2


class CountMatmuls(CustomGraphPass):
    """A pass of the user, which must see the graph before it is rewritten."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, graph: fx.Graph) -> None:
        matmuls = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.seen.append(sum(node.target in matmuls for node in graph.nodes))

    def uuid(self) -> str:
        return "count-matmuls"


@pytest.mark.parametrize("by_option", [True, False])
def test_users_own_pass_runs_first(by_option: bool) -> None:
    counter = CountMatmuls()
    slot = {"joint_custom_pre_pass": counter}
    with inductor_config.patch({} if by_option else slot):
        options = slot if by_option else None
        _, decisions = compile_and_compare(FFN(), tokens(5), options=options)
    assert counter.seen == [2]
    assert outcomes(decisions) == ["applied"]
    assert inductor_config.joint_custom_pre_pass is None


def test_options_of_inductor_are_passed_on() -> None:
    counter = CountMatmuls()
    options = {"sparse.strict": True, "post_grad_custom_post_pass": counter}
    _, decisions = compile_and_compare(FFN(), tokens(5), options=options)
    assert outcomes(decisions) == ["applied"]
    # The other slot runs after us: of two matmuls, one is left.
    assert counter.seen == [1]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("stric", True, 'unknown option "sparse.stric"; did you mean "sparse.strict"?'),
        ("strict", "yes", "option \"sparse.strict\" takes bool, got str 'yes'"),
        ("max_density", True, 'option "sparse.max_density" takes float, got bool True'),
        ("activation_format", "exct", "got 'exct'; the nearest is 'exact'"),
    ],
)
def test_wrong_option(option: str, value: object, message: str) -> None:
    options = {f"sparse.{option}": value}
    with pytest.raises(BackendCompilerFailed) as failure:
        compile_and_compare(Down(), torch.randn(5, HIDDEN), options=options)
    assert isinstance(failure.value.inner_exception, SparseOptionError)
    assert message in str(failure.value.inner_exception)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(FEATURES, 8), "1 matmuls have no sparse producer"),
        (Stack(nn.functional.gelu), "layers.0.down:64x16: activation-not-sparse"),
    ],
)
def test_strict(model: nn.Module, message: str) -> None:
    with pytest.raises(BackendCompilerFailed) as failure:
        compile_and_compare(model, tokens(5), options={"sparse.strict": True})
    assert isinstance(failure.value.inner_exception, NothingAppliedError)
    assert message in str(failure.value.inner_exception)


def test_freezing_folds_the_weight_copy() -> None:
    model, x = FFN().eval(), tokens(5)
    with inductor_config.patch(freezing=True), collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse")
        actual, (code, *_) = run_and_get_code(compiled, x)
        exact = copy.deepcopy(model).double()(x.double())
        assert_as_good(actual, model(x), exact)
    assert outcomes(log.decisions) == ["applied"]
    assert "row_major_weight" not in code
    assert "stream_rows" in code


@pytest.mark.slow
def test_aot_inductor_with_dynamic_rows(tmp_path: Path) -> None:
    model = FFN().eval()
    rows = torch.export.Dim("rows", min=1, max=1024)
    with collect() as log, torch.no_grad():
        program = torch.export.export(model, (tokens(5),), dynamic_shapes=({0: rows},))
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "ffn.pt2"),
            inductor_configs=inductor_sparse.inductor_configs(),
        )
        packaged = torch._inductor.aoti_load_package(package)
        for count in (5, 1, 300):
            compare(packaged, model, tokens(count))
    assert outcomes(log.decisions) == ["applied"]


def test_inductor_configs_check_their_options() -> None:
    with pytest.raises(SparseOptionError, match=r'did you mean "sparse\.plan"'):
        inductor_sparse.inductor_configs(plam="plan.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_activations_go_back_to_dense(dtype: torch.dtype) -> None:
    model = FFN().to(dtype)
    with torch.no_grad():
        model.up.bias.fill_(50)  # every activation is positive
    with collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse")
        for _ in range(2 * adaptation.WINDOW):
            compare(compiled, model, tokens(8).to(dtype))
        assert outcomes(log.decisions) == ["applied", "too-dense"]
        assert log.decisions[1].detail.startswith("observed at run time")
        torch._dynamo.reset()
        compare(compiled, model, tokens(8).to(dtype))
    assert outcomes(log.decisions) == ["applied", "too-dense", "applied"]


class OpenGates(torch.nn.Module):
    """A gated FFN most of whose gates are open."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(16, 64, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(64, 16, bias=False)
        bias = torch.where(torch.arange(64) < 64 * share, 50.0, -50.0)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.gate(x) + self.bias) * self.up(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (8, 0.5, ["applied", "too-dense"]),
        (8, 0.125, ["applied"]),
        (1, 1.0, ["applied"]),
    ],
)
def test_gates_that_are_mostly_open_go_back_to_dense(
    count: int, share: float, expected: list[str], dtype: torch.dtype
) -> None:
    model, x = OpenGates(share).to(dtype), torch.randn(count, 16, dtype=dtype)
    with collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse")
        for _ in range(2 * adaptation.WINDOW):
            compare(compiled, model, x)
    assert outcomes(log.decisions) == expected
    assert log.decisions[0].op == "glu_spmm"


def test_sparse_activations_are_left_alone() -> None:
    model = FFN()
    with torch.no_grad():
        model.up.bias.fill_(-1)
    with collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse")
        for _ in range(2 * adaptation.WINDOW):
            compare(compiled, model, tokens(8))
    assert outcomes(log.decisions) == ["applied"]


def test_adaptation_can_be_turned_off() -> None:
    model = FFN(relu2)
    with torch.no_grad():
        model.up.bias.fill_(50)
    options = {"sparse.adaptive": False}
    with collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse", options=options)
        for _ in range(2 * adaptation.WINDOW):
            compare(compiled, model, tokens(8))
    assert outcomes(log.decisions) == ["applied"]
