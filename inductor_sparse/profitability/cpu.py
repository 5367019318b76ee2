"""When skipping zeros is expected to win on a CPU.

Shape legend: M tokens (rows of the activation), K reduction, N output features.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from inductor_sparse import _compat
from inductor_sparse.profitability.common import ASSUMED_DENSITY, GLU_MAX_TOKENS

_T = TypeVar("_T")

ALWAYS_WINS_TOKENS = 4
"""Up to so many tokens a product is bound by reading the weight, and skipping neurons
only ever reads less of it: no density loses, so none is observed."""


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Rate of the skipping product as a fraction of the dense one, per kept element."""

    max_tokens: int
    fraction: float


_EFFICIENCY: dict[str, tuple[Efficiency, ...]] = {
    # One token is bound by memory: rows that are skipped are not read, at full speed.
    # More tokens share nothing between rows of the activation, while a dense GEMM
    # reuses the weight from registers; 16-bit GEMMs also have dot-product units.
    "float32": (Efficiency(1, 1.0), Efficiency(64, 0.35), Efficiency(2**63, 0.55)),
    "bfloat16": (Efficiency(1, 0.85), Efficiency(64, 0.14), Efficiency(2**63, 0.17)),
}
_MATRIX_UNITS_EFFICIENCY: dict[str, tuple[Efficiency, ...]] = {
    "bfloat16": (Efficiency(1, 0.85), Efficiency(64, 0.14), Efficiency(2**63, 0.09)),
}
_FIXED_COST = 0.04
"""Compressing a row and starting threads, as a fraction of the dense product."""


def _here(anywhere: dict[str, _T], matrix_units: dict[str, _T]) -> dict[str, _T]:
    """Figures by dtype: others where the dense product has matrix units (AMX)."""
    return anywhere | matrix_units if _compat.has_matrix_units() else anywhere


def expected_gain(M: int | None, density: float | None, dtype: str) -> float:
    """Expected dense time / sparse time of one matmul; conservative, never below 1.

    ``gain = fraction(M, dtype) / (density + fixed cost)``.  It does not fall below 1
    because a kernel that counts the survivors of a call takes the dense product when
    skipping would lose.  ``M`` of None means unknown and is taken for many tokens;
    ``density`` of None takes :data:`ASSUMED_DENSITY`.
    """
    known_density = ASSUMED_DENSITY if density is None else density
    known = _here(_EFFICIENCY, _MATRIX_UNITS_EFFICIENCY)
    steps = known.get(dtype, _EFFICIENCY["bfloat16"])
    tokens = 2**62 if M is None else M
    fraction = next(step.fraction for step in steps if tokens <= step.max_tokens)
    return max(1.0, round(fraction / (known_density + _FIXED_COST), 2))


_GLU_READS = {"float32": 2.0}
_GLU_READS_ELSE = 1.7


def glu_reads(dtype: str) -> float:
    """How often each row of a gated FFN's weights may be read, on average, by tokens.

    Each token reads the rows of both weights that it needs anew.  A dense product reads
    them once, but in float32 takes twice as long for four tokens as for one.
    """
    return _GLU_READS.get(dtype, _GLU_READS_ELSE)


def glu_pays(M: object, density: float | None, dtype: str) -> bool:
    """Whether computing only the active rows of the up projection pays for M tokens.

    ``density`` is that of the plan, or None: then what is observed decides.
    """
    few = isinstance(M, int) and 0 < M <= GLU_MAX_TOKENS
    return few and (density is None or M * density <= glu_reads(dtype))


FEW_TOKENS = 32
"""Up to so many tokens a 16-bit dense product is bound by reading the weight, which
skipping hardly shortens: the tokens together name most of its rows."""

_STREAM_READS = {"bfloat16": 2.0}
_STREAM_READS_ELSE = 1.5
_BREAK_EVEN = {"bfloat16": (0.12, 0.3)}
_BREAK_EVEN_ELSE = (0.6, 0.6)
_MATRIX_UNITS_BREAK_EVEN = {"bfloat16": (0.12, 0.03)}


def stream_reads(dtype: str) -> float:
    """How often each row of the weight may be read, on average, by tokens in turn.

    Reading the surviving rows anew for each token has no other cost than the reading:
    up to here it is faster than sharing them, and than a dense product.
    """
    return _STREAM_READS.get(dtype, _STREAM_READS_ELSE)


def dense_call_density(tokens: int | None, dtype: str) -> float:
    """Fraction of non-zeros above which a call that does not stream is made densely."""
    known = _here(_BREAK_EVEN, _MATRIX_UNITS_BREAK_EVEN)
    few, many = known.get(dtype, _BREAK_EVEN_ELSE)
    return few if tokens is not None and tokens <= FEW_TOKENS else many


def break_even_density(tokens: int | None, dtype: str) -> float:
    """Fraction of non-zeros below which skipping wins, for a dtype such as "float32".

    Measured where the skipping and the dense product take equally long, on CPUs with
    dot products of bf16 and with tiles of it.  It is 1 where no density loses.
    """
    if tokens is None:
        return dense_call_density(tokens, dtype)
    if tokens <= ALWAYS_WINS_TOKENS:
        return 1.0
    streaming = min(1.0, stream_reads(dtype) / tokens)
    return max(streaming, dense_call_density(tokens, dtype))
