"""Compiled variants of one model: backend x Inductor settings.

A dense baseline is only worth beating at its best, so both sides are compiled under
every setting of :data:`SETTINGS` and the fastest of each side is compared.

Three traps are closed here.  Freezing is a *global* that Dynamo reads while it traces,
so it is patched around the compilation, not passed as an option.  Dynamo keeps compiled
graphs per code object and does not tell a frozen graph from a plain one, so every
variant gets its own code object.  A warm graph cache would skip the passes and with
them the record of what was applied, so graph caches are off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inductor_sparse import decisions
from inductor_sparse.bench.models import Input, parts
from inductor_sparse.bench.rows import FEW_TOKENS
from inductor_sparse.errors import NothingAppliedError
from inductor_sparse.report.calibrate import calibrate

WARMUP_CALLS = 20
"""Of a variant after its first call: by then it has found out if it has to adapt."""
MANY_WARMUP_CALLS = 3
"""The same with many tokens on a GPU, where calls are long and nothing adapts."""
GRAPH_CACHES_OFF = {
    "fx_graph_cache": False,
    "fx_graph_remote_cache": False,
    "autotune_local_cache": False,
    "autotune_remote_cache": False,
}
"""Graphs are compiled and autotuned anew; equal kernels are not built twice."""

SILENCE = {
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}
HARMLESS_WARNING = "TypedStorage is deprecated"
"""Raised by torch's own autotuner."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Inductor settings a user can choose between without changing the model."""

    name: str
    freezing: bool
    max_autotune: bool

    def options(self, device: str) -> dict[str, Any]:
        """The options to compile with; freezing is none of them.

        On a GPU those of ``mode="max-autotune"``, without its CUDA graphs: both sides
        are captured by the timing itself.
        """
        if self.max_autotune and device == "cuda":
            return dict(torch._inductor.list_mode_options("max-autotune-no-cudagraphs"))
        return {"max_autotune": self.max_autotune}


SETTINGS = (
    Setting("default", freezing=False, max_autotune=False),
    Setting("freezing", freezing=True, max_autotune=False),
    Setting("max-autotune", freezing=False, max_autotune=True),
    Setting("freezing+max-autotune", freezing=True, max_autotune=True),
)


@dataclasses.dataclass
class Variant:
    """One compiled form of a model, or of a stack of them.

    ``call`` maps an input to the output.  ``log`` has received the decisions of every
    graph compiled so far; it stays empty for the dense backend.  ``modules`` are those
    that Inductor generated for it: the packed weights of a frozen graph live there.
    ``compile_s`` is the time of the first call: compilation and autotuning.
    """

    backend: str
    setting: Setting
    call: Callable[[Input], Any]
    log: decisions.DecisionLog
    modules: list[types.ModuleType]
    compile_s: float = 0.0

    def close(self) -> None:
        """Free the packed weights; the variant cannot be called any more."""
        self.call = _closed
        for module in self.modules:
            _drop_tensors(module)
        gc.collect()

    def run(self, inputs: Sequence[Input]) -> Callable[[int], object]:
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
                "run `python -m inductor_sparse passes` to see what is recognized"
            )
        reason = graph.decisions[0].reason
        return "dense", reason.value if reason is not None else None


def compile_variant(
    model: nn.Module,
    backend: str,
    setting: Setting,
    inputs: Sequence[Input],
    options: Mapping[str, Any] | None = None,
) -> Variant:
    """Compile ``model`` for the shape of ``inputs`` and warm it up on them.

    Args:
        model: in eval mode; run without gradients.
        backend: ``inductor`` or ``sparse``.
        setting: one of :data:`SETTINGS`.
        inputs: one or more inputs of one shape.
        options: further options of the backend, such as ``sparse.quantize``.
    """
    step = _step(model, f"{backend}_{setting.name}")
    device = parts(inputs[0])[0].device.type
    chosen = {**setting.options(device), **(options or {})}
    compiled = torch.compile(step, backend=backend, dynamic=False, options=chosen)

    def call(x: Input) -> Any:
        with torch.no_grad():
            return compiled(x)

    variant = Variant(backend, setting, call, decisions.DecisionLog(), [])
    with watch(variant):
        start = time.perf_counter()
        call(inputs[0])
        variant.compile_s = time.perf_counter() - start
        many = device != "cpu" and len(parts(inputs[0])[0]) > FEW_TOKENS
        warmup = MANY_WARMUP_CALLS if many else WARMUP_CALLS
        for index in range(max(warmup, len(inputs))):
            call(inputs[index % len(inputs)])
    return variant


@contextlib.contextmanager
def watch(variant: Variant) -> Iterator[None]:
    """Log recompilations made inside the block, and make them under the settings."""
    known = set(_generated_modules())
    with compiling(variant.setting), _collect_into(variant.log):
        yield
    modules = _generated_modules()
    variant.modules += [modules[name] for name in modules.keys() - known]


def release() -> None:
    """Free every compiled graph and every weight packed for one."""
    torch.compiler.reset()
    for name, module in _generated_modules().items():
        _drop_tensors(module)
        del sys.modules[name]
    gc.collect()


def _generated_modules() -> dict[str, types.ModuleType]:
    """The modules Inductor generated so far, by their full name."""
    prefix = "torch._inductor.runtime.compile_tasks."
    return {
        name: module
        for name, module in sys.modules.items()
        if name.startswith(prefix) and isinstance(module, types.ModuleType)
    }


def _closed(x: Input) -> Any:
    """Stands for the call of a closed variant."""
    raise RuntimeError("this variant was closed")


def _drop_tensors(module: types.ModuleType) -> None:
    """Delete a generated module's tensors: Inductor itself never lets them go."""
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor):
            delattr(module, name)


def save_plan(model: nn.Module, inputs: Sequence[Input], path: Path) -> None:
    """Measure every site of ``model`` on ``inputs`` and save the plan.

    Through a function as :func:`compile_variant` makes it: sites are found again by
    their path.
    """
    step = _step(model, "calibrate")
    calibrate(step, [(x,) for x in inputs], path)


def _step(model: nn.Module, label: str) -> Callable[[Input], Any]:
    """A function that calls ``model`` and shares its code object with no other."""

    def step(x: Input) -> Any:
        return model(x)

    return with_own_code(step, label)


def with_own_code(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """``function`` with a code object of its own, named ``label`` in traces."""
    code = function.__code__.replace(co_name=label)
    parts = (function.__globals__, label, function.__defaults__, function.__closure__)
    return types.FunctionType(code, *parts)


@contextlib.contextmanager
def compiling(setting: Setting) -> Iterator[None]:
    """Inductor's globals for one variant: freezing, no caches, silent autotuning."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    patches = {"freezing": setting.freezing, **GRAPH_CACHES_OFF, **SILENCE}
    known = {key: patches[key] for key in patches if hasattr(inductor_config, key)}
    with (
        inductor_config.patch(known),
        functorch_config.patch(enable_autograd_cache=False),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=HARMLESS_WARNING)
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
