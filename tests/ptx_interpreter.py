"""The PTX instructions in the text of Triton kernels, carried out by numpy.

Triton's interpreter has no inline assembly.  Each use of it in this package is a single
instruction on 32-bit registers, written ``name $0, operand, ...;``.  The semantics are
those of the PTX manual, sections "prmt" and "fma" of half precision.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

_INSTRUCTION = re.compile(r"([\w.]+) \$0, (.*);")

_FORMATS = {"bf16x2": (7, -126, 0x7F80), "f16x2": (10, -14, 0x7C00)}
"""Bits of the mantissa, smallest exponent of a normal number, bits of Inf."""


@dataclasses.dataclass(frozen=True)
class Results:
    """What inline assembly returns: one handle."""

    handle: Any

    def get_result(self, index: int) -> Any:
        assert index == 0
        return self.handle


def create_inline_asm(
    self: Any,
    asm: str,
    constraints: str,
    values: list[Any],
    types: list[Any],
    is_pure: bool,
    pack: int,
) -> Results:
    """What takes the place of the method that raises ``NotImplementedError``."""
    from triton.runtime.interpreter import TensorHandle

    assert pack == 1 and len(types) == 1
    registers = [np.asarray(value.data).astype(np.int64) for value in values]
    assert constraints == ",".join(["=r", *"r" * len(registers)])
    result = execute(asm, registers) & 0xFFFFFFFF
    return Results(
        TensorHandle(result.astype(np.uint32).view(np.int32), values[0].dtype)
    )


def execute(asm: str, registers: list[Any]) -> Any:
    """The lower 32 bits of the result; ``registers`` are ``$1``, ``$2`` and so on.

    Raises:
        NotImplementedError: an instruction that is not known here.
    """
    matched = _INSTRUCTION.fullmatch(asm)
    if matched is None:
        raise NotImplementedError(asm)
    name, operands = matched[1], matched[2].split(", ")
    values = [
        registers[int(operand[1:]) - 1] if operand[0] == "$" else int(operand, 0)
        for operand in operands
    ]
    if name == "prmt.b32":
        return _permute(*values)
    head, _, format_name = name.rpartition(".")
    if head in ("fma.rn", "fma.rn.relu") and format_name in _FORMATS:
        return _multiply_add(*values, format_name, head.endswith("relu"))
    raise NotImplementedError(asm)


def _permute(a: Any, b: Any, selector: int) -> Any:
    """Bytes of ``{b, a}`` by the nibbles of the selector, or a byte's sign."""
    both = [(word >> (8 * i)) & 0xFF for word in (a, b) for i in range(4)]
    result = 0
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = both[nibble & 7]
        if nibble & 8:
            byte = (byte >> 7) * 0xFF
        result = result | (byte << (8 * i))
    return result


def _multiply_add(a: Any, b: Any, c: Any, format_name: str, relu: bool) -> Any:
    """Of both halves of the words."""
    result = 0
    for shift in (0, 16):
        x, y, z = (
            _numbers((word >> shift) & 0xFFFF, format_name) for word in (a, b, c)
        )
        # A product has twice the bits, and what the kernels add is zero: exact.
        total = x * y + z
        if relu:
            total = np.where(total < 0, 0.0, total)
        result = result | (_rounded(total, format_name) << shift)
    return result


def _numbers(bits: Any, format_name: str) -> Any:
    """The values of 16-bit numbers, in float64."""
    if format_name == "bf16x2":
        wide = (bits << 16).astype(np.uint32).view(np.float32)
    else:
        wide = bits.astype(np.uint16).view(np.float16)
    return wide.astype(np.float64)


def _rounded(values: Any, format_name: str) -> Any:
    """The bits of the nearest 16-bit numbers, ties to even, and of the one NaN."""
    mantissa, smallest, infinity = _FORMATS[format_name]
    magnitude = np.abs(np.nan_to_num(values))
    _, exponent = np.frexp(magnitude)
    exponent = np.where(magnitude == 0, smallest, np.maximum(exponent - 1, smallest))
    steps = np.rint(np.ldexp(magnitude, mantissa - exponent)).astype(np.int64)
    # Rounding up to the next power of two carries into the exponent by itself.
    bits = ((exponent - smallest) << mantissa).astype(np.int64) + steps
    bits = np.minimum(bits, infinity) | (np.signbit(values).astype(np.int64) << 15)
    return np.where(np.isnan(values), 0x7FFF, bits)
