"""Compile a model with the backend's passes, but run its graphs node by node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx

from inductor_sparse import _compat, config
from inductor_sparse.backend import install_pass, split_options
from inductor_sparse.decisions import GraphDecisions
from inductor_sparse.errors import SparseError
from inductor_sparse.report.measure import MeasuredGraph, MeasuringInterpreter
from inductor_sparse.report.preserve import preserved, shape_history_preserved

_INDUCTOR_PATCHES: dict[str, Any] = {
    # A graph from a cache has no decisions.
    "force_disable_caches": True,
    # What runs after our passes changes speed only, and here only costs time.
    "pattern_matcher": False,
    "cpp_wrapper": False,
    # Run node by node, a decomposed matrix-vector product would be as large as its
    # weight in float32.  The passes undo the decomposition anyway.
    "coordinate_descent_tuning": False,
}
_DYNAMO_PATCHES: dict[str, Any] = {
    # Every session compiles anew, on purpose: that is not a recompilation to limit.
    "recompile_limit": 2**31,
    "accumulated_recompile_limit": 2**31,
}


class MeasuringSession:
    """One model, compiled once for measuring; see :func:`measuring`."""

    def __init__(self, model: Any, options: Mapping[str, Any]) -> None:
        ours, inductors = split_options(options)
        wrapper = torch._TorchCompileInductorWrapper(None, inductors, None)
        self._inductor_options = dict(wrapper.config)
        self._options = {**config.get_config_copy(), **ours}
        self._model = _uncompiled(model)
        self._compiled = _compat.compile_apart(self._model, self._backend)
        self.graphs: list[MeasuredGraph] = []

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once, adding to :attr:`graphs`, and undo what it changed.

        Raises:
            SparseError: as the backend would, e.g. for a plan of another model.
        """
        with (
            preserved(self._model, (args, kwargs)),
            torch._dynamo.config.patch(_DYNAMO_PATCHES),
            torch.no_grad(),
        ):
            try:
                self._compiled(*args, **kwargs)
            except BackendCompilerFailed as error:
                if isinstance(error.inner_exception, SparseError):
                    raise error.inner_exception from None
                raise

    def _backend(
        self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        """Stands in for ``backend="sparse"``: same passes in the same place."""
        patches = {**self._inductor_options, **_INDUCTOR_PATCHES}
        code = _compat.frame_code() if self._options["adaptive"] else None
        # The counters of run-time adaptation would have nothing to count here.
        options = {**self._options, "adaptive": False}
        sparse_pass = install_pass(patches, options, gm, inputs, code)

        def interpret(graph: fx.GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
            return self._interpreted(graph, sparse_pass.graphs[-1])

        return compile_fx(
            gm, list(inputs), inner_compile=interpret, config_patches=patches
        )

    def _interpreted(
        self, gm: fx.GraphModule, decisions: GraphDecisions
    ) -> Callable[..., Any]:
        """What AOTAutograd may call instead of a compiled graph."""
        measured = MeasuredGraph(decisions)
        measured.put_in_order(gm)
        self.graphs.append(measured)

        def call(boxed: list[Any]) -> Any:
            args = list(boxed)
            boxed.clear()
            return MeasuringInterpreter(gm, measured).run(*args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


@contextlib.contextmanager
def measuring(
    model: Any, options: Mapping[str, Any] | None
) -> Iterator[MeasuringSession]:
    """A session for ``model``; what Dynamo learns about its sizes ends with it.

    Raises:
        SparseOptionError: an option is unknown or ill-typed.
        SparsePlanError: the plan in the options cannot be used.
    """
    with shape_history_preserved():
        yield MeasuringSession(model, options or {})


def _uncompiled(model: Any) -> Any:
    """The model behind a result of ``torch.compile``, or ``model`` itself."""
    for attribute in ("_orig_mod", "_torchdynamo_orig_callable"):
        model = getattr(model, attribute, model)
    return model
