"""``bench ffn``: the FFN sites, dense against sparse, over a grid of sizes.

For each model and number of tokens the dense side is compiled under every Inductor
setting and the fastest is kept as the baseline.  For each density the sparse side is
compiled anew (it may adapt to what it sees), its fastest setting is kept, and the two
are timed alternately on rotating inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from inductor_sparse.bench.intervals import Ratio, median, paired_ratio
from inductor_sparse.bench.models import (
    Model,
    ModelCase,
    max_relative_error,
    measured_density,
)
from inductor_sparse.bench.rows import Row, machine
from inductor_sparse.bench.timing import Evictor, interleave, screen_us
from inductor_sparse.bench.variants import (
    SETTINGS,
    Setting,
    Variant,
    compile_variant,
    release,
    watch,
)
from inductor_sparse.errors import SparseError

Report = Callable[[str], object]
SETTLE_ATTEMPTS = 3


class UnsettledError(SparseError, RuntimeError):
    """The sparse variant kept recompiling while it was being timed."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The grid of one run.

    ``seconds`` is the timing budget of a row; compilation and the choice among Inductor
    settings come on top.  ``done`` holds the :func:`row_key` of rows not to repeat.
    """

    cases: tuple[ModelCase, ...]
    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    seconds: float = 10.0
    settings: tuple[Setting, ...] = SETTINGS
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
    names = [field.name for field in dataclasses.fields(ModelCase)]
    return tuple(row.get(name) for name in (*names, "tokens", "density"))


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
        model = case.build()
        for tokens, densities in todo:
            if densities:
                yield from _rows(sweep, case, model, tokens, densities, report)
                release()


def _rows(
    sweep: Sweep,
    case: ModelCase,
    model: Model,
    tokens: int,
    densities: Sequence[float],
    report: Report,
) -> Iterator[Row]:
    """The rows of one model at one number of tokens."""
    evict = Evictor(case.weight_bytes, case.device)
    bench = _Bench(sweep, case, model, tokens, evict, report)
    dense, dense_all = bench.fastest("inductor", bench.inputs(densities[0]))
    for density in densities:
        inputs = bench.inputs(density)
        sparse, sparse_all = bench.fastest("sparse", inputs)
        report(f"{bench.label}: timing at density {density:g}")
        row = bench.compare(dense, sparse, inputs)
        sparse.close()
        row["density"] = density
        row["density_measured"] = measured_density(model, inputs)
        row["dense_candidates_us"] = dense_all
        row["sparse_candidates_us"] = sparse_all
        yield row


@dataclasses.dataclass
class _Bench:
    """One model at one number of tokens."""

    sweep: Sweep
    case: ModelCase
    model: Model
    tokens: int
    evict: Evictor
    report: Report

    @property
    def label(self) -> str:
        """The case in a few words."""
        gated = "gated " if self.case.gated else ""
        return f"{gated}{self.case.op} {self.case.dtype} M={self.tokens}"

    def inputs(self, density: float) -> list[Tensor]:
        """Fresh inputs to rotate: many where a call is short, few where it is long."""
        count = 16 if self.tokens <= 16 else 4
        seeds = itertools.count(1)
        return [
            self.case.make_input(self.tokens, density, next(seeds))
            for _ in range(count)
        ]

    def fastest(
        self, backend: str, inputs: list[Tensor]
    ) -> tuple[Variant, dict[str, float]]:
        """The fastest setting of one backend; the median of each in microseconds."""
        best: Variant | None = None
        medians: dict[str, float] = {}
        for setting in self.sweep.settings:
            self.report(f"{self.label}: compiling {backend}, {setting.name}")
            variant = compile_variant(self.model, backend, setting, inputs)
            medians[setting.name] = self.screen(variant, inputs)
            if best is not None and medians[best.setting.name] <= medians[setting.name]:
                variant.close()
                continue
            if best is not None:
                best.close()
            best = variant
        assert best is not None, "a sweep has at least one setting"
        return best, medians

    def screen(self, variant: Variant, inputs: list[Tensor]) -> float:
        """A quick median of one candidate in microseconds."""
        with watch(variant):
            return screen_us(
                variant.run(inputs),
                seconds=self.sweep.seconds / 5,
                device=self.case.device,
                before=self.evict,
            )

    def compare(self, dense: Variant, sparse: Variant, inputs: list[Tensor]) -> Row:
        """Time both variants alternately and describe the outcome."""
        times = self._settled_times(dense, sparse, inputs)
        ratio = paired_ratio(times["dense"], times["sparse"])
        status, reason = sparse.status()
        graph = sparse.last_graph
        return {
            **dataclasses.asdict(self.case),
            "tokens": self.tokens,
            "dense_us": median(times["dense"]),
            "sparse_us": median(times["sparse"]),
            **ratio_fields(ratio),
            "max_rel_err": self._error(sparse, inputs[0]),
            "dense_max_rel_err": self._error(dense, inputs[0]),
            "baseline": dense.setting.name,
            "sparse_setting": sparse.setting.name,
            "status": status,
            "reason": reason,
            "sites_applied": len(graph.applied) if graph is not None else 0,
            "rounds": len(times["dense"]),
            "cache": self.evict.mode,
            **machine(self.case.device),
        }

    def _settled_times(
        self, dense: Variant, sparse: Variant, inputs: list[Tensor]
    ) -> dict[str, list[float]]:
        """Times of a stretch in which the sparse variant compiled nothing."""
        calls = {"dense": dense.run(inputs), "sparse": sparse.run(inputs)}
        for _ in range(SETTLE_ATTEMPTS):
            compiled_before = len(sparse.log.graphs)
            with watch(sparse):
                times = interleave(
                    calls,
                    seconds=self.sweep.seconds,
                    device=self.case.device,
                    before=self.evict,
                )
            if len(sparse.log.graphs) == compiled_before:
                return times
        raise UnsettledError(
            f"{self.label}: the sparse variant recompiled in each of {SETTLE_ATTEMPTS} "
            'runs; TORCH_LOGS="recompiles" names the guard that failed'
        )

    def _error(self, variant: Variant, x: Tensor) -> float:
        """Largest relative error of a variant on one input."""
        return max_relative_error(self.model, x, variant.call(x))


def ratio_fields(ratio: Ratio) -> Row:
    """The columns of a ratio: the value, its interval, and the word it allows."""
    return {
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "verdict": ratio.verdict,
    }
