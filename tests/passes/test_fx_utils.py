"""Questions about nodes: names, casts, zeros, and what may be erased."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from tracing import calls, trace

from inductor_sparse.passes import fx_utils
from inductor_sparse.passes.fx_utils import aten
from inductor_sparse.passes.sites import SITE_KEY


def node_with(**meta: Any) -> fx.Node:
    node = fx.Graph().placeholder("x")
    node.meta.update(meta)
    return node


@pytest.mark.parametrize(
    ("spelled", "path"),
    [
        ("L['self'].layers.0.down", "layers.0.down"),
        ("L['self'].layers[0].down", "layers.0.down"),
        ("L['self']._modules['layers']._modules['0']", "layers.0"),
        ("L['self'].lm.__dict__['_modules']['layers'].0.down", "lm.layers.0.down"),
        ("L['self'].__dict__['_modules']['layers'].0", "layers.0"),
        ("L['self']._orig_mod.layers.0", "layers.0"),
        ("G['model'].layers.0", "layers.0"),
        ("L['fn'].__closure__[0].cell_contents.layers.0", "layers.0"),
        ("layers.0.down", "layers.0.down"),
        ("L['self']", ""),
        ("", ""),
    ],
)
def test_module_path(spelled: str, path: str) -> None:
    stack = {"outer": ("L['self']", object), "inner": (spelled, object)}
    assert fx_utils.module_path(node_with(nn_module_stack=stack)) == path


def test_source_line_is_the_innermost_of_the_user() -> None:
    trace_text = (
        '  File "/home/me/model.py", line 3, in forward\n    y = mlp(x)\n'
        '  File "/home/me/mlp.py", line 41, in forward\n    return self.down(h)\n'
        f'  File "{torch.__path__[0]}/nn/modules/linear.py", line 9, in forward\n'
    )
    assert fx_utils.source_line(node_with(stack_trace=trace_text)) == "mlp.py:41"
    assert fx_utils.source_line(node_with()) == ""


def test_a_copy_to_another_device_is_no_cast() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten._to_copy.default, (x,))
    with FakeTensorMode():
        x.meta["val"] = torch.empty(2, dtype=torch.bfloat16)
        node.meta["val"] = torch.empty(2)
        assert fx_utils.is_cast(node)
        assert fx_utils.is_widening(node)
        node.meta["val"] = torch.empty(2, device="cuda")
        assert not fx_utils.is_cast(node)
        assert not fx_utils.is_widening(node)


@pytest.mark.parametrize(
    "make",
    [
        torch.zeros_like,
        lambda x: torch.full_like(x, 0.0),
        lambda x: x.new_zeros(()).expand(2, 2),
        lambda x: torch.zeros(2, 2, dtype=torch.bfloat16).float(),
        lambda x: torch.scalar_tensor(0.0),
    ],
)
@pytest.mark.parametrize("decompose", [False, True])
def test_zeros_are_known(make: Any, decompose: bool) -> None:
    gm = trace(
        lambda x: torch.maximum(x, make(x)), torch.randn(2, 2), decompose=decompose
    )
    (maximum,) = calls(gm, "maximum")
    assert fx_utils.is_zero(maximum.args[1])
    assert not fx_utils.is_zero(maximum.args[0])


def test_constants_of_the_graph_are_looked_at() -> None:
    gm = fx.GraphModule({}, fx.Graph())
    for name, value in (("zero", 0.0), ("one", 1.0)):
        gm.register_buffer(name, torch.tensor(value))
        assert fx_utils.is_zero(gm.graph.get_attr(name)) is (name == "zero")


def fn_with_noise(x: Tensor) -> Tensor:
    return torch.relu(x + torch.rand_like(x))


def test_erasing_stops_at_random_numbers_and_at_users() -> None:
    gm = trace(fn_with_noise, torch.randn(2, 2))
    (relu,) = calls(gm, "relu")
    x = gm.graph.find_nodes(op="placeholder")[0]
    fx_utils.replace(relu, x)
    assert (calls(gm, "relu"), calls(gm, "add")) == ([], [])
    assert len(calls(gm, "rand")) == 1
    gm.graph.lint()


def test_an_inserted_call_has_the_origin_of_its_place_and_not_its_marks() -> None:
    gm = trace(lambda a, b: a @ b, torch.randn(3, 4), torch.randn(4, 5))
    (mm,) = calls(gm, "mm")
    marks = {fx_utils.COMPOSED_KEY: True, SITE_KEY: "down:4x5"}
    mm.meta.update(marks, stack_trace="here")
    inserted = fx_utils.insert_call(mm, aten.mm.default, mm.args)
    assert inserted.meta["stack_trace"] == "here"
    assert not marks.keys() & inserted.meta.keys()
