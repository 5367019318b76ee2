"""``bench gemm``: the 2:4 product alone against every other way to compute it.

The sparse operand is packed beforehand on every side that packs, and no side applies an
activation.  Dense sides get the activation with everything 2:4 would drop, because that
is what they would multiply; their speed depends on it, as zeros take less power.

TFLOP/s count the dense product, ``2 M N K``, for every side.

Shape legend: ``M`` tokens, ``K`` hidden features, ``N`` output features, ``P`` rows
that are checked.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from inductor_sparse import formats, reference
from inductor_sparse.bench import ceilings, cuda_timing, trained
from inductor_sparse.bench.ffn import ratio_fields
from inductor_sparse.bench.intervals import median, paired_ratio
from inductor_sparse.bench.models import DTYPES, activate, relative_errors, sample
from inductor_sparse.bench.quantized import quantize_rows
from inductor_sparse.bench.rivals import (
    RIVALS,
    Product,
    Rival,
    RivalUnavailableError,
    ours,
)
from inductor_sparse.bench.rows import FEW_TOKENS, Row, machine
from inductor_sparse.bench.timing import Evictor, interleave
from inductor_sparse.bench.variants import release

Report = Callable[[str], object]
GEMM_DTYPES = DTYPES | {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}
ROWS_PACKED = 2048
"""Rows packed at a time (of 64, as metadata are): packing in eager torch needs several
times the memory of what it packs."""
WRONG = 0.05
"""A side whose largest relative error is above this computes something else."""
LEFT_OUT = "left out by --quick"


@dataclasses.dataclass(frozen=True)
class GemmCase:
    """One product ``[M, K] x [K, N]``; ``dtype`` is of :data:`GEMM_DTYPES`.

    ``data`` is ``random`` (normal, no zeros but those 2:4 makes) or ``trained`` (ReLU²
    of a trained model's pre-activations, with the given ``density``).
    """

    tokens: int
    hidden: int
    features: int
    dtype: str
    data: str
    density: float
    device: str = "cpu"

    @property
    def key(self) -> tuple[object, ...]:
        """The :func:`row_key` of its row."""
        return ("gemm", *dataclasses.astuple(self))

    @property
    def shape(self) -> tuple[object, ...]:
        """What a kernel is compiled for: all but the data."""
        return (self.tokens, self.hidden, self.features, self.dtype, self.device)

    @property
    def flop(self) -> int:
        """Operations of the dense product."""
        return 2 * self.tokens * self.hidden * self.features

    @property
    def label(self) -> str:
        """The case in a few words."""
        size = f"{self.tokens}x{self.hidden}x{self.features}"
        return f"{size} {self.dtype} {self.data} {self.density:g}"


def cases(
    *,
    tokens: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    data: Sequence[str],
    densities: Sequence[float],
    device: str,
) -> list[GemmCase]:
    """The grid; random data have one density, 1, because none of them is zero.

    ``sizes`` are pairs of features (N) and hidden features (K).
    """
    kinds = [
        (kind, density)
        for kind in data
        for density in ([1.0] if kind == "random" else densities)
    ]
    return [
        GemmCase(m, hidden, features, dtype, kind, density, device)
        for dtype in dtypes
        for features, hidden in sizes
        for m in tokens
        for kind, density in kinds
    ]


def row_key(row: Row) -> tuple[object, ...]:
    """What makes two rows the same measurement; rows of other benchmarks differ."""
    fields = dataclasses.fields(GemmCase)
    return (row.get("op"), *(row.get(field.name) for field in fields))


def was_quick(row: Row) -> bool:
    """Whether a row was measured without what autotunes."""
    return LEFT_OUT in row.get("unavailable", {}).values()


@dataclasses.dataclass(frozen=True)
class Operands:
    """Both operands in every form a side may need.

    ``activation_MK`` is dense, ``pruned_MK`` the same after 2:4; ``weight_NK`` is as
    ``nn.Linear`` stores it.  The scales are ``None`` unless the dtype has 8 bits.
    """

    activation_MK: Tensor
    pruned_MK: Tensor
    values: Tensor
    metadata: Tensor
    weight_NK: Tensor
    row_scale_M: Tensor | None
    col_scale_N: Tensor | None

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """The scales of rows and of columns, or nothing."""
        if self.row_scale_M is None or self.col_scale_N is None:
            return ()
        return self.row_scale_M, self.col_scale_N

    @property
    def nbytes(self) -> int:
        """Bytes that a dense side reads."""
        return self.activation_MK.nbytes + self.weight_NK.nbytes


def make_operands(case: GemmCase, seed: int = 1) -> Operands:
    """Operands of ``case`` on its device."""
    generator = torch.Generator(case.device).manual_seed(seed)
    size_MK = (case.tokens, case.hidden)
    if case.data == "random":
        activation_MK = torch.randn(size_MK, generator=generator, device=case.device)
    else:
        source = trained.source(case.device)
        z_MK = trained.pre_activation(source, *size_MK, case.density, seed)
        activation_MK = activate(z_MK, "relu2")
    weight_NK = torch.randn(
        case.features, case.hidden, generator=generator, device=case.device
    ).mul_(case.hidden**-0.5)
    dtype = GEMM_DTYPES[case.dtype]
    row_scale_M = col_scale_N = None
    if dtype.itemsize == 1:
        activation_MK, row_scale_M = quantize_rows(activation_MK, dtype)
        weight_NK, col_scale_N = quantize_rows(weight_NK, dtype)
    activation_MK, weight_NK = activation_MK.to(dtype), weight_NK.to(dtype)
    pruned_MK, values, metadata = _pack(activation_MK)
    return Operands(
        *(activation_MK, pruned_MK, values, metadata, weight_NK),
        *(row_scale_M, col_scale_N),
    )


def _pack(activation_MK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The activation after 2:4 (largest magnitudes), its values and its metadata."""
    pruned, values, metadata = [], [], []
    for rows in activation_MK.split(ROWS_PACKED):
        # Selection is defined for the types that exist before quantization.
        wide = rows.to(torch.bfloat16) if rows.itemsize == 1 else rows
        kept, index = reference.sparsify24(wide, "identity", "largest_abs")
        values.append(kept.to(rows.dtype))
        metadata.append(formats.pack_index(index, rows.dtype))
        features = rows.shape[1]
        pruned.append(formats.unpack(values[-1], metadata[-1], features))
    return torch.cat(pruned), torch.cat(values), torch.cat(metadata)


def run(
    todo: Sequence[GemmCase],
    seconds: float,
    quick: bool = False,
    report: Report = lambda message: None,
) -> Iterator[Row]:
    """Measure each case for ``seconds``, yielding rows as they are known.

    Neighbouring cases of one shape share what was compiled, autotuned or searched for
    it: that does not depend on the data.

    Args:
        todo: the cases.
        seconds: timing budget of a row; autotuning comes on top.
        quick: leave out whatever autotunes by compiling kernels.
        report: told in a few words what is going on.

    Raises:
        RivalUnavailableError: our own side cannot run, or no dense one.
    """
    for _, group in itertools.groupby(todo, key=lambda case: case.shape):
        sides: Sides | None = None
        for case in group:
            report(f"{case.label}: preparing")
            operands = make_operands(case)
            sides = sides or _prepare(case, operands, quick, report)
            report(f"{case.label}: timing")
            yield _measure(case, operands, sides, seconds)
        release()


@dataclasses.dataclass(frozen=True)
class Sides:
    """What can multiply one shape, and why the others cannot."""

    able: dict[str, Rival]
    unavailable: dict[str, str]


def _prepare(case: GemmCase, operands: Operands, quick: bool, report: Report) -> Sides:
    """Compile, autotune and search; what fails at it, or cannot be timed, is out."""
    sides = Sides({"sparse24_mm": ours(operands, autotune=not quick)}, {})
    for name, make in RIVALS.items():
        report(f"{case.label}: preparing {name}")
        try:
            if quick and make.autotunes:
                raise RivalUnavailableError(LEFT_OUT)
            side = make.build(operands)
            if case.device == "cuda":
                cuda_timing.glance_us(side.bind(operands))
            sides.able[name] = side
        except (RuntimeError, ImportError) as error:
            sides.unavailable[name] = str(error).strip().partition("\n")[0]
    return sides


def _measure(case: GemmCase, operands: Operands, sides: Sides, seconds: float) -> Row:
    """One row."""
    calls = {name: side.bind(operands) for name, side in sides.able.items()}
    found = _errors(operands, sides.able, calls)
    wrong = {
        name: f"computes something else: relative error {largest:.2g}"
        for name, (largest, _) in found.items()
        if largest > WRONG
    }
    if "sparse24_mm" in wrong:
        raise RivalUnavailableError(f"{case.label}: {wrong['sparse24_mm']}")
    able = {name: side for name, side in sides.able.items() if name not in wrong}
    times = interleave(
        {name: calls[name] for name in able},
        seconds=seconds,
        device=case.device,
        before=_evictor(case, operands).before,
    )
    row = _describe(case, operands, able, times, found)
    return row | {"unavailable": sides.unavailable | wrong}


def _evictor(case: GemmCase, operands: Operands) -> Evictor:
    """Eviction where memory matters: on a GPU, pauses would raise the clock."""
    bound_by_memory = case.device == "cpu" or case.tokens <= FEW_TOKENS
    return Evictor(operands.nbytes if bound_by_memory else 2**62, case.device)


def _errors(
    operands: Operands, sides: dict[str, Rival], calls: dict[str, Product]
) -> dict[str, tuple[float, float]]:
    """Errors of each side against the float64 product of what it was given."""
    weight_KN = operands.weight_NK.double().t()
    dense_PN, sparse_PN = (
        sample(given).double() @ weight_KN
        for given in (operands.activation_MK, operands.pruned_MK)
    )
    scale_PN: Tensor | float = 1.0
    if operands.scales:
        row_scale_M, col_scale_N = operands.scales
        scale_PN = sample(row_scale_M)[:, None] * col_scale_N
    found = {}
    for name, side in sides.items():
        expected_PN = sparse_PN if side.sparse else dense_PN
        if side.scaled:
            expected_PN = expected_PN * scale_PN
        with torch.no_grad():
            found[name] = relative_errors(sample(calls[name](0)), expected_PN)
    return found


def _describe(
    case: GemmCase,
    operands: Operands,
    sides: dict[str, Rival],
    times: dict[str, list[float]],
    found: dict[str, tuple[float, float]],
) -> Row:
    """The row of all sides; the top-level ratio is against the best dense one."""
    ceiling = ceilings.measure(case.device, case.dtype)
    mine = times["sparse24_mm"]
    variants = {}
    for name, side in sides.items():
        tflop_per_s = case.flop / median(times[name]) / 1e6
        variants[name] = {
            "us": median(times[name]),
            "tflop_per_s": tflop_per_s,
            "of_ceiling": tflop_per_s / ceiling.matmul_tflop_per_s,
            **ratio_fields(paired_ratio(times[name], mine)),
            "max_rel_err": found[name][0],
            "rms_rel_err": found[name][1],
            "prepare_s": side.prepare_s,
            "note": side.note,
        }
    dense = [name for name, side in sides.items() if not side.sparse]
    if not dense:
        raise RivalUnavailableError(f"{case.label}: no dense side runs here")
    best = min(dense, key=lambda name: median(times[name]))
    return {
        "op": "gemm",
        **dataclasses.asdict(case),
        "density_measured": _density(operands.activation_MK),
        "dense_us": median(times[best]),
        "sparse_us": median(mine),
        **ratio_fields(paired_ratio(times[best], mine)),
        "baseline": best,
        "variants": variants,
        **ceiling.fields(),
        "rounds": len(mine),
        "cache": _evictor(case, operands).mode,
        **machine(case.device),
    }


def _density(activation_MK: Tensor) -> float:
    """Fraction of non-zeros."""
    return (activation_MK.float() != 0).float().mean().item()
