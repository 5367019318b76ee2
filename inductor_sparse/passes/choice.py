"""What is chosen for a site: data only, filled in by the regimes and read by rules."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inductor_sparse.passes.quantized_ffn import QuantizedFfn
    from inductor_sparse.passes.weights import Copy


OBSERVED_TOO_DENSE = (
    "observed at run time: too many non-zeros for skipping to gain anything; "
    "torch._dynamo.reset() discards this observation"
)
"""The detail of a site that went back to dense."""


class Regime(enum.Enum):
    """What happens to the zeros of a site."""

    SKIP = "skips zeros"
    PACK = "2:4"


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a site is rewritten.

    ``note`` says where the regime begins and ends, ``op`` which of the rule's ops is to
    skip, ``rows`` the weight if its rows are read in 8 bits, ``quantized`` how both
    matmuls of an FFN are to run in 8 bits if they are.
    """

    regime: Regime
    expected_gain: float
    note: str = ""
    op: str = ""
    rows: Copy | None = None
    quantized: QuantizedFfn | None = None
