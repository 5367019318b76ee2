"""``torch.compile(model, backend="sparse")``: options, passes, then Inductor.

Everything that Inductor does is kept, because Inductor does it: training, inference,
freezing, dynamic shapes, modes, autotuning, caches, CUDA graphs.  One graph pass is
added to the slot for joint graphs, after the user's own, and a few ops get a lowering.
"""

from __future__ import annotations

import difflib
import logging
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from inductor_sparse import _compat, config, lowerings
from inductor_sparse.decisions import GraphDecisions, record
from inductor_sparse.dumps import DumpWriter
from inductor_sparse.errors import NothingAppliedError, SparseOptionError
from inductor_sparse.passes.joint_pass import SparsePass
from inductor_sparse.runtime import adaptation, prepared_weights, site_energy
from inductor_sparse.runtime.watched_weights import watched

log = logging.getLogger(__name__)

PREFIX = "sparse."
_SLOT = "joint_custom_pre_pass"
_cache_was_announced = False


def sparse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with sparse rewrites; the entry point of the backend.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: as for ``backend="inductor"``.
        options: ``sparse.*`` are ours, everything else is Inductor's own.
        kwargs: what newer versions of torch add; not needed here.

    Raises:
        SparseOptionError: an option is unknown, or has the wrong type or value.
        NothingAppliedError: ``sparse.strict`` is set and no site was rewritten.
        SparsePlanError: the plan cannot be read or belongs to another model.
    """
    ours, inductors = split_options(options)
    snapshot = {**config.get_config_copy(), **ours}
    patches = dict(torch._TorchCompileInductorWrapper(mode, inductors, None).config)
    _warn_about_freezing(patches)
    if snapshot["strict"] or snapshot["dump_dir"]:
        # Both have to see the passes run; a cached graph has none.
        patches["force_disable_caches"] = True
    on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs)
    if on_gpu:
        patches = {**_compat.epilogue_fusion_options(), **patches}
    code = _compat.frame_code() if snapshot["adaptive"] else None
    lowerings.register_all()
    sparse_pass = install_pass(patches, snapshot, gm, example_inputs, code)
    with config.patch(ours):  # lowerings are handed no options, and ask for them
        compiled = compile_fx(
            gm,
            list(example_inputs),
            inner_compile=_inner_compile(snapshot, sparse_pass),
            config_patches=patches,
        )
    _announce(sparse_pass, strict=snapshot["strict"])
    compiled = watched(compiled, example_inputs)
    if on_gpu:
        limit = snapshot["max_dropped_energy"]
        compiled = site_energy.observed(compiled, limit, example_inputs)
    return adaptation.observed(compiled, code)


def reset() -> None:
    """Forget what was learned at run time; called by ``torch._dynamo.reset()``."""
    adaptation.reset()
    prepared_weights.forget(graphs_are_gone=True)
    reset_cudagraphs = getattr(
        torch._TorchCompileInductorWrapper(None, {}, None), "reset", None
    )
    if reset_cudagraphs is not None:
        reset_cudagraphs()


sparse.reset = reset  # type: ignore[attr-defined]


def inductor_configs(**options: Any) -> dict[str, Any]:
    """Inductor options that bring the same passes where no backend is asked.

    ``torch._inductor.aoti_compile_and_package(program,
    inductor_configs=inductor_sparse.inductor_configs())``.  Weights are frozen, so that
    their row-contiguous copies are made while compiling and packaged.

    Args:
        options: ``sparse.*`` options without the prefix, e.g. ``disabled_rules="..."``;
            Inductor's own go into the returned dict.

    Returns:
        A new dict; options of Inductor may be added to it.

    Raises:
        SparseOptionError: an option is unknown, or has the wrong type or value.
    """
    ours, _ = split_options({f"{PREFIX}{name}": v for name, v in options.items()})
    snapshot = {**config.get_config_copy(), **ours, "adaptive": False}
    lowerings.register_all()
    patches: dict[str, Any] = {"freezing": True}
    install_pass(patches, snapshot)
    return patches


def split_options(
    options: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split into our options, without their prefix, and Inductor's; ours are checked.

    Raises:
        SparseOptionError: one of ours is unknown, has the wrong type or value, or
            does nothing without another one.
    """
    ours: dict[str, Any] = {}
    inductors: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if not key.startswith(PREFIX):
            inductors[key] = value
            continue
        name = key.removeprefix(PREFIX)
        _check_option(name, value)
        ours[name] = float(value) if name in _FLOATS else value
    quantize = ours.get("quantize", config.quantize)
    if ours.get("quantize_scales") == "predicted" and quantize != "fp8":
        raise SparseOptionError(
            f'option "{PREFIX}quantize_scales": "predicted" needs '
            f'"{PREFIX}quantize": "fp8"'
        )
    return ours, inductors


