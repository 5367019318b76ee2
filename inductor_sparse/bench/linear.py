"""``bench linear``: the first matmul that packs what it computes, against two kernels.

One kernel is ``linear_sparsify24``.  The two are torch's own matmul, cuBLAS on a GPU,
and the packing kernel behind it, which reads its result again.  The plain matmul is
timed along: what packing would cost if it were free.

Shape legend: ``M`` tokens, ``D`` features, ``K`` hidden features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from inductor_sparse import formats, lowerings
from inductor_sparse.bench.ffn import ratio_fields
from inductor_sparse.bench.intervals import median, paired_ratio
from inductor_sparse.bench.models import DTYPES, activate, relative_errors, sample
from inductor_sparse.bench.rivals import kernels_of
from inductor_sparse.bench.rows import Row, machine
from inductor_sparse.bench.timing import Evictor, interleave

Report = Callable[[str], object]
Packing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
OP = "linear_sparsify24"


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """``[M, D] x [D, K]``; ``dtype`` is of ``models.DTYPES``, ``K`` a multiple of 4."""

    tokens: int
    features: int
    hidden: int
    dtype: str
    device: str = "cpu"

    @property
    def key(self) -> tuple[object, ...]:
        """The :func:`row_key` of its row."""
        return (OP, *dataclasses.astuple(self))


def cases(
    *,
    tokens: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    device: str,
) -> list[LinearCase]:
    """Every size; ``sizes`` are pairs of features and hidden features."""
    axes = itertools.product(dtypes, sizes, tokens)
    return [LinearCase(m, *size, dtype, device) for dtype, size, m in axes]


def row_key(row: Row) -> tuple[object, ...]:
    """What makes two rows the same measurement; rows of other benchmarks differ."""
    fields = dataclasses.fields(LinearCase)
    return (row.get("op"), *(row.get(field.name) for field in fields))


def run(
    todo: Sequence[LinearCase],
    seconds: float,
    report: Report = lambda message: None,
) -> Iterator[Row]:
    """Measure each case for ``seconds``, yielding rows as they are known."""
    for case in todo:
        report(f"{case.tokens}x{case.features}x{case.hidden} {case.dtype}")
        yield _measure(case, seconds)


def one_kernel(x_MD: Tensor, w_KD: Tensor) -> tuple[Tensor, Tensor]:
    """2:4 values and metadata of ``relu(x @ w^T) ** 2``, by one op."""
    op = torch.ops.inductor_sparse.linear_sparsify24
    return op(x_MD, w_KD, None, "relu2", "largest")


def two_kernels(x_MD: Tensor, w_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The same from a matmul and an op that packs."""
    z_MK = torch.mm(x_MD, w_KD.t())
    return torch.ops.inductor_sparse.sparsify24(z_MK, "relu2", "largest")


def _measure(case: LinearCase, seconds: float) -> Row:
    """One row."""
    lowerings.register_all()
    generator = torch.Generator(case.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device=case.device)
        return x.to(DTYPES[case.dtype])

    x_MD = random(case.tokens, case.features)
    w_KD = random(case.hidden, case.features).mul_(case.features**-0.5)
    fused, note = _compiled(one_kernel, x_MD, w_KD)
    apart, _ = _compiled(two_kernels, x_MD, w_KD)
    evict = Evictor(x_MD.nbytes + w_KD.nbytes, case.device)
    times = interleave(
        {
            "fused": lambda _: fused(x_MD, w_KD),
            "apart": lambda _: apart(x_MD, w_KD),
            "matmul": lambda _: torch.mm(x_MD, w_KD.t()),
        },
        seconds=seconds,
        device=case.device,
        before=evict.before,
    )
    us = {name: median(samples) for name, samples in times.items()}
    return {
        "op": OP,
        **dataclasses.asdict(case),
        "fused_us": us["fused"],
        "apart_us": us["apart"],
        "matmul_us": us["matmul"],
        **ratio_fields(paired_ratio(times["apart"], times["fused"])),
        "of_matmul": us["fused"] / us["matmul"],
        "rms_rel_err": _error(fused, x_MD, w_KD),
        "apart_rms_rel_err": _error(apart, x_MD, w_KD),
        "note": note,
        "rounds": len(times["fused"]),
        "cache": evict.mode,
        **machine(case.device),
    }


def _compiled(function: Packing, x_MD: Tensor, w_KD: Tensor) -> tuple[Packing, str]:
    """The function as a model would run it, and the kernels it calls."""
    if x_MD.device.type == "cpu":  # which has no kernel that packs
        return function, ""
    torch.compiler.reset()
    compiled = torch.compile(function, dynamic=False)
    _, sources = run_and_get_code(compiled, x_MD, w_KD)
    return compiled, kernels_of("\n".join(sources))


def _error(function: Packing, x_MD: Tensor, w_KD: Tensor) -> float:
    """Root mean square against float64: of what was kept, and of what should have been.

    Of the second only the sizes: where rounding breaks a tie, either place is right.
    """
    values, metadata = function(x_MD, w_KD)
    packed_PK = sample(formats.unpack(values, metadata, len(w_KD))).double()
    exact_PK = activate(sample(x_MD).double() @ w_KD.double().t(), "relu2")
    kept_PK = exact_PK.where(packed_PK != 0, 0.0)
    found, wanted = (x.unflatten(1, (-1, 4)).topk(2)[0] for x in (packed_PK, exact_PK))
    return max(
        relative_errors(packed_PK, kept_PK)[1], relative_errors(found, wanted)[1]
    )
