"""The one object installed in Inductor's ``joint_custom_pre_pass`` slot.

There, inference and training share the passes, and the partitioner decides afterwards
what the backward keeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from inductor_sparse import decisions, passes
from inductor_sparse._compat import (
    aot_graph_name,
    as_pass_tuple,
    input_descriptor,
    traced_static_positions,
)
from inductor_sparse.decisions import GraphDecisions, Reason
from inductor_sparse.passes.base import Observer, PassContext
from inductor_sparse.passes.sites import is_tangent_name

if TYPE_CHECKING:
    from inductor_sparse.plan import Plan

_PACKAGE = Path(__file__).resolve().parent.parent


class SparsePass(CustomGraphPass):
    """Runs the user's own pass, then :data:`inductor_sparse.passes.PIPELINE`.

    Args:
        options: the ``sparse.*`` options, without their prefix.
        user_pass: what the slot held before: None, a pass, or a sequence of passes.
        dynamo_graph: the graph Dynamo handed to the backend, and
        inputs: its inputs; they tell which inputs are parameters, and which of those
            are inference tensors.  Without them (export) parameters are still found
            where AOTAutograd says so, or as attributes of the graph.
        plan: measurements by site, or None.
        demoted: sites that must stay dense, with the reason.
        observe: makes, from the name of a graph, the observers of its passes.
        on_graph: called with the decisions of each graph after they were recorded.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        user_pass: Any = None,
        dynamo_graph: fx.GraphModule | None = None,
        inputs: Sequence[object] = (),
        plan: Plan | None = None,
        demoted: Mapping[str, Reason] | None = None,
        observe: Callable[[str], list[Observer]] | None = None,
        on_graph: Callable[[GraphDecisions], None] | None = None,
    ) -> None:
        self.options = dict(options)
        self.user_passes = as_pass_tuple(user_pass)
        self.plan = plan
        self.demoted = dict(demoted or {})
        self.observe = observe
        self.on_graph = on_graph
        self._static = static_positions(dynamo_graph)
        self._untracked = frozenset(
            i
            for i, value in enumerate(inputs)
            if isinstance(value, torch.Tensor) and value.is_inference()
        )

    def __call__(self, graph: fx.Graph, *args: Any, **kwargs: Any) -> None:
        """Run on one graph; branches of higher-order ops get the user's pass only."""
        for user_pass in self.user_passes:
            user_pass(graph, *args, **kwargs)
        if is_branch(graph):
            return
        record = GraphDecisions(aot_graph_name())
        passes.run(graph, self.context(graph, record))
        decisions.record(record)
        if self.on_graph is not None:
            self.on_graph(record)

    def context(self, graph: fx.Graph, record: GraphDecisions) -> PassContext:
        """What the passes know about ``graph`` besides the graph."""
        inputs = graph.find_nodes(op="placeholder")
        return PassContext(
            options=self.options,
            graph=record,
            is_training=any(is_tangent_name(node.name) for node in inputs),
            static_inputs=static_inputs(inputs, self._static),
            untracked_inputs=frozenset(
                node.name
                for position, node in enumerate(inputs)
                if _dynamo_position(node, position) in self._untracked
            ),
            plan=self.plan,
            demoted=self.demoted,
            observers=self.observe(record.graph) if self.observe else [],
        )

    def uuid(self) -> Any:
        """What a compiled graph depends on through us; None if a user pass hides it."""
        user_ids = [getattr(p, "uuid", lambda: None)() for p in self.user_passes]
        if any(user_id is None for user_id in user_ids):
            return None
        options = sorted((name, repr(value)) for name, value in self.options.items())
        plan = self.plan.to_dict() if self.plan is not None else None
        demoted = sorted((site, reason.value) for site, reason in self.demoted.items())
        parts = (source_hash(), options, plan, demoted, user_ids)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@lru_cache(1)
def source_hash() -> str:
    """A hash of every source file and template of this package."""
    return hash_files(path for path in _PACKAGE.rglob("*") if path.is_file())


def hash_files(paths: Iterable[Path]) -> str:
    """A hash of the names and contents of files, bytecode left out."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        if "__pycache__" not in path.parts:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def is_branch(graph: fx.Graph) -> bool:
    """Whether a graph is the body of a higher-order op rather than a whole one.

    AOTAutograd describes the inputs of the graphs it traces, but not of the bodies.
    """
    tensors = [
        node
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    return bool(tensors) and not any(input_descriptor(node)[0] for node in tensors)


def static_positions(dynamo_graph: fx.GraphModule | None) -> frozenset[int]:
    """Positions of Dynamo's inputs that keep their address: parameters and buffers."""
    if dynamo_graph is None:
        return frozenset()
    inputs = dynamo_graph.graph.find_nodes(op="placeholder")
    return frozenset(
        position
        for position, node in enumerate(inputs)
        if (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    )


def static_inputs(
    placeholders: Sequence[fx.Node], dynamo_static: frozenset[int]
) -> frozenset[str]:
    """Names of the placeholders of an AOT graph that are parameters or buffers.

    AOTAutograd may lift parameters to the front (freezing) or drop duplicates (tied
    weights), so positions are taken from its descriptors, not from the order.
    """
    traced = traced_static_positions()
    return frozenset(
        node.name
        for position, node in enumerate(placeholders)
        if input_descriptor(node)[0] in ("ParamAOTInput", "BufferAOTInput")
        or _dynamo_position(node, position) in dynamo_static
        or position in traced
    )


def _dynamo_position(placeholder: fx.Node, position: int) -> int | None:
    kind, index = input_descriptor(placeholder)
    if kind == "PlainAOTInput":
        return index
    return position if not kind else None
