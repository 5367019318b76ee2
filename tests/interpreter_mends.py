"""What some releases of Triton's interpreter trip over, mended for tests."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def mend() -> None:
    """Take masks of any dtype and scalars as the bounds of loops; compare bfloat16."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        method = getattr(builder, name)
        setattr(builder, name, _with_boolean_mask(method, position))
    for name in [name for name in vars(builder) if name.startswith("create_fcmp")]:
        setattr(builder, name, _with_wide_numbers(getattr(builder, name)))
    patch_tensor = interpreter._patch_lang_tensor
    interpreter._patch_lang_tensor = functools.partial(_with_index, patch_tensor)


def _with_boolean_mask(method: Any, position: int) -> Any:
    """Triton 3.9 compares some scalars in their own dtype, and refuses such a mask."""

    @functools.wraps(method)
    def call(builder: Any, *args: Any) -> Any:
        mask = args[position]
        mask.data = mask.data.astype(bool)
        return method(builder, *args)

    return call


def _with_wide_numbers(compare: Any) -> Any:
    """Triton 3.9 compares the bits of bfloat16, whose sign makes them large."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = np.asarray(handle.data).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    @functools.wraps(compare)
    def call(builder: Any, left: Any, right: Any) -> Any:
        return compare(builder, wide(left), wide(right))

    return call


def _with_index(patch_tensor: Any, tensor: Any, scope: Any) -> None:
    """Triton 3.6 leaves to numpy what newer versions of that refuse."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
