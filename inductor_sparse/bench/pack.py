"""``bench pack``: how fast data is brought into the form a sparse kernel reads.

The ceiling is the machine's own copy: a plain ``clone`` of the same tensor, timed
alternately.  ``ratio`` is the throughput of the op over that of the copy, so 1.0 means
that preparing the data costs no more than moving it.  On a GPU the ops are compiled, as
a model would run them, and ``of_copy`` relates them to the copy of a large buffer.  The
row ``relu2`` is what a dense graph runs in the place of the packing.

Shape legend: ``M`` tokens, ``K`` hidden features, ``N`` output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from inductor_sparse import lowerings
from inductor_sparse.bench import ceilings
from inductor_sparse.bench.ffn import ratio_fields
from inductor_sparse.bench.intervals import Ratio, median, paired_ratio
from inductor_sparse.bench.models import DTYPES
from inductor_sparse.bench.rows import Row, machine
from inductor_sparse.bench.timing import Evictor, interleave

Report = Callable[[str], object]
Operation = Callable[[Tensor], tuple[Tensor, ...]]
GPU_OPS = (
    "sparsify24",
    "sparsify24_energy",
    "sparsify24_largest_abs",
    "sparsify24_fp8",
    "sparsify24_int8",
    "quantize_rows_fp8",
    "quantize_rows_int8",
    "relu2",
)


@dataclasses.dataclass(frozen=True)
class PackCase:
    """One op on one matrix: ``rows x columns``, as the op's input is stored."""

    op: str
    rows: int
    columns: int
    dtype: str
    device: str = "cpu"

    @property
    def key(self) -> tuple[object, ...]:
        """The :func:`row_key` of its row."""
        return dataclasses.astuple(self)


def cases(
    *,
    tokens: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    device: str,
) -> list[PackCase]:
    """Every op on every size; ``sizes`` are pairs of features and hidden features.

    A CPU prepares weights while the model runs; a GPU packs activations, in 16 bits or
    less.
    """
    if device == "cpu":
        weight_ops, ops = ("row_major_weight",), ("sparsify24",)
    else:
        weight_ops, ops = (), GPU_OPS
    return [
        case
        for dtype in dtypes
        for features, hidden in sizes
        for case in (
            *(PackCase(op, features, hidden, dtype, device) for op in weight_ops),
            *(PackCase(op, m, hidden, dtype, device) for m in tokens for op in ops),
        )
    ]


def row_key(row: Row) -> tuple[object, ...]:
    """What makes two rows the same measurement."""
    return tuple(row.get(field.name) for field in dataclasses.fields(PackCase))


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
    operation = _operation(case)
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
        before=before if case.device == "cpu" else evict.before,
    )
    op_bytes = source.nbytes + sum(part.nbytes for part in written)
    row = _describe(case, times, op_bytes, 2 * source.nbytes)
    if case.device == "cuda":
        ceiling = ceilings.measure(case.device, case.dtype)
        row["of_copy"] = row["gb_per_s"] / ceiling.copy_gb_per_s
        row |= ceiling.fields()
    return row


def _operation(case: PackCase) -> Operation:
    """The op, compiled on a GPU."""
    operation = _OPERATIONS[case.op]
    if case.device == "cpu":
        return operation
    lowerings.register_all()
    torch.compiler.reset()
    compiled = torch.compile(operation, dynamic=False)
    return lambda source: compiled(source)


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


def _sparsify24_energy(z_MK: Tensor) -> tuple[Tensor, ...]:
    """The same, adding up what is kept and what there was."""
    ops = _ops()
    energy = ops.site_energy(z_MK, "bench pack")
    return tuple(ops.sparsify24(z_MK, "relu2", "largest", energy))


def _sparsify24_largest_abs(h_MK: Tensor) -> tuple[Tensor, ...]:
    """The same of a gated product, which has either sign."""
    return tuple(_ops().sparsify24(h_MK, "identity", "largest_abs"))


def _sparsify24_fp8(z_MK: Tensor) -> tuple[Tensor, ...]:
    """2:4 in e4m3, with a scale per row."""
    op = _ops().sparsify24_quantized
    return tuple(op(z_MK, "relu2", "largest", torch.float8_e4m3fn))


def _sparsify24_int8(z_MK: Tensor) -> tuple[Tensor, ...]:
    """The same in int8."""
    op = _ops().sparsify24_quantized
    return tuple(op(z_MK, "relu2", "largest", torch.int8))


def _quantize_rows_fp8(x_MK: Tensor) -> tuple[Tensor, ...]:
    """Dense e4m3 with a scale per row: what the first matmul of an 8-bit FFN reads."""
    return tuple(_ops().quantize_rows(x_MK, torch.float8_e4m3fn))


def _quantize_rows_int8(x_MK: Tensor) -> tuple[Tensor, ...]:
    """The same in int8."""
    return tuple(_ops().quantize_rows(x_MK, torch.int8))


def _relu2(z_MK: Tensor) -> tuple[Tensor, ...]:
    """``relu(z) ** 2``, dense."""
    return (torch.relu(z_MK).square(),)


def _ops() -> torch._ops._OpNamespace:
    """The namespace of our ops, with the kernels that the backend brings."""
    import inductor_sparse.backend  # noqa: F401

    return torch.ops.inductor_sparse


_OPERATIONS: dict[str, Operation] = {
    "row_major_weight": _row_major_weight,
    "sparsify24": _sparsify24,
    "sparsify24_energy": _sparsify24_energy,
    "sparsify24_largest_abs": _sparsify24_largest_abs,
    "sparsify24_fp8": _sparsify24_fp8,
    "sparsify24_int8": _sparsify24_int8,
    "quantize_rows_fp8": _quantize_rows_fp8,
    "quantize_rows_int8": _quantize_rows_int8,
    "relu2": _relu2,
}
