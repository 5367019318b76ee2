"""The one object installed in Inductor's ``joint_custom_pre_pass`` slot.

There, inference and training share the passes, and the partitioner decides afterwards
what the backward keeps.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from inductor_sparse import decisions, passes
from inductor_sparse._compat import (
    HAS_DESCRIPTORS,
    aot_graph_name,
    input_descriptor,
    is_tracing,
    traced_static_positions,
)
from inductor_sparse._compat import GraphPass as GraphPassFunction
from inductor_sparse.decisions import GraphDecisions
from inductor_sparse.dumps import DumpWriter
from inductor_sparse.passes.base import Observer, PassContext
from inductor_sparse.passes.rule_identity import rule_identity
from inductor_sparse.passes.sites import is_tangent_name
from inductor_sparse.plan import Plan

_PACKAGE = Path(__file__).resolve().parent.parent


class SparsePass(CustomGraphPass):
    """Runs the user's own passes, then :func:`inductor_sparse.passes.pipeline`.

    Args:
        options: the ``sparse.*`` options, without their prefix.
        user_passes: what the slot held before; they run first.
        demoted: sites that were too dense at run time, and from how many tokens on;
            None if no such site could be compiled again.
        untracked_positions: positions of Dynamo's inputs whose changes go unnoticed.
        dynamo_graph: the graph Dynamo handed to the backend; it tells which inputs are
            parameters.  An inference graph, or an exported one, says so itself.

    ``graphs`` holds the decisions of each graph it ran on; it stays empty when a
    compiled graph comes from a cache.  ``writer`` is the dump of the last graph.

    Raises:
        SparsePlanError: the plan file of ``options["plan"]`` cannot be read.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        user_passes: Sequence[GraphPassFunction] = (),
        *,
        demoted: Mapping[str, int] | None = None,
        untracked_positions: frozenset[int] = frozenset(),
        dynamo_graph: fx.GraphModule | None = None,
    ) -> None:
        self.options = dict(options)
        self.user_passes = tuple(user_passes)
        self.demoted = None if demoted is None else dict(demoted)
        self.graphs: list[GraphDecisions] = []
        self.writer: DumpWriter | None = None
        path = str(self.options.get("plan", ""))
        self._plan = Plan.load(path) if path else None
        # Looked up once: what runs and what the cache key names must be the same.
        self._steps, self._rules = passes.pipeline(), passes.registered()
        self._static = static_positions(dynamo_graph)
        self._untracked = untracked_positions

    def __call__(self, graph: fx.Graph, *args: Any, **kwargs: Any) -> None:
        """Run on one graph; branches of higher-order ops get the user's passes only.

        Raises:
            SparsePlanError: the plan was made for another model.
        """
        for user_pass in self.user_passes:
            user_pass(graph, *args, **kwargs)
        if is_branch(graph):
            return
        record = GraphDecisions(aot_graph_name())
        self.writer = DumpWriter(str(self.options.get("dump_dir", "")), record.graph)
        passes.run(graph, self.context(graph, record), self._steps)
        if self._plan is not None:
            self._plan.check_matches(decision.site for decision in record.decisions)
        self.writer.decisions(record)
        self.writer.finish()
        self.graphs.append(record)
        decisions.record(record)

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
            plan=self._plan,
            demoted=self.demoted,
            observers=self._observers(),
        )

    def _observers(self) -> list[Observer]:
        # Printing a graph costs more than most passes: only for someone who reads it.
        logged = logging.getLogger(passes.__name__).isEnabledFor(logging.INFO)
        watched = bool(self.options.get("dump_dir")) or logged or is_tracing()
        return [self.writer.on_pass] if watched and self.writer is not None else []

    def uuid(self) -> Any:
        """What a compiled graph depends on through us; None if that is not known.

        A user's pass without a ``uuid`` hides it, and so does a rule without a source.
        """
        user_ids = [getattr(p, "uuid", lambda: None)() for p in self.user_passes]
        user_ids += [rule_identity(rule) for rule in self._rules]
        if any(user_id is None for user_id in user_ids):
            return None
        options = sorted((name, repr(value)) for name, value in self.options.items())
        plan = self._plan.to_dict() if self._plan is not None else None
        demoted = None if self.demoted is None else sorted(self.demoted.items())
        untracked = sorted(self._untracked)
        parts = (source_hash(), options, plan, demoted, untracked, user_ids)
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
    described = any(input_descriptor(node)[0] for node in tensors)
    return HAS_DESCRIPTORS and bool(tensors) and not described


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