def _types() -> dict[str, type]:
    hints = typing.get_type_hints(config)
    return {name: hints[name] for name in config.HELP}


_FLOATS = frozenset(name for name, kind in _types().items() if kind is float)


def _check_option(name: str, value: object) -> None:
    types = _types()
    if name not in types:
        near = difflib.get_close_matches(name, types, n=1, cutoff=0.4)
        hint = f' did you mean "{PREFIX}{near[0]}"?' if near else ""
        known = ", ".join(f"{PREFIX}{known}" for known in sorted(types))
        raise SparseOptionError(
            f'unknown option "{PREFIX}{name}";{hint} known options: {known}'
        )
    expected = types[name]
    accepted = (int, float) if expected is float else (expected,)
    if not isinstance(value, accepted) or (
        isinstance(value, bool) and expected is not bool
    ):
        raise SparseOptionError(
            f'option "{PREFIX}{name}" takes {expected.__name__}, '
            f"got {type(value).__name__} {value!r}"
        )
    choices = config.CHOICES.get(name)
    if choices is not None and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
        raise SparseOptionError(
            f'option "{PREFIX}{name}" takes one of {choices}, got {value!r}; '
            f"the nearest is {near[0]!r}"
        )


def install_pass(
    patches: dict[str, Any],
    options: Mapping[str, Any],
    gm: fx.GraphModule | None = None,
    example_inputs: Sequence[Any] = (),
    code: types.CodeType | None = None,
) -> SparsePass:
    """Put our pass into ``patches``, behind the user's own, and return it.

    Args:
        patches: Inductor options of one compilation; changed in place.
        options: all ``sparse.*`` options, without their prefix.
        gm: the graph that Dynamo captured, if there is one.
        example_inputs: its inputs.
        code: the code object it came from, for what was learned about it at run time.

    Raises:
        SparsePlanError: the plan cannot be read.
    """
    users = patches.get(_SLOT, getattr(inductor_config, _SLOT))
    # A copy of these could go stale: tensors made under inference_mode count no
    # versions, and fully_shard gathers a weight anew without counting one.
    gathered = _compat.gathered_parameters()
    untracked = frozenset(
        position
        for position, value in enumerate(example_inputs)
        if isinstance(value, torch.Tensor)
        and (value.is_inference() or id(value) in gathered)
    )
    sparse_pass = patches[_SLOT] = SparsePass(
        options,
        _compat.as_pass_tuple(users),
        demoted=adaptation.demoted(code),
        untracked_positions=untracked,
        dynamo_graph=gm,
    )
    return sparse_pass


def _inner_compile(
    snapshot: Mapping[str, Any], sparse_pass: SparsePass
) -> Callable[..., Any]:
    """``compile_fx_inner``, which also dumps the generated code if that is wanted."""
    if not snapshot["dump_dir"]:
        return compile_fx_inner

    def compile_and_dump(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        output = compile_fx_inner(gm, *args, **kwargs)
        writer: DumpWriter | None = sparse_pass.writer
        source = getattr(output, "source_code", None)
        if writer is not None and source:
            kind = "backward" if kwargs.get("is_backward") else "forward"
            writer.generated_code(kind, source)
            writer.finish()
        return output

    return compile_and_dump


def _announce(sparse_pass: SparsePass, *, strict: bool) -> None:
    """Say that a graph came from a cache; enforce ``strict`` on one that did not."""
    global _cache_was_announced
    if not sparse_pass.graphs:
        record(GraphDecisions(_compat.aot_graph_name(), from_cache=True))
        level = logging.DEBUG if _cache_was_announced else logging.WARNING
        _cache_was_announced = True
        log.log(
            level,
            "inductor_sparse: a compiled graph was loaded from Inductor's cache, so no "
            "pass ran and no decision is recorded for it; inductor_sparse.explain() "
            "does not use caches and shows the sites of a model",
        )
        return
    graph = sparse_pass.graphs[-1]
    if strict and not graph.applied and (graph.decisions or graph.other_matmuls):
        reasons = [f"  {d.site}: {d.reason.value}" for d in graph.decisions if d.reason]
        raise NothingAppliedError(
            f"sparse.strict: no site of graph {graph.graph} was rewritten "
            f"({graph.other_matmuls} matmuls have no sparse producer)"
            + "".join(f"\n{line}" for line in reasons)
        )


def _warn_about_freezing(patches: Mapping[str, Any]) -> None:
    if patches.get("freezing") and not inductor_config.freezing:
        log.warning(
            'options={"freezing": True} has no effect: Dynamo reads the global '
            "setting; set torch._inductor.config.freezing = True or "
            "TORCHINDUCTOR_FREEZING=1"
        )
