"""``bench ffn``: the FFN sites, dense against sparse, over a grid of sizes.

For each model and number of tokens the dense side is compiled under every Inductor
setting and the fastest is kept as the baseline.  So is the sparse side: for each
density anew where it adapts to what it sees, else once.  The two are timed alternately
on rotating inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from inductor_sparse.bench import roofline
from inductor_sparse.bench.intervals import Ratio, median, paired_ratio
from inductor_sparse.bench.models import (
    Input,
    Model,
    ModelCase,
    Stack,
    dropped_energy,
    errors,
    measured_density,
    parts,
)
from inductor_sparse.bench.quantized import by_torchao, quantized
from inductor_sparse.bench.rows import FEW_TOKENS, Row, machine
from inductor_sparse.bench.timing import Call, Evictor, interleave, screen_us
from inductor_sparse.bench.variants import (
    SETTINGS,
    Setting,
    Variant,
    compile_variant,
    release,
    save_plan,
    watch,
)
from inductor_sparse.decisions import GraphDecisions, Tier
from inductor_sparse.errors import SparseError

Report = Callable[[str], object]
SETTLE_ATTEMPTS = 3
STACKED = 16
"""Models that a GPU runs one after another for a few tokens."""


class UnsettledError(SparseError, RuntimeError):
    """The sparse variant kept recompiling while it was being timed."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The grid of one run.

    ``seconds`` is the timing budget of a row; compilation and the choice among Inductor
    settings come on top.  ``options`` are given to the sparse backend.  ``done`` holds
    the :func:`row_key` of rows not to repeat.
    """

    cases: tuple[ModelCase, ...]
    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    seconds: float = 10.0
    settings: tuple[Setting, ...] = SETTINGS
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    done: frozenset[tuple[object, ...]] = frozenset()

    def size(self) -> int:
        """Number of rows still to be measured."""
        return sum(
            (*dataclasses.astuple(case), tokens, density) not in self.done
            for case in self.cases
            for tokens in self.tokens
            for density in self.densities
        )

    def remaining(self, case: ModelCase, tokens: int) -> tuple[float, ...]:
        """Densities still to be measured, lowest first.

        A site that meets a dense input may give up skipping for good, so a denser input
        must not come before a sparser one.
        """
        key = dataclasses.astuple(case)
        todo = [d for d in self.densities if (*key, tokens, d) not in self.done]
        return tuple(sorted(todo))


def row_key(row: Row) -> tuple[object, ...]:
    """What makes two rows the same measurement: every axis of the grid."""
    # Rows written before an axis existed have its default.
    axes = {field.name: field.default for field in dataclasses.fields(ModelCase)}
    case = (row.get(name, default) for name, default in axes.items())
    return (*case, row.get("tokens"), row.get("density"))


def tried(row: Row, settings: Sequence[Setting]) -> bool:
    """Whether all of ``settings`` were candidates in a row."""
    names = row.get("dense_candidates_us", ())
    return all(setting.name in names for setting in settings)


def run(sweep: Sweep, report: Report = lambda message: None) -> Iterator[Row]:
    """Measure the grid, yielding each row as soon as it is known.

    Args:
        sweep: what to measure.
        report: told in a few words what is going on, for a progress display.

    Raises:
        NothingAppliedError: the sparse backend found no site.
        UnsettledError: a variant never stopped recompiling.
    """
    for case in sweep.cases:
        todo = [(tokens, sweep.remaining(case, tokens)) for tokens in sweep.tokens]
        if not any(densities for _, densities in todo):
            continue
        models = [case.build()]
        for tokens, densities in todo:
            if densities:
                yield from _rows(sweep, case, models, tokens, densities, report)
                release()


def _rows(
    sweep: Sweep,
    case: ModelCase,
    models: list[Model],
    tokens: int,
    densities: Sequence[float],
    report: Report,
) -> Iterator[Row]:
    """The rows of one model at one number of tokens; ``models`` are made as needed."""
    stacked = case.device == "cuda" and tokens <= FEW_TOKENS
    while stacked and len(models) < STACKED:
        models.append(case.build(seed=len(models)))
    layers = models if stacked else models[:1]
    evict = Evictor(len(layers) * case.weight_bytes, case.device)
    bench = _Bench(sweep, case, layers, tokens, evict, report)
    first = bench.inputs(densities[0])
    dense = bench.fastest("inductor", first)
    rivals = roofline.rivals(case, layers, first)
    sparse: _Fastest | None = None
    for density in densities:
        inputs = bench.inputs(density)
        if sparse is not None and bench.adapts:
            sparse.variant.close()
            sparse = None
        sparse = sparse or bench.fastest("sparse", inputs)
        report(f"{bench.label}: timing at density {density:g}")
        row = bench.compare(dense, sparse, inputs, rivals)
        row["density"] = density
        single = [one for x in inputs for one in parts(x)]
        row["density_measured"] = measured_density(bench.model, single)
        yield row | roofline.fields(case, bench.model, single, row)


@dataclasses.dataclass(frozen=True)
class _Fastest:
    """The best candidate of one side by its ``name``; the ``medians`` of all, in us."""

    name: str
    variant: Variant
    medians: dict[str, float]
    compile_s: float = 0.0


@dataclasses.dataclass
class _Bench:
    """One model, or a stack of them, at one number of tokens."""

    sweep: Sweep
    case: ModelCase
    models: list[Model]
    tokens: int
    evict: Evictor
    report: Report

    @property
    def label(self) -> str:
        """The case in a few words."""
        gated = "gated " if self.case.gated else ""
        sizes = f"{self.case.features}x{self.case.hidden} M={self.tokens}"
        return f"{gated}{self.case.op} {self.case.dtype} {sizes}"

    @property
    def model(self) -> Model:
        """The model that stands for all."""
        return self.models[0]

    @property
    def adapts(self) -> bool:
        """Whether the sparse side may compile to something else for other data.

        By a plan, or because it watches its inputs.  With many tokens on a GPU it looks
        at shapes alone.
        """
        gpu = self.case.device == "cuda" and self.tokens > FEW_TOKENS
        return self.case.calibrated or not gpu

    def _forms(self, backend: str) -> dict[str, nn.Module]:
        """What one side may compile, by a prefix for the names of the settings."""
        if backend == "sparse" and not self.case.quantized_model:
            return {"": self._whole(self.models)}
        narrow = [quantized(model, self.case.quantize) for model in self.models]
        forms = {"": self._whole(narrow)}
        if self.case.quantize == "fp8":
            theirs = [one for one in map(by_torchao, self.models) if one is not None]
            if len(theirs) == len(self.models):
                forms["torchao, "] = self._whole(theirs)
        return forms

    @staticmethod
    def _whole(models: Sequence[nn.Module]) -> nn.Module:
        """What is compiled: a model, or all of them in turn."""
        return models[0] if len(models) == 1 else Stack(models)

    def _sparse_options(self, inputs: list[Input]) -> dict[str, Any]:
        """Options of the sparse backend."""
        options = dict(self.sweep.options)
        if self.case.device == "cuda":
            options["sparse.cuda_graphs"] = True
        if self.case.quantize != "none" and not self.case.quantized_model:
            options["sparse.quantize"] = self.case.quantize
        if self.case.calibrated:
            # Overwritten by every row: a plan is read while its graph is compiled.
            path = Path(tempfile.gettempdir(), f"inductor_sparse_bench_{os.getpid()}")
            save_plan(self._whole(self.models), inputs[:1], path)
            options["sparse.plan"] = str(path)
        return options

    def inputs(self, density: float) -> list[Input]:
        """Fresh inputs to rotate: many where a call is short, few where it is long."""
        if len(self.models) > 1:
            number = 4
        elif self.tokens <= FEW_TOKENS:
            number = 16
        else:
            number = 2 if self.case.device == "cuda" else 4
        seeds = itertools.count(1)

        def make(_: object) -> Tensor:
            return self.case.make_input(self.tokens, density, next(seeds))

        if len(self.models) == 1:
            return [make(turn) for turn in range(number)]
        return [tuple(map(make, self.models)) for _ in range(number)]

    def fastest(self, backend: str, inputs: list[Input]) -> _Fastest:
        """The fastest candidate of one side."""
        options = self._sparse_options(inputs) if backend == "sparse" else None
        best: _Fastest | None = None
        medians: dict[str, float] = {}
        compile_s = 0.0
        candidates = itertools.product(
            self._forms(backend).items(), self.sweep.settings
        )
        for (prefix, model), setting in candidates:
            name = f"{prefix}{setting.name}"
            self.report(f"{self.label}: compiling {backend}, {name}")
            try:
                variant = compile_variant(model, backend, setting, inputs, options)
                medians[name] = self.screen(variant, inputs)
            except RuntimeError:
                if prefix:  # somebody else's model is welcome, but need not work
                    continue
                raise
            compile_s += variant.compile_s
            loser: Variant | None = variant
            if best is None or medians[name] < medians[best.name]:
                loser = None if best is None else best.variant
                best = _Fastest(name, variant, medians)
            if loser is not None:
                loser.close()
        assert best is not None, "a sweep has at least one setting"
        return dataclasses.replace(best, compile_s=compile_s)

    def screen(self, variant: Variant, inputs: list[Input]) -> float:
        """A quick median of one candidate in microseconds."""
        with watch(variant):
            us = screen_us(
                variant.run(inputs),
                seconds=self.sweep.seconds / 5,
                device=self.case.device,
                before=self.evict.before,
                rotation=len(inputs),
            )
        return us / len(self.models)

    def compare(
        self,
        dense: _Fastest,
        sparse: _Fastest,
        inputs: list[Input],
        rivals: Mapping[str, roofline.Rival],
    ) -> Row:
        """Time both sides and the rivals alternately, and describe the outcome."""
        bound = {name: rival(inputs) for name, rival in rivals.items()}
        others, of_others = roofline.checked(self.model, bound, inputs[0])
        times = self._settled_times(dense.variant, sparse.variant, inputs, others)
        us = {name: median(times[name]) / len(self.models) for name in times}
        status, reason = sparse.variant.status()
        return {
            **dataclasses.asdict(self.case),
            "tokens": self.tokens,
            "dense_us": us["dense"],
            "sparse_us": us["sparse"],
            **ratio_fields(paired_ratio(times["dense"], times["sparse"])),
            **self._numerics(dense.variant, sparse.variant, inputs[0]),
            "baseline": dense.name,
            "sparse_setting": sparse.name,
            "dense_candidates_us": dense.medians,
            "sparse_candidates_us": sparse.medians,
            "status": status,
            "reason": reason,
            **_applied(sparse.variant.last_graph),
            **{f"{name}_us": us[name] for name in others},
            **of_others,
            "stacked": len(self.models),
            "dense_compile_s": dense.compile_s,
            "sparse_compile_s": sparse.compile_s,
            "rounds": len(times["dense"]),
            "cache": self.evict.mode,
            **machine(self.case.device),
        }

    def _numerics(self, dense: Variant, sparse: Variant, given: Input) -> Row:
        """Errors of both sides against float64, and what 2:4 dropped if it was used."""
        x = parts(given)[0]
        results = (parts(side.call(given))[0] for side in (sparse, dense))
        mine, theirs = errors(self.model, x, *results)
        graph = sparse.last_graph
        approximate = graph is not None and any(
            decision.tier is Tier.APPROXIMATE for decision in graph.applied
        )
        return {
            "max_rel_err": mine[0],
            "rms_rel_err": mine[1],
            "dense_max_rel_err": theirs[0],
            "dense_rms_rel_err": theirs[1],
            "dropped_energy": dropped_energy(self.model, x) if approximate else 0.0,
        }

    def _settled_times(
        self,
        dense: Variant,
        sparse: Variant,
        inputs: list[Input],
        rivals: Mapping[str, Call],
    ) -> dict[str, list[float]]:
        """Times of a stretch in which the sparse variant compiled nothing."""
        calls = {"dense": dense.run(inputs), "sparse": sparse.run(inputs), **rivals}
        for _ in range(SETTLE_ATTEMPTS):
            compiled_before = len(sparse.log.graphs)
            with watch(sparse):
                times = interleave(
                    calls,
                    seconds=self.sweep.seconds,
                    device=self.case.device,
                    before=self.evict.before,
                    rotation=len(inputs),
                )
            if len(sparse.log.graphs) == compiled_before:
                return times
        raise UnsettledError(
            f"{self.label}: the sparse variant recompiled in each of {SETTLE_ATTEMPTS} "
            'runs; TORCH_LOGS="recompiles" names the guard that failed'
        )


def _applied(graph: GraphDecisions | None) -> Row:
    """How many sites the sparse side rewrote, and the ops that compute them now."""
    applied = graph.applied if graph is not None else []
    ops = sorted({decision.op for decision in applied})
    return {"sites_applied": len(applied), "ops": ops}


def ratio_fields(ratio: Ratio) -> Row:
    """The columns of a ratio: the value, its interval, and the word it allows."""
    return {
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "verdict": ratio.verdict,
    }
