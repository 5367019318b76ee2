"""Triton kernels run on the CPU, by Triton's interpreter in a process of its own.

The interpreter is chosen by an environment variable that counts when triton is first
imported, hence the process: no other test sees it.  It holds bfloat16 as plain integers
and truncates where the hardware rounds; the worker below does what the PTX manual says
instead: round to nearest even, and NaN results in one positive form.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch


def _send(stream: IO[bytes], message: Any) -> None:
    body = io.BytesIO()
    torch.save(message, body)
    stream.write(struct.pack("<q", body.tell()) + body.getvalue())
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    header = stream.read(8)
    if not header:
        raise EOFError
    return torch.load(io.BytesIO(stream.read(struct.unpack("<q", header)[0])))


class Interpreter:
    """A process that runs kernels; use it as a context manager."""

    def __enter__(self) -> Interpreter:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(
        self,
        templates: Sequence[str],
        kernel: str,
        grid: Sequence[int],
        *args: Any,
        **constants: Any,
    ) -> list[Any]:
        """Launch ``kernel`` of the joined templates; the arguments as it leaves them.

        Raises:
            AssertionError: the kernel failed; the message is its traceback.
        """
        assert self._process.stdin and self._process.stdout
        request = (list(templates), kernel, tuple(grid), list(args), constants)
        _send(self._process.stdin, request)
        failure, result = _receive(self._process.stdout)
        assert failure is None, failure
        return result


def _patch_interpreter() -> None:
    """Give the interpreter the arithmetic of the hardware in bfloat16 and 8 bits."""
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    torch_dtypes = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
    integers = {2: (np.int16, torch.int16), 1: (np.uint8, torch.uint8)}
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, multiply, absolute = (
        builder.cast_impl,
        builder.create_fmul,
        builder.create_fabs,
    )

    def to_float32(data: Any, dtype: Any) -> Any:
        as_torch = torch_dtypes[dtype]
        numpy_int, torch_int = integers[as_torch.itemsize]
        bits = torch.from_numpy(np.ascontiguousarray(data).view(numpy_int).copy())
        assert bits.dtype == torch_int
        return bits.view(as_torch).float().numpy()

    def from_float32(data: Any, dtype: Any) -> Any:
        as_torch = torch_dtypes[dtype]
        values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32).copy())
        if dtype == tl.float8e4nv:
            values = values.clamp(-448.0, 448.0)
        rounded = values.to(as_torch).view(integers[as_torch.itemsize][1])
        positive_nan = 0x7FFF if as_torch == torch.bfloat16 else 0x7F
        rounded[values.isnan()] = positive_nan
        return rounded.numpy().view(np.dtype(f"uint{8 * as_torch.itemsize}"))

    def patched_cast(self: Any, source: Any, dtype: Any) -> Any:
        old, new = source.dtype.scalar, dtype.scalar
        if old in torch_dtypes and new == tl.float32:
            return handle(to_float32(source.data, old), new)
        if old == tl.float32 and new in torch_dtypes:
            return handle(from_float32(source.data, new), new)
        return cast(self, source, dtype)

    def patched_fp_to_fp(self: Any, source: Any, dtype: Any, mode: Any) -> Any:
        return patched_cast(self, source, dtype)

    def patched_multiply(self: Any, a: Any, b: Any) -> Any:
        dtype = a.dtype.scalar
        if dtype in torch_dtypes:
            product = to_float32(a.data, dtype) * to_float32(b.data, dtype)
            return handle(from_float32(product, dtype), dtype)
        product = multiply(self, a, b)
        missing = np.isnan(product.data)
        product.data[missing] = abs(product.data[missing])
        return product

    def patched_absolute(self: Any, a: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            return handle(a.data & np.uint16(0x7FFF), a.dtype.scalar)
        return absolute(self, a)

    builder.cast_impl = patched_cast
    builder.create_fp_to_fp = patched_fp_to_fp
    builder.create_fp_trunc = builder.create_fp_ext = patched_cast
    builder.create_fmul = patched_multiply
    builder.create_fabs = patched_absolute


def _serve() -> None:
    """Answer requests until the parent closes the pipe."""
    import traceback
    import warnings

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    warnings.simplefilter("ignore")  # numpy: overflows and NaN are what is tested

    from inductor_sparse.runtime import triton_text

    _patch_interpreter()
    while True:
        try:
            templates, kernel, grid, args, constants = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            module = triton_text.load(*templates)
            getattr(module, kernel)[grid](*args, **constants)
            _send(answers, (None, args))
        except Exception:
            _send(answers, (traceback.format_exc(), None))


if __name__ == "__main__":
    _serve()
