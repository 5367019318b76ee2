"""Aten graphs like those Inductor's joint passes see, without compiling anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_sparse import passes
from inductor_sparse.decisions import Decision, GraphDecisions
from inductor_sparse.passes.base import PassContext

K, N = 8, 6


def trace(
    fn: Callable[..., Tensor], *args: Any, device: str = "cpu", mode: str = "fake"
) -> fx.GraphModule:
    """The decomposed aten graph of ``fn``; tensors become fake ones on ``device``."""
    functional = torch.func.functionalize(fn, remove="mutations")
    table = select_decomp_table()
    if device == "cpu":
        return make_fx(functional, table, tracing_mode=mode)(*args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty_like(arg, device=device) for arg in args]
        return make_fx(functional, table, tracing_mode="real")(*fakes)


def placeholders(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.find_nodes(op="placeholder")]


def rewrite(
    gm: fx.GraphModule, *, static: Sequence[int] = (), **context: Any
) -> GraphDecisions:
    """Run the pipeline; ``static`` are the positions of the inputs that are weights."""
    names = placeholders(gm)
    context.setdefault("options", {})
    context.setdefault("is_training", any("tangents" in name for name in names))
    context["static_inputs"] = frozenset(names[position] for position in static)
    record = GraphDecisions("test")
    passes.run(gm, PassContext(graph=record, **context))
    return record


def rewrite_one(
    fn: Callable[..., Tensor], *args: Any, **context: Any
) -> tuple[fx.GraphModule, Decision]:
    """Trace and rewrite ``fn``, of which every argument but the first is a weight."""
    device = context.pop("device", "cpu")
    gm = trace(fn, *args, device=device)
    context.setdefault("static", range(1, len(args)))
    record = rewrite(gm, **context)
    (decision,) = record.decisions
    return gm, decision


def joint_graphs(
    model: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    grad: bool = True,
) -> list[fx.GraphModule]:
    """The joint graphs (inference graphs if not ``grad``) that AOTAutograd traces."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    def partition(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        from torch._functorch.partitioners import default_partition

        graphs.append(gm)
        return default_partition(gm, inputs, **kwargs)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=(lambda gm, inputs: gm.forward) if grad else keep,
        bw_compiler=lambda gm, inputs: gm.forward,
        partition_fn=partition,
        inference_compiler=keep,
        decompositions=select_decomp_table(),
    )
    with nullcontext() if grad else torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    return graphs


def calls(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    """The calls of an op by its name, whatever its overload."""
    return [
        node
        for node in gm.graph.nodes
        if node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target.overloadpacket.__name__ == name
    ]


def listing(gm: fx.GraphModule) -> str:
    """The graph, one call per line, for comparing it before and after."""
    return "\n".join(node.format_node() or "" for node in gm.graph.nodes)


def within_budget(actual: Tensor, eager: Tensor, exact: Tensor) -> bool:
    """Whether ``actual`` is as close to a float64 result as ``eager`` is, times two."""
    eps = torch.finfo(eager.dtype).eps
    error = (actual.double() - exact).abs().max()
    allowed = 2 * (eager.double() - exact).abs().max() + 4 * eps * exact.abs().max()
    return bool(error <= allowed)
