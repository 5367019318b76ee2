"""Rules of other projects: where they run, and what they do to the cache keys."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from tracing import calls, rewrite_one

from inductor_sparse import passes
from inductor_sparse.decisions import Reason, Status
from inductor_sparse.errors import SparseError
from inductor_sparse.passes.joint_pass import SparsePass

X, W = torch.randn(5, 8), torch.randn(6, 8)
SOURCE = '''
from inductor_sparse import passes

class FromFile(passes.Rule):
    """Takes nothing."""

    name = "from_file"

    def match(self, site):
        return None

    def rewrite(self, site, weight, context):
        raise AssertionError
'''


class EveryProducer(passes.Rule):
    """Takes every site that has a producer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def match(self, site: passes.Site) -> passes.Producer | None:
        return site.producer

    def rewrite(
        self, site: passes.Site, weight: fx.Node, context: passes.PassContext
    ) -> fx.Node:
        return passes.emit_activation_spmm(site, weight)


@pytest.fixture(autouse=True)
def _no_rule_stays() -> Iterator[None]:
    yield
    for rule in passes.registered():
        passes.unregister(rule.name)


def relu_site(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x), w)


def test_it_takes_a_site_from_the_package() -> None:
    passes.register(EveryProducer("mine"))
    gm, decision = rewrite_one(relu_site, X, W)
    assert (decision.rule, decision.status) == ("mine", Status.APPLIED)
    assert len(calls(gm, "activation_spmm")) == 1
    torch.testing.assert_close(gm(X, W), relu_site(X, W))


def test_it_is_given_canonical_graphs() -> None:
    passes.register(EveryProducer("mine"))
    names = [step.name for step in passes.pipeline()]
    assert names[2:5] == ["sparse_canonicalize", "mine", "relu_squared_matmul"]
    assert [n for n in names if n != "mine"] == [step.name for step in passes.PIPELINE]


def test_the_first_registered_has_the_first_choice() -> None:
    passes.register(EveryProducer("first"))
    passes.register(EveryProducer("second"))
    assert rewrite_one(relu_site, X, W)[1].rule == "first"
    passes.unregister("first")
    assert rewrite_one(relu_site, X, W)[1].rule == "second"
    passes.unregister("second")
    assert rewrite_one(relu_site, X, W)[1].rule == "relu_matmul"


def test_it_can_be_disabled_by_name() -> None:
    passes.register(EveryProducer("mine"))
    _, decision = rewrite_one(relu_site, X, W, options={"disabled_rules": "mine"})
    assert (decision.rule, decision.reason) == ("mine", Reason.RULE_DISABLED)


@pytest.mark.parametrize("name", ["relu_matmul", "sparse_cleanup", "mine"])
def test_names_are_unique(name: str) -> None:
    passes.register(EveryProducer("mine"))
    with pytest.raises(SparseError, match=f"a pass called '{name}' exists"):
        passes.register(EveryProducer(name))
    assert [rule.name for rule in passes.registered()] == ["mine"]


def test_bad_names_are_refused() -> None:
    with pytest.raises(SparseError, match="EveryProducer needs a name"):
        passes.register(EveryProducer(""))
    with pytest.raises(SparseError, match="no registered rule is called 'relu_matmul'"):
        passes.unregister("relu_matmul")


def key_with(rule: passes.Rule) -> object:
    """The cache key of a pass made while ``rule`` is registered."""
    passes.register(rule)
    sparse_pass = SparsePass({})
    passes.unregister(rule.name)
    return sparse_pass.uuid()


def load(path: Path, patch: pytest.MonkeyPatch) -> passes.Rule:
    spec = importlib.util.spec_from_file_location("their_rules", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, "their_rules", module)
    spec.loader.exec_module(module)
    rule = module.FromFile()
    assert isinstance(rule, passes.Rule)
    return rule


def test_keys_follow_the_attributes_of_a_rule() -> None:
    plain = SparsePass({}).uuid()
    mine = key_with(EveryProducer("mine"))
    assert mine == key_with(EveryProducer("mine"))
    assert len({plain, mine, key_with(EveryProducer("other"))}) == 3
    assert SparsePass({}).uuid() == plain


def test_keys_follow_the_source_of_a_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for folder, source in [("a", SOURCE), ("b", SOURCE), ("c", SOURCE + "# edited\n")]:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "their_rules.py"
        path.write_text(source)
        keys.append(key_with(load(path, monkeypatch)))
    assert keys[0] == keys[1] != keys[2]


def test_a_rule_without_a_source_is_not_cached() -> None:
    namespace: dict[str, Any] = {"__name__": "<prompt>"}
    exec(SOURCE, namespace)
    assert key_with(namespace["FromFile"]()) is None
