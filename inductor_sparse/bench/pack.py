"""``bench pack``: how fast data is brought into the form a sparse kernel reads.

The ceiling is the machine's own copy: a plain ``clone`` of the same tensor, timed
alternately.  ``ratio`` is the throughput of the op over that of the copy, so 1.0 means
that preparing the data costs no more than moving it.

Shape legend: ``M`` tokens, ``K`` hidden features, ``N`` output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from inductor_sparse.bench.ffn import ratio_fields
from inductor_sparse.bench.intervals import Ratio, median, paired_ratio
from inductor_sparse.bench.models import DTYPES
from inductor_sparse.bench.rows import Row, machine
from inductor_sparse.bench.timing import Evictor, interleave

Report = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class PackCase:
    """One op on one matrix: ``rows x columns``, as the op's input is stored."""

    op: str
    rows: int
    columns: int
    dtype: str
    device: str = "cpu"


def cases(
    *,
    tokens: Sequence[int],
    features: int,
    hidden: int,
    dtypes: Sequence[str],
    device: str,
) -> list[PackCase]:
    """``row_major_weight`` of the weight, then ``sparsify24`` of each of ``tokens``."""
    return [
        case
        for dtype in dtypes
        for case in (
            PackCase("row_major_weight", features, hidden, dtype, device),
            *(PackCase("sparsify24", m, hidden, dtype, device) for m in tokens),
        )
    ]


def run(
    todo: Sequence[PackCase],
    seconds: float,
    report: Report = lambda message: None,
) -> Iterator[Row]:
    """Measure each case for ``seconds``, yielding rows as they are known."""
    for case in todo:
        report(f"{case.op} {case.rows}x{case.columns} {case.dtype}")
        yield _measure(case, seconds)


def _measure(case: PackCase, seconds: float) -> Row:
    """One row."""
    generator = torch.Generator(case.device).manual_seed(0)
    source = torch.randn(
        case.rows, case.columns, generator=generator, device=case.device
    ).to(DTYPES[case.dtype])
    operation = _OPERATIONS[case.op]
    written = operation(source)
    evict = Evictor(2 * source.nbytes, case.device)

    def before() -> None:
        evict()
        # A prepared weight is kept until its version changes: this makes it stale.
        source.add_(0)

    times = interleave(
        {"op": lambda _: operation(source), "copy": lambda _: source.clone()},
        seconds=seconds,
        device=case.device,
        before=before,
    )
    op_bytes = source.nbytes + sum(part.nbytes for part in written)
    return _describe(case, times, op_bytes, 2 * source.nbytes)


def _describe(
    case: PackCase, times: dict[str, list[float]], op_bytes: int, copy_bytes: int
) -> Row:
    """The row of two series of times and the bytes each moves per call."""
    seen = paired_ratio(times["copy"], times["op"])
    scale = op_bytes / copy_bytes
    ratio = Ratio(seen.value * scale, seen.low * scale, seen.high * scale)
    op_us, copy_us = median(times["op"]), median(times["copy"])
    return {
        **dataclasses.asdict(case),
        "op_us": op_us,
        "copy_us": copy_us,
        "gb_per_s": op_bytes / op_us / 1e3,
        "copy_gb_per_s": copy_bytes / copy_us / 1e3,
        **ratio_fields(ratio),
        "rounds": len(times["op"]),
        **machine(case.device),
    }


def _row_major_weight(weight_NK: Tensor) -> tuple[Tensor, ...]:
    """The ``[K, N]`` row-contiguous copy of a weight stored ``[N, K]``."""
    N, K = weight_NK.shape
    ops = _ops()
    return (ops.row_major_weight(weight_NK, [K, N], [1, K], 0, weight_NK.dtype),)


def _sparsify24(z_MK: Tensor) -> tuple[Tensor, ...]:
    """2:4 values and metadata of ``relu(z) ** 2``."""
    return tuple(_ops().sparsify24(z_MK, "relu2", "largest"))


def _ops() -> torch._ops._OpNamespace:
    """The namespace of our ops, with the kernels that the backend brings."""
    import inductor_sparse.backend  # noqa: F401

    return torch.ops.inductor_sparse


_OPERATIONS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "row_major_weight": _row_major_weight,
    "sparsify24": _sparsify24,
}
