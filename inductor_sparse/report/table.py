"""The explain table as plain strings: what every renderer prints, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from inductor_sparse.decisions import Decision, Status

HEADERS = ("site", "MxKxN", "dtype", "density", "2:4 drops", "gain", "decision")
RIGHT_ALIGNED = frozenset({"density", "2:4 drops", "gain"})

UNKNOWN = "-"
_LEAST_PERCENT = 0.001
_BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB")


@dataclasses.dataclass(frozen=True)
class Row:
    """One site: a cell per header, and a note too long for a column."""

    cells: tuple[str, ...]
    note: str
    applied: bool


def row(decision: Decision) -> Row:
    """The table row of one decision."""
    shapes = "x".join(str(decision.shapes.get(axis, "?")) for axis in "MKN")
    applied = decision.status is Status.APPLIED
    reason = decision.reason.value if decision.reason is not None else "dense"
    cells = (
        decision.module or decision.source or decision.site,
        shapes,
        decision.dtype.removeprefix("torch."),
        percent(decision.density),
        percent(decision.dropped_energy),
        UNKNOWN if decision.expected_gain is None else f"{decision.expected_gain:.2f}x",
        "sparse" if applied else reason,
    )
    rule = f"{decision.rule} ({decision.tier.value})" if decision.rule else ""
    parts = (decision.source, rule, decision.detail, _kernel(decision))
    note = ", ".join(part for part in parts if part)
    return Row(cells, note, applied)


def _kernel(decision: Decision) -> str:
    """The kernel, its rate, and that as a share of what the device could do."""
    if not decision.kernel or decision.tflops is None:
        return ""
    text = f"{decision.kernel}: {decision.tflops:.0f} TFLOP/s"
    if decision.of_dense_peak is None or decision.of_sparse_peak is None:
        return text
    return (
        f"{text}, {100 * decision.of_dense_peak:.0f} % of the dense and "
        f"{100 * decision.of_sparse_peak:.0f} % of the sparse peak"
    )


def conclusion(decisions: Sequence[Decision], graphs: int, other_matmuls: int) -> str:
    """The first line of a report: how many sites run sparse, and why not the others.

    Args:
        decisions: every candidate site.
        graphs: compiled graphs; with none there is nothing to say about sites.
        other_matmuls: matmuls that do not read a possibly sparse operand.
    """
    others = f"{other_matmuls} other matmul{'' if other_matmuls == 1 else 's'}"
    if graphs == 0:
        return "no graph was compiled: torch.compile found nothing that it can capture"
    if not decisions:
        return f"no candidate site: no matmul reads a ReLU or ReLU² output; {others}"
    applied = sum(d.status is Status.APPLIED for d in decisions)
    plural = "" if len(decisions) == 1 else "s"
    verb = "runs" if len(decisions) == 1 else "run"
    parts = [f"{applied} of {len(decisions)} site{plural} {verb} sparse"]
    if applied < len(decisions):
        parts.append(f"{len(decisions) - applied} dense ({_reasons(decisions)})")
    return "; ".join([*parts, others])


def bytes_text(count: int) -> str:
    """``count`` bytes in the largest unit that keeps it at least one."""
    size = float(count)
    for unit in _BYTE_UNITS:
        if size < 1024 or unit == _BYTE_UNITS[-1]:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("the last unit always returns")


def _reasons(decisions: Sequence[Decision]) -> str:
    counts = Counter(d.reason.value for d in decisions if d.reason is not None)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def percent(fraction: float | None) -> str:
    """A fraction for a cell: ``"3.4 %"``, or a dash if it is not known.

    Two digits count, of the fraction or of what it lacks to 100 %, whichever is the
    smaller, so that only nothing is ``"0 %"`` and only everything is ``"100 %"``.
    """
    if fraction is None:
        return UNKNOWN
    part = 100 * min(fraction, 1 - fraction)
    if 0 < part < _LEAST_PERCENT:
        is_small = fraction < 0.5
        end = f"<{_LEAST_PERCENT}" if is_small else f">{100 - _LEAST_PERCENT}"
        return f"{end} %"
    decimals = max(0, 1 - math.floor(math.log10(part))) if part > 0 else 0
    number = f"{100 * fraction:.{decimals}f}"
    return f"{number.rstrip('0').rstrip('.') if decimals else number} %"
