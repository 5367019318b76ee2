"""The process behind ``triton_interpreter``: runs kernels that arrive on its input.

It is started with ``TRITON_INTERPRET=1`` and mends Triton's interpreter where that
differs from the hardware as the PTX manual describes it.
"""

from __future__ import annotations

import contextlib
import linecache
import re
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import interpreter_mends
import ptx_interpreter
from triton_interpreter import SparseFile, receive, send

from inductor_sparse.runtime import triton_text

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle

NARROW = {
    tl.bfloat16: (torch.bfloat16, np.int16, 0x7FFF),
    tl.float8e4nv: (torch.float8_e4m3fn, np.int8, 0x7F),
}
"""Dtypes that numpy lacks: as torch's, as integers, and the one NaN of arithmetic."""

_cast, _multiply, _absolute = (
    Builder.cast_impl,
    Builder.create_fmul,
    Builder.create_fabs,
)


def to_float32(data: Any, dtype: Any) -> Any:
    """The numbers of an array that holds the bits of a narrow dtype."""
    as_torch, integer, _ = NARROW[dtype]
    bits = np.ascontiguousarray(data).view(integer).copy()
    return torch.from_numpy(bits).view(as_torch).float().numpy()


def from_float32(data: Any, dtype: Any) -> Any:
    """The bits of numbers rounded to nearest even; e4m3 saturates."""
    as_torch, integer, nan = NARROW[dtype]
    values = torch.from_numpy(np.array(data, dtype=np.float32))
    if dtype == tl.float8e4nv:
        values = values.clamp(-448.0, 448.0)
    bits = values.to(as_torch).view({1: torch.int8, 2: torch.int16}[as_torch.itemsize])
    bits[values.isnan()] = nan
    return bits.numpy().view(np.dtype(integer).str.replace("i", "u"))


def cast(self: Any, source: Any, dtype: Any) -> Any:
    """Casts from and to narrow dtypes; the interpreter's own truncate."""
    old, new = source.dtype.scalar, dtype.scalar
    if old in NARROW and new == tl.float32:
        return Handle(to_float32(source.data, old), new)
    if old == tl.float32 and new in NARROW:
        return Handle(from_float32(source.data, new), new)
    return _cast(self, source, dtype)


def cast_with_mode(self: Any, source: Any, dtype: Any, mode: Any) -> Any:
    """As :func:`cast`: every cast of the kernels is to nearest even."""
    return cast(self, source, dtype)


def multiply(self: Any, a: Any, b: Any) -> Any:
    """Products, of bfloat16 as well; a NaN is the positive one, as arithmetic gives."""
    dtype = a.dtype.scalar
    if dtype in NARROW:
        product = to_float32(a.data, dtype) * to_float32(b.data, dtype)
        return Handle(from_float32(product, dtype), dtype)
    product = _multiply(self, a, b)
    product.data[np.isnan(product.data)] = np.nan
    return product


def absolute(self: Any, a: Any) -> Any:
    """Magnitudes, of bfloat16 as well."""
    if a.dtype.scalar == tl.bfloat16:
        return Handle(a.data & np.uint16(0x7FFF), a.dtype.scalar)
    return _absolute(self, a)


def arguments_as_they_are(self: Any, args: Any, kwargs: Any) -> Any:
    """They are on the CPU already; copies of them might not fit."""
    return args, kwargs


def mend() -> None:
    """Replace what is wrong in the interpreter."""
    interpreter.GridExecutor._init_args_hst = arguments_as_they_are
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    Builder.cast_impl = cast
    Builder.create_fp_to_fp = cast_with_mode
    Builder.create_fp_trunc = Builder.create_fp_ext = cast
    Builder.create_fmul = multiply
    Builder.create_fabs = absolute
    Builder.create_inline_asm = ptx_interpreter.create_inline_asm
    interpreter_mends.mend()


def load(source: list[str] | str) -> Any:
    """The module of templates, or of a text that Inductor has generated."""
    if isinstance(source, list):
        return triton_text.load(*source)
    # Decorators that are for the tuning of a kernel that will be launched.
    plain = re.sub(r"^@triton_heuristics\.\w+\(.*?^\)\n", "", source, flags=re.S | re.M)
    name = f"<generated {hash(plain)}>"
    linecache.cache[name] = (len(plain), None, plain.splitlines(True), name)
    module = types.ModuleType(name)
    exec(compile(plain, name, "exec"), module.__dict__)
    return module


@contextlib.contextmanager
def programs_from(first: tuple[int, ...]) -> Iterator[None]:
    """Count programs from ``first`` on."""
    whole, at = Builder.set_grid_dim, Builder.set_grid_idx

    def set_dim(self: Any, *size: int) -> None:
        whole(self, *(n + start for n, start in zip(size, first, strict=True)))

    def set_index(self: Any, *index: int) -> None:
        at(self, *(i + start for i, start in zip(index, first, strict=True)))

    Builder.set_grid_dim, Builder.set_grid_idx = set_dim, set_index
    try:
        yield
    finally:
        Builder.set_grid_dim, Builder.set_grid_idx = whole, at


def serve() -> None:
    """Answer requests until the parent closes the pipe."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    warnings.simplefilter("ignore")  # numpy: overflows and NaN are what is tested
    mend()
    while True:
        try:
            source, kernel, grid, first, args, constants = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            given = [
                SparseFile(**a).tensor() if isinstance(a, dict) else a for a in args
            ]
            with programs_from(first):
                getattr(load(source), kernel)[grid](*given, **constants)
            send(answers, (None, args))
        except Exception:
            send(answers, (traceback.format_exc(), None))


if __name__ == "__main__":
    serve()
