"""How options are split, checked and refused, without compiling anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

import inductor_sparse
from inductor_sparse import backend, config
from inductor_sparse.decisions import GraphDecisions
from inductor_sparse.errors import SparseOptionError, SparsePlanError
from inductor_sparse.passes.joint_pass import SparsePass

SLOT = "joint_custom_pre_pass"


def test_ours_lose_the_prefix_and_inductors_are_passed_on() -> None:
    options = {"sparse.strict": True, "max_autotune": True, "sparse.max_density": 1}
    ours, inductors = backend.split_options(options)
    assert ours == {"strict": True, "max_density": 1.0}
    assert isinstance(ours["max_density"], float)
    assert inductors == {"max_autotune": True}
    assert backend.split_options(None) == ({}, {})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sparse.strickt", True, 'did you mean "sparse.strict"'),
        ("sparse.zzz", 1, "known options: sparse.activation_format"),
        ("sparse.strict", 1, "takes bool, got int 1"),
        ("sparse.strict", "yes", "takes bool, got str 'yes'"),
        ("sparse.max_density", True, "takes float, got bool True"),
        ("sparse.max_density", "0.5", "takes float, got str"),
        ("sparse.dump_dir", 3, "takes str, got int 3"),
        ("sparse.activation_format", "exakt", "the nearest is 'exact'"),
        ("sparse.quantize", "fp16", "the nearest is 'fp8'"),
        ("sparse.max_dropped_energy", "1%", "takes float, got str"),
        ("sparse.allow_unverified", 1, "takes bool, got int 1"),
        ("sparse.unverified", True, 'did you mean "sparse.allow_unverified"'),
        ("sparse.quantize_scales", "predicted", 'needs "sparse.quantize": "fp8"'),
    ],
)
def test_a_bad_option_names_the_nearest_good_one(
    key: str, value: Any, message: str
) -> None:
    with pytest.raises(SparseOptionError, match=message):
        backend.split_options({key: value})


def test_predicted_scales_are_those_of_fp8() -> None:
    scales = {"sparse.quantize_scales": "predicted"}
    with pytest.raises(SparseOptionError, match=r'needs "sparse\.quantize": "fp8"'):
        backend.split_options({**scales, "sparse.quantize": "int8"})
    ours, _ = backend.split_options({**scales, "sparse.quantize": "fp8"})
    assert ours == {"quantize_scales": "predicted", "quantize": "fp8"}


def test_configs_for_packaging_carry_the_pass_and_freeze() -> None:
    configs = inductor_sparse.inductor_configs(disabled_rules="relu_matmul")
    assert configs["freezing"] is True
    assert isinstance(configs[SLOT], SparsePass)
    assert configs[SLOT].options["disabled_rules"] == "relu_matmul"
    assert configs[SLOT].options["adaptive"] is False
    with pytest.raises(SparseOptionError, match="strict"):
        inductor_sparse.inductor_configs(strikt=True)


def test_the_users_pass_is_kept_and_runs_first() -> None:
    def users(graph: torch.fx.Graph) -> None: ...

    patches: dict[str, Any] = {SLOT: users}
    assert backend.install_pass(patches, {}).user_passes == (users,)
    assert isinstance(patches[SLOT], SparsePass)
    with inductor_config.patch({SLOT: users}):
        assert backend.install_pass({}, {}).user_passes == (users,)


def test_inference_tensors_are_known_by_position() -> None:
    with torch.inference_mode():
        made_there = torch.ones(2)
    inputs = (torch.ones(2), made_there, 3)
    sparse_pass = backend.install_pass({}, {}, None, inputs)
    assert sparse_pass._untracked == {1}


def test_a_missing_plan_is_an_error_before_anything_is_compiled() -> None:
    with pytest.raises(SparsePlanError, match=r"nowhere\.json"):
        backend.install_pass({}, {"plan": "nowhere.json"})


def test_freezing_as_an_option_is_said_to_do_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend._warn_about_freezing({"freezing": True})
    assert "TORCHINDUCTOR_FREEZING=1" in caplog.text
    caplog.clear()
    with inductor_config.patch(freezing=True):
        backend._warn_about_freezing({"freezing": True})
    backend._warn_about_freezing({})
    assert caplog.text == ""


def test_lowerings_see_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        seen.append(config.allow_unverified)
        kwargs["config_patches"][SLOT].graphs.append(GraphDecisions("none"))
        return lambda *inputs: inputs

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    graph = torch.fx.symbolic_trace(lambda x: x)
    backend.sparse(graph, [], options={"sparse.allow_unverified": True})
    backend.sparse(graph, [])
    assert seen == [True, False]
