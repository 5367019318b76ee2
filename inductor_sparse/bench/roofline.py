"""What an FFN measurement is held against: bytes, operations, and a masked-load kernel.

Rates count what the task needs, not what a kernel happens to do: the operations of the
dense product, and with few tokens the weight rows of active neurons.  A sparse kernel
may therefore exceed 100 % of the ceiling of dense matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from inductor_sparse.bench import ceilings
from inductor_sparse.bench.models import (
    DTYPES,
    Input,
    Model,
    ModelCase,
    errors,
    parts,
    union_density,
)
from inductor_sparse.bench.rows import FEW_TOKENS, Row
from inductor_sparse.bench.timing import Call, screen_us

Rival = Callable[[Sequence[Input]], Callable[[int], Any]]
"""Gives the call that runs a rival kernel on rotating inputs, for each of a stack."""

SCREEN_SECONDS = 0.1
WRONG = 0.05
"""A rival whose largest relative error is above this computes something else."""
NARROW = {"fp8": "float8_e4m3fn", "int8": "int8"}
"""The type that the matmuls of a quantized case multiply."""


def fields(case: ModelCase, model: Model, inputs: Sequence[Tensor], row: Row) -> Row:
    """Columns of a GPU row beside its times; none for a CPU."""
    if case.device != "cuda":
        return {}
    dtype = NARROW.get(case.quantize, case.dtype)
    ceiling = ceilings.measure(case.device, dtype)
    tokens = inputs[0].shape[0]
    if tokens > FEW_TOKENS:  # bound by arithmetic
        flop = 2 * tokens * case.features * case.hidden * case.matrices
        reached = _rates("tflop_per_s", flop / 1e6, row)
        share = reached["sparse_tflop_per_s"] / ceiling.matmul_tflop_per_s
        return ceiling.fields() | reached | {"of_ceiling": share}
    union = sum(union_density(model, x) for x in inputs) / len(inputs)
    dense, needed = weight_bytes(case, union)
    rates = {
        "union_density": union,
        "needed_bytes": needed,
        "dense_gb_per_s": dense / row["dense_us"] / 1e3,
        "sparse_gb_per_s": needed / row["sparse_us"] / 1e3,
    }
    rates["of_copy"] = rates["sparse_gb_per_s"] / ceiling.copy_gb_per_s
    return ceiling.fields() | rates


def weight_bytes(case: ModelCase, union: float) -> tuple[float, float]:
    """Bytes of all weights, and of the rows needed when ``union`` of them are active.

    The first matrix of an FFN is always needed, as its result decides on the others.
    """
    matrix = case.features * case.hidden * DTYPES[case.dtype].itemsize
    always = 0 if case.op == "down" else 1
    skippable = case.matrices - always
    return matrix * case.matrices, matrix * (always + skippable * union)


def _rates(name: str, amount: float, row: Row) -> Row:
    """``amount`` per microsecond of either side."""
    return {
        f"dense_{name}": amount / row["dense_us"],
        f"sparse_{name}": amount / row["sparse_us"],
    }


def rivals(
    case: ModelCase, models: Sequence[Model], inputs: Sequence[Input]
) -> dict[str, Rival]:
    """What is timed along with a stack of models on a GPU: one call runs all of them.

    ``empty`` is a kernel that does nothing to speak of: what every time contains.
    ``masked_load`` is the best tile of :mod:`inductor_sparse.bench.teal_baseline`,
    chosen on ``inputs``.
    """
    if case.device != "cuda" or len(models) == 1:
        return {}
    ones = [parts(inputs[0])[0].new_zeros(1) for _ in models]
    found: dict[str, Rival] = {"empty": lambda _: lambda i: [o.add_(1) for o in ones]}
    if case.quantize == "none":
        found["masked_load"] = _masked_load(models, inputs)
    return found


def checked(
    model: Model, calls: Mapping[str, Callable[[int], Any]], given: Input
) -> tuple[dict[str, Call], Row]:
    """The rivals that compute the model, and the largest relative error of each.

    Args:
        model: the first of a stack.
        calls: from :func:`rivals`, bound to inputs; ``empty`` computes nothing.
        given: the first of those inputs.
    """
    able, row = dict(calls), {}
    for name, call in calls.items():
        if name == "empty":
            continue
        ((largest, _),) = errors(model, parts(given)[0], call(0)[0])
        row[f"{name}_max_rel_err"] = largest
        if not largest <= WRONG:  # NaN neither
            del able[name]
    return able, row


def _masked_load(models: Sequence[Model], inputs: Sequence[Input]) -> Rival:
    """The masked-load kernel with its fastest tile."""
    from inductor_sparse.bench import teal_baseline

    tiles: dict[str, list[teal_baseline.Kernel]] = {}
    for model in models:
        for tile, kernel in teal_baseline.candidates(model).items():
            tiles.setdefault(tile, []).append(kernel)

    def call_of(tile: str, given: Sequence[Input]) -> Call:
        def run(index: int) -> list[Tensor]:
            pairs = zip(tiles[tile], parts(given[index % len(given)]), strict=True)
            return [kernel(x) for kernel, x in pairs]

        return run

    times = {
        tile: screen_us(
            call_of(tile, inputs),
            seconds=SCREEN_SECONDS,
            device="cuda",
            rotation=len(inputs),
        )
        for tile in tiles
    }
    best = min(times, key=lambda tile: times[tile])
    return lambda given: call_of(best, given)
