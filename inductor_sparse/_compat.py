"""Every difference between torch versions: found by looking, not by version."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

GraphPass = Callable[[fx.Graph], Any]


def as_pass_tuple(passes: Any) -> tuple[GraphPass, ...]:
    """The graph passes in one of Inductor's slots: none, one, or several.

    Older torch allows one per slot; calling the members in order serves both.
    """
    if passes is None:
        return ()
    if isinstance(passes, (list, tuple)):
        return tuple(passes)
    return (passes,)


@functools.cache
def has_matrix_units() -> bool:
    """Whether the CPU multiplies tiles of bf16 (AMX), as dense products of torch do."""
    found = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(found())


def size_hint(size: int | torch.SymInt) -> int | None:
    """The value a size had when it was traced, or None; never adds a guard."""
    if isinstance(size, int):
        return size
    node = size.node
    if getattr(node, "has_hint", lambda: False)():
        hint = node.hint
        return int(hint) if isinstance(hint, int) else None
    return None


def decide(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds, guarded so that it stays true if it is now.

    Without a guard where none can be had: sizes of an exported program, whose guards
    are closed, count by what they were when it was traced; a size that comes out of
    data counts only if nothing else is possible.
    """
    if isinstance(condition, bool):
        return condition
    node = condition.node
    if not getattr(node, "has_hint", lambda: False)():
        return bool(statically_known_true(condition))
    if getattr(node.shape_env, "frozen", False):
        return bool(node.hint)
    return bool(condition)


def run_observed(gm: fx.GraphModule, name: str, graph_pass: GraphPass) -> bool:
    """Run ``graph_pass`` so that ``disabled_passes`` and the bisector can refuse it.

    Returns whether it ran: the observer itself does not say.
    """
    ran = False

    def observed(graph: fx.Graph) -> None:
        nonlocal ran
        ran = True
        graph_pass(graph)

    observer = GraphTransformObserver(gm, name, subsystem="joint_graph_passes")
    observer.apply_graph_pass(observed)
    return ran


HAS_DESCRIPTORS = find_spec("torch._functorch._aot_autograd.descriptors") is not None
"""Whether AOTAutograd describes the inputs of the graphs it traces."""


def input_descriptor(placeholder: fx.Node) -> tuple[str, int | None]:
    """What AOTAutograd says a placeholder is: its descriptor's class name and index.

    A tensor inside another one (the local part of a DTensor) is described by the input
    that it is part of.  ``("", None)`` where this torch, or this graph (the branch of a
    higher-order op), carries no descriptors.
    """
    descriptor: Any = placeholder.meta.get("desc")
    while type(descriptor).__name__ == "SubclassGetAttrAOTInput":
        descriptor = descriptor.base
    if descriptor is None:
        return "", None
    return type(descriptor).__name__, getattr(descriptor, "idx", None)


def traced_static_positions() -> frozenset[int]:
    """Input positions that AOTAutograd knows to be parameters or buffers.

    Known while an inference graph is compiled; empty for a joint graph, because torch
    fills the metadata in only after partitioning.
    """
    context = torch._guards.TracingContext.try_get()
    metadata = getattr(context, "fw_metadata", None)
    return frozenset(getattr(metadata, "static_input_indices", None) or ())


def gathered_parameters() -> frozenset[int]:
    """The ``id`` of each parameter of a module that ``fully_shard`` has sharded.

    Nothing is imported for it: where nobody has imported the package that shards
    modules, none is sharded.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    states = sys.modules.get("torch.distributed._composable_state")
    if kind is None:
        return frozenset()
    modules = list(getattr(states, "_module_state_mapping", ()))
    sharded = (module for module in modules if isinstance(module, kind))
    return frozenset(id(p) for module in sharded for p in module.parameters())


def is_tracing() -> bool:
    """Whether structured traces (``TORCH_TRACE``, read with tlparse) are collected."""
    logger = getattr(torch._logging._internal, "trace_log", None)
    return bool(getattr(logger, "handlers", None))


def has_cpp_wrapper() -> bool:
    """Whether C++ calls the kernels: in an AOTInductor package, or by option."""
    from torch._inductor import config
    from torch._inductor.virtualized import V

    return V.aot_compilation is True or bool(config.cpp_wrapper)


def uses_cuda_graphs() -> bool:
    """Whether what is compiled will be captured in CUDA graphs."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def has_own_dependent_launches() -> bool:
    """Whether Inductor launches its own kernels before the ones before have ended."""
    from torch._inductor import config

    return bool(getattr(config.triton, "enable_pdl", False))


def discards_parameters() -> bool:
    """Whether freezing erases the parameters of the model that is being compiled."""
    from torch._inductor import config

    discards = config.freezing and config.freezing_discard_parameters
    return bool(discards) and not torch.is_grad_enabled()


def aot_graph_name() -> str:
    """The name Inductor's own dumps give the graph being compiled, or ``"graph"``."""
    context = torch._guards.TracingContext.try_get()
    if context is None or not getattr(context, "aot_graph_name", None):
        return "graph"
    from torch._functorch.aot_autograd import get_aot_graph_name

    return get_aot_graph_name()


def frame_code() -> types.CodeType | None:
    """The code object that Dynamo is compiling, or None where there is none to find."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:  # not inside Dynamo
        return None
    code = getattr(translator, "f_code", None)
    return code if isinstance(code, types.CodeType) else None


def recompile_on_next_call(code: types.CodeType) -> None:
    """Drop what Dynamo compiled for ``code``."""
    from torch._C._dynamo.eval_frame import reset_code

    reset_code(code)


def compile_apart(model: Any, backend: Callable[..., Any]) -> Any:
    """``torch.compile`` whose graphs, where torch can tell, nobody else's limits count.

    Without it every compilation of one code object counts, whichever backend asked.
    """
    accepted = inspect.signature(torch.compile).parameters
    apart: dict[str, Any] = {}
    if "isolate_recompiles" in accepted:
        apart["isolate_recompiles"] = True
    return torch.compile(model, backend=backend, **apart)


def is_deterministic() -> bool:
    """Whether Inductor is told to choose nothing by measuring it."""
    from torch._inductor import config

    return bool(getattr(config, "deterministic", False))


def measuring_in_this_process() -> Any:
    """A context in which Inductor measures candidates here, one after the other.

    Its child processes know how to run its own kinds of candidates only.
    """
    from torch._inductor import config

    here = {"autotune_in_subproc": False, "pipeline_max_autotune_gemm": False}
    return config.patch({name: here[name] for name in here if hasattr(config, name)})


def epilogue_fusion_options() -> dict[str, Any]:
    """Inductor options that fusing behind a view of a matrix product takes on a GPU.

    Older torch compares loops of ``[M, N]`` and of ``[batch, tokens, N]`` as they are,
    unless it is told to merge them first.
    """
    from torch._inductor import scheduler

    if hasattr(scheduler, "_is_epilogue_fusion_enabled"):
        return {}
    return {"loop_ordering_after_fusion": False}
