"""Inductor's pointwise ops as C++ text, for the two adjacent columns of a thread.

Low-precision floats are computed in float32 and rounded where they are stored, as in
Inductor's other kernels; with ``emulate_precision_casts`` also where Inductor asks.
What is not in the tables here is refused.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import sympy
import torch
from torch._inductor.ops_handler import DefaultHandler

from inductor_sparse.lowerings.cuda_epilogue_index import Unsupported

COMPUTE_TYPES: dict[torch.dtype, str] = {
    torch.float32: "float",
    torch.bool: "bool",
    torch.uint8: "unsigned char",
    torch.int8: "signed char",
    torch.int16: "short",
    torch.int32: "int",
    torch.int64: "long long",
}
"""Dtypes of values in registers."""

_STRUCTS: dict[torch.dtype, str] = {
    torch.bfloat16: "epilogue::bfloat16",
    torch.float16: "epilogue::float16",
    torch.float8_e4m3fn: "epilogue::e4m3",
}
MEMORY_TYPES: dict[torch.dtype, str] = {**COMPUTE_TYPES, **_STRUCTS}
"""Dtypes of values in memory."""

_LIBRARY = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("asinh", "acosh", "atanh", "erf", "erfc", "floor", "ceil", "trunc"),
)
_FLOAT_FUNCTIONS = {name: f"{name}f({{0}})" for name in _LIBRARY} | {
    "round": "nearbyintf({0})",
    "sigmoid": "epilogue::sigmoid({0})",
    "reciprocal": "1.0f / {0}",
    "pow": "powf({0}, {1})",
    "atan2": "atan2f({0}, {1})",
    "hypot": "hypotf({0}, {1})",
    "copysign": "copysignf({0}, {1})",
    "fmod": "fmodf({0}, {1})",
    "truediv": "{0} / {1}",
    "div_rn": "{0} / {1}",
    "mul_rn": "epilogue::rounded_product({0}, {1})",
    "fma": "fmaf({0}, {1}, {2})",
}
"""Of floats, and to a float."""

_SAME_TYPE = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "square": "{0} * {0}",
    "maximum": "epilogue::maximum({0}, {1})",
    "minimum": "epilogue::minimum({0}, {1})",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
}
"""To the type that the operands are promoted to."""

_TO_BOOL = {
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "logical_and": "{0} && {1}",
    "logical_or": "{0} || {1}",
    "logical_xor": "({0} != 0) != ({1} != 0)",
    "logical_not": "!{0}",
    "isnan": "{0} != {0}",
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One value of each of the two columns, as C++ expressions without operators."""

    left: str
    right: str
    dtype: torch.dtype


