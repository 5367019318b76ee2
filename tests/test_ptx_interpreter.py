"""The stand-in for PTX instructions agrees with torch on all 16-bit numbers."""

from __future__ import annotations

import numpy as np
import ptx_interpreter
import pytest
import torch
from torch import Tensor

ONES = {torch.bfloat16: 0x3F803F80, torch.float16: 0x3C003C00}
NAMES = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}


def words(low: Tensor, high: Tensor) -> np.ndarray:
    halves = (half.view(torch.int16).numpy().astype(np.int64) for half in (low, high))
    low_bits, high_bits = (half & 0xFFFF for half in halves)
    return low_bits | (high_bits << 16)


def halves(result: np.ndarray, dtype: torch.dtype) -> list[Tensor]:
    bits = ((result >> shift) & 0xFFFF for shift in (0, 16))
    return [
        torch.from_numpy(half.astype(np.uint16).view(np.int16)).view(dtype)
        for half in bits
    ]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_relu_and_squares_of_all_numbers(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    register, zero = words(every, every.flip(0)), np.zeros(2**16, np.int64)
    name = NAMES[dtype]
    positive = ptx_interpreter.execute(
        f"fma.rn.relu.{name} $0, $1, $2, $3;", [register, zero + ONES[dtype], zero]
    )
    squares = ptx_interpreter.execute(
        f"fma.rn.{name} $0, $1, $2, $3;", [positive, positive, zero]
    )
    for result, expected in (
        (positive, every.relu()),
        (squares, every.relu().square()),
    ):
        low, high = halves(result, dtype)
        for actual, wanted in ((low, expected), (high, expected.flip(0))):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
            assert not actual[~actual.isnan()].signbit().any()


def test_bytes_are_permuted_and_signs_spread() -> None:
    a, b = np.array([0x80017FFF]), np.array([0x11223344])
    execute = ptx_interpreter.execute
    assert execute("prmt.b32 $0, $1, 0, 0xbb99;", [a])[0] == 0xFFFF0000
    assert execute("prmt.b32 $0, $1, $2, 0x5410;", [a, b])[0] == 0x33447FFF
    assert execute("prmt.b32 $0, $1, $2, 0x7632;", [a, b])[0] == 0x11228001


def test_what_is_not_known_is_not_guessed() -> None:
    for asm in ("add.s32 $0, $1, $2;", "fma.rz.bf16x2 $0, $1, $2, $3;", "nonsense"):
        with pytest.raises(NotImplementedError):
            ptx_interpreter.execute(asm, [np.zeros(1, np.int64)] * 3)
