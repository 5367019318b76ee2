"""Aten graphs like those Inductor's joint passes see, without compiling anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from torch import Tensor, fx
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_sparse import passes
from inductor_sparse.decisions import Decision, GraphDecisions, Status
from inductor_sparse.passes.base import PassContext
from inductor_sparse.passes.joint_pass import SparsePass


def trace(
    fn: Callable[..., Tensor],
    *args: Any,
    device: str = "cpu",
    mode: str = "fake",
    decompose: bool = True,
) -> fx.GraphModule:
    """The aten graph of ``fn``, by default with Inductor's decompositions."""
    functional = torch.func.functionalize(fn, remove="mutations")
    table = select_decomp_table() if decompose else {}
    if device == "cpu":
        gm = make_fx(functional, table, tracing_mode=mode)(*args)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes = [torch.empty_like(arg, device=device) for arg in args]
            gm = make_fx(functional, table, tracing_mode="real")(*fakes)
    # As AOTAutograd does: decompositions that gave up leave their first steps behind.
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


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


def rewrite_skipping(act: Callable[[Tensor], Tensor], x: Tensor, w: Tensor) -> Decision:
    """Rewrite ``linear(act(x), w)``: only the product, which keeps its values."""
    gm, decision = rewrite_one(lambda x, w: F.linear(act(x), w), x, w)
    assert decision.status is Status.APPLIED
    (spmm,) = calls(gm, "activation_spmm")
    assert spmm.args[2] == "identity"
    assert calls(gm, "mm") == []
    # What the activation itself rounds is no business of the product.
    h = act(x)
    assert_within_budget(gm(x, w), F.linear(h, w), F.linear(h.double(), w.double()))
    return decision


@dataclasses.dataclass
class Compiled:
    """A function behind Dynamo and all of Inductor but code generation."""

    fn: Callable[..., Any]
    passes: list[SparsePass]
    graphs: list[fx.GraphModule]

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    @property
    def decisions(self) -> list[Decision]:
        return [d for p in self.passes for graph in p.graphs for d in graph.decisions]

    @property
    def forward(self) -> fx.GraphModule:
        """The forward, or inference, graph compiled first."""
        return self.graphs[0]


def compile_eagerly(
    model: Callable[..., Any],
    *,
    dynamic: bool | None = None,
    user_passes: Sequence[Any] = (),
    **options: Any,
) -> Compiled:
    """``model`` as the backend would compile it, except that graphs run eagerly."""
    torch._dynamo.reset()
    compiled = Compiled(model, [], [])

    def keep(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        compiled.graphs.append(gm)
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        untracked = frozenset(
            i
            for i, value in enumerate(inputs)
            if isinstance(value, Tensor) and value.is_inference()
        )
        sparse_pass = SparsePass(
            options, user_passes, untracked_positions=untracked, dynamo_graph=gm
        )
        compiled.passes.append(sparse_pass)
        patches = {"joint_custom_pre_pass": sparse_pass}
        return compile_fx(gm, inputs, inner_compile=keep, config_patches=patches)

    compiled.fn = torch.compile(model, backend=backend, dynamic=dynamic)
    return compiled


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
    """The graph, one node per line, for comparing it before and after."""
    lines = []
    for node in gm.graph.nodes:
        target = str(node.target).removesuffix(".default")
        arguments = ", ".join([*map(str, node.args), *map(str, node.kwargs.items())])
        lines.append(f"{node.name} = {target}({arguments})")
    return "\n".join(lines)