class PairOps(DefaultHandler):
    """Appends to ``lines`` what computes each op, and answers with a :class:`Pair`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[str, str] = {}

    def define(self, declared: str, expression: str) -> str:
        """The variable of type ``declared`` that holds ``expression``."""
        line = f"{declared} = {expression};"
        if line not in self._names:
            self._names[line] = f"x{len(self._names)}"
            self.lines.append(f"const {declared} {self._names[line]} = {expression};")
        return self._names[line]

    def state(self) -> tuple[list[str], dict[str, str]]:
        """What :meth:`restore` takes to forget everything printed since."""
        return list(self.lines), dict(self._names)

    def restore(self, state: tuple[list[str], dict[str, str]]) -> None:
        """Forget what was printed since ``state`` was taken."""
        self.lines, self._names = state

    def emit(self, text: str, dtype: torch.dtype, *operands: Pair) -> Pair:
        """Both columns of ``text``, in which ``{0}`` is the first operand."""
        declared = COMPUTE_TYPES[dtype]
        cast = "" if dtype in (torch.float32, torch.bool) else f"({declared})"
        sides = []
        for side in ("left", "right"):
            expression = text.format(*(getattr(pair, side) for pair in operands))
            expression = f"{cast}({expression})" if cast else expression
            sides.append(self.define(declared, expression))
        return Pair(sides[0], sides[1], dtype)

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = [_operand(arg, args) for arg in args]
        if kwargs or not operands:
            raise Unsupported(f"the op {name}")
        dtype = _promoted(operands)
        if name in _TO_BOOL:
            return self.emit(_TO_BOOL[name], torch.bool, *operands)
        if name in _FLOAT_FUNCTIONS and dtype == torch.float32:
            operands = [self._cast(pair, dtype) for pair in operands]
            return self.emit(_FLOAT_FUNCTIONS[name], dtype, *operands)
        if name in _SAME_TYPE and (dtype != torch.float32 or "bitwise" not in name):
            operands = [self._cast(pair, dtype) for pair in operands]
            return self.emit(_SAME_TYPE[name], dtype, *operands)
        raise Unsupported(f"the op {name} of {dtype}")

    def _cast(self, pair: Pair, dtype: torch.dtype) -> Pair:
        if pair.dtype == dtype:
            return pair
        if dtype == torch.bool:
            return self.emit("{0} != 0", dtype, pair)
        if dtype == torch.float32:
            return self.emit("(float){0}", dtype, pair)
        # As eager: negative floats wrap instead of becoming 0.
        wide = dtype == torch.uint8 and pair.dtype == torch.float32
        return self.emit("(long long){0}" if wide else "{0}", dtype, pair)

    def constant(self, value: Any, dtype: torch.dtype) -> Pair:
        """A literal."""
        if isinstance(value, sympy.Expr):
            if not value.is_number:
                raise Unsupported(f"the constant {value}")
            value = float(value) if value.is_Float else int(value)
        text = _literal(value, compute_dtype(dtype))
        return Pair(text, text, compute_dtype(dtype))

    def to_dtype(
        self,
        x: Pair,
        dtype: torch.dtype,
        src_dtype: torch.dtype | None = None,
        use_compute_types: bool = True,
    ) -> Pair:
        """``x`` as ``dtype``, or as the type that ``dtype`` is computed in."""
        pair = self._cast(x, compute_dtype(dtype))
        if dtype == torch.float8_e4m3fn or (
            dtype in _STRUCTS and not use_compute_types
        ):
            return self.rounded(pair, dtype)
        return pair

    def rounded(self, pair: Pair, dtype: torch.dtype) -> Pair:
        """What a buffer of ``dtype`` would keep of a float."""
        return self.emit(
            f"epilogue::rounded<{_STRUCTS[dtype]}>({{0}})", pair.dtype, pair
        )

    def where(self, condition: Pair, yes: Pair, no: Pair) -> Pair:
        """``yes`` where the condition holds."""
        operands = [_operand(arg, (yes, no)) for arg in (yes, no)]
        dtype = _promoted(operands)
        operands = [self._cast(pair, dtype) for pair in operands]
        return self.emit("{0} ? {1} : {2}", dtype, condition, *operands)

    def relu(self, x: Pair) -> Pair:
        """The larger of ``x`` and 0; NaN stays."""
        return self.maximum(x, self.constant(0, x.dtype))

    def abs(self, x: Pair) -> Pair:
        """Magnitude."""
        floats = x.dtype == torch.float32
        return self.emit("fabsf({0})" if floats else "{0} < 0 ? -{0} : {0}", x.dtype, x)

    def isinf(self, x: Pair) -> Pair:
        """Whether ``x`` is infinite; only floats can be."""
        infinity = self.constant(math.inf, torch.float32)
        magnitude = self.abs(self._cast(x, torch.float32))
        return self.emit("{0} == {1}", torch.bool, magnitude, infinity)

    def bitwise_not(self, x: Pair) -> Pair:
        """Every bit flipped; a bool has one."""
        if x.dtype == torch.float32:
            raise Unsupported("the op bitwise_not of floats")
        return self.emit("!{0}" if x.dtype == torch.bool else "~{0}", x.dtype, x)

    def identity(self, x: Pair) -> Pair:
        """``x`` itself."""
        return x


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of ``dtype`` are computed in.

    Raises:
        Unsupported: there is none, as for float64.
    """
    computed = torch.float32 if dtype in _STRUCTS else dtype
    if computed not in COMPUTE_TYPES:
        raise Unsupported(f"values of {dtype}")
    return computed


def _operand(arg: Any, args: tuple[Any, ...]) -> Pair:
    """``arg`` as a pair; a plain number takes the dtype of the others."""
    if isinstance(arg, Pair):
        return arg
    if not isinstance(arg, (bool, int, float)):
        raise Unsupported(f"the operand {arg!r}")
    others = [pair for pair in args if isinstance(pair, Pair)]
    floats = isinstance(arg, float) or any(p.dtype == torch.float32 for p in others)
    dtype = torch.float32 if floats else _promoted(others) if others else torch.int64
    return Pair(_literal(arg, dtype), _literal(arg, dtype), dtype)


def _promoted(pairs: list[Pair]) -> torch.dtype:
    dtype = pairs[0].dtype
    for pair in pairs[1:]:
        dtype = torch.promote_types(dtype, pair.dtype)
    return dtype


def _literal(value: float, dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "true" if value else "false"
    if dtype != torch.float32:
        return f"({COMPUTE_TYPES[dtype]})({int(value)}LL)"
    # Rounded here: what C++ calls a literal out of range is infinite in float32.
    value = torch.tensor(value, dtype=torch.float64).float().item()
    if math.isnan(value):
        return "epilogue::from_bits(0x7FC00000u)"
    if math.isinf(value):
        bits = "0x7F800000u" if value > 0 else "0xFF800000u"
        return f"epilogue::from_bits({bits})"
    return f"({value!r}f)" if value < 0 or str(value)[0] == "-" else f"{value!r}f"
