"""Compiled variants of one model: backend x Inductor settings.

A dense baseline is only worth beating at its best, so both sides are compiled under
every setting of :data:`SETTINGS` and the fastest of each side is compared.

Three traps are closed here.  Freezing is a *global* that Dynamo reads while it traces,
so it is patched around the compilation, not passed as an option.  Dynamo keeps compiled
graphs per code object and does not tell a frozen graph from a plain one, so every
variant gets its own code object.  A warm compile cache would skip the passes and with
them the record of what was applied, so caches are off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inductor_sparse import decisions
from inductor_sparse.errors import NothingAppliedError

WARMUP_CALLS = 6


@dataclasses.dataclass(frozen=True)
class Setting:
    """Inductor settings a user can choose between without changing the model."""

    name: str
    freezing: bool
    max_autotune: bool


SETTINGS = (
    Setting("default", freezing=False, max_autotune=False),
    Setting("freezing", freezing=True, max_autotune=False),
    Setting("max-autotune", freezing=False, max_autotune=True),
    Setting("freezing+max-autotune", freezing=True, max_autotune=True),
)


@dataclasses.dataclass
class Variant:
    """One compiled form of a model.

    ``call`` maps an input to the output.  ``log`` has received the decisions of every
    graph compiled so far; it stays empty for the dense backend.
    """

    backend: str
    setting: Setting
    call: Callable[[Tensor], Tensor]
    log: decisions.DecisionLog

    def run(self, inputs: Sequence[Tensor]) -> Callable[[int], object]:
        """A function that calls the variant on the input whose turn it is."""
        return lambda round_index: self.call(inputs[round_index % len(inputs)])

    @property
    def last_graph(self) -> decisions.GraphDecisions | None:
        """The decisions of the graph compiled last: the one that runs now."""
        return self.log.graphs[-1] if self.log.graphs else None

    def status(self) -> tuple[str, str | None]:
        """``("applied", None)`` or ``("dense", reason)``.

        Raises:
            NothingAppliedError: no site was even considered, so that the two sides of
                the comparison are one graph and their ratio would mean nothing.
        """
        graph = self.last_graph
        if graph is not None and graph.applied:
            return "applied", None
        if graph is None or not graph.decisions:
            raise NothingAppliedError(
                "the sparse variant has no FFN site, so there is nothing to compare; "
                "run `python -m inductor_sparse passes` to see what is recognised"
            )
        reason = graph.decisions[0].reason
        return "dense", reason.value if reason is not None else None


def compile_variant(
    model: nn.Module, backend: str, setting: Setting, inputs: Sequence[Tensor]
) -> Variant:
    """Compile ``model`` for the shape of ``inputs`` and warm it up on them.

    Args:
        model: in eval mode; run without gradients.
        backend: ``inductor`` or ``sparse``.
        setting: one of :data:`SETTINGS`.
        inputs: one or more inputs of one shape.
    """
    step = _own_code(model, f"{backend}_{setting.name}")
    options: dict[str, Any] = {"max_autotune": setting.max_autotune}
    compiled = torch.compile(step, backend=backend, dynamic=False, options=options)
    log = decisions.DecisionLog()

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(x)

    variant = Variant(backend, setting, call, log)
    with _settings(setting), _collect_into(log):
        for index in range(max(WARMUP_CALLS, len(inputs))):
            call(inputs[index % len(inputs)])
    return variant


@contextlib.contextmanager
def watch(variant: Variant) -> Iterator[None]:
    """Log recompilations made inside the block, and make them under the settings."""
    with _settings(variant.setting), _collect_into(variant.log):
        yield


def release() -> None:
    """Free every compiled graph, and with it the packed weights of frozen ones.

    Inductor keeps the modules it generates in ``sys.modules``, and a frozen graph's
    weights are attributes of its module: without this a sweep grows by gigabytes.
    """
    from torch._inductor.codecache import PyCodeCache

    torch.compiler.reset()
    for module in PyCodeCache.modules:
        sys.modules.pop(module.__name__, None)
    PyCodeCache.cache_clear()
    gc.collect()


def _own_code(model: nn.Module, label: str) -> Callable[[Tensor], Tensor]:
    """A function that calls ``model`` and shares its code object with no other."""

    def step(x: Tensor) -> Tensor:
        return model(x)

    code = step.__code__.replace(co_name=label)
    return types.FunctionType(code, step.__globals__, label, None, step.__closure__)


@contextlib.contextmanager
def _settings(setting: Setting) -> Iterator[None]:
    """Inductor's globals for one variant: freezing, no caches, silent autotuning."""
    import torch._inductor.config as inductor_config

    patches = {
        "freezing": setting.freezing,
        "force_disable_caches": True,
        "autotune_num_choices_displayed": 0,
    }
    with inductor_config.patch(patches):
        yield


@contextlib.contextmanager
def _collect_into(log: decisions.DecisionLog) -> Iterator[None]:
    """Append the graphs compiled inside the block to ``log``."""
    with decisions.collect() as fresh:
        try:
            yield
        finally:
            for graph in fresh.graphs:
                log.add(graph)
