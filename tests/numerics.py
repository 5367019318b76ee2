"""How far a result may be from the truth: an error budget measured, not guessed.

The truth is a float64 computation.  The budget is twice the error that torch's own
dense computation makes in the dtype under test, plus one rounding of the largest result
(where there are few elements the dense one may be right by luck):
who only sums in another order, or accumulates more accurately, stays within it.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor


def error_budget(dense: Tensor, exact: Tensor) -> Tensor:
    """The allowed absolute error of each element.

    Args:
        dense: what torch computes densely in the dtype under test.
        exact: the same in float64, of the same shape.
    """
    if dense.numel() == 0:
        return exact.abs()
    worst = (dense.double() - exact).abs().nan_to_num(0.0, 0.0).max()
    largest = exact[exact.isfinite()].abs().max() if exact.isfinite().any() else 0.0
    return (2 * worst + torch.finfo(dense.dtype).eps * largest).expand_as(exact)


def assert_within_budget(actual: Tensor, dense: Tensor, exact: Tensor) -> None:
    """Assert that ``actual`` is as good an approximation of ``exact`` as ``dense`` is.

    NaN and Inf must be where they are in ``exact``.
    """
    assert exact.dtype == torch.float64
    assert actual.dtype == dense.dtype
    assert actual.shape == exact.shape
    finite = exact.isfinite()
    torch.testing.assert_close(
        actual.double()[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True
    )
    excess = ((actual.double() - exact).abs() - error_budget(dense, exact))[finite]
    assert not excess.isnan().any(), "NaN where the exact result is finite"
    assert not (excess > 0).any(), f"budget exceeded by {excess.max().item():.3g}"


@functools.cache
def _int8_is_exact() -> bool:
    left, right = (
        torch.full(size, 127, dtype=torch.int8) for size in ((32, 64), (64, 16))
    )
    return bool((torch._int_mm(left, right) == 64 * 127**2).all())


def skip_where_int8_saturates() -> None:
    """Skip a test that multiplies int8 on a CPU without instructions for that.

    oneDNN adds up two products in 16 bits there, and saturates.
    """
    if not _int8_is_exact():
        pytest.skip("torch's products of int8 saturate on this CPU")
