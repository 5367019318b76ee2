"""What Inductor generates for a GPU, run as a whole: its kernels by the interpreter.

The wrapper's own code allocates, computes sizes and grids, and launches; only the GPU
under it is not there.  So the kernels get what they would get on one.
"""

from __future__ import annotations

import re
import textwrap
import types
from contextlib import nullcontext
from typing import Any

import fake_cuda
import torch
from torch import Tensor
from triton_interpreter import Interpreter

_CALL = re.compile(r"^    def call\(self, args\):\n.*?(?=^runner = )", re.S | re.M)


class _Kernel:
    """A kernel of the wrapper under the name that it is launched by."""

    def __init__(self, interpreter: Interpreter, name: str, text: str) -> None:
        self._launch = interpreter, name, text

    def run(self, *args: Any, stream: int) -> None:
        """Run it; the last three arguments are the grid."""
        interpreter, name, text = self._launch
        *given, x, y, z = args
        left = interpreter.run(text, name, (x, y, z), *given)
        for before, after in zip(given, left, strict=True):
            if isinstance(before, Tensor):
                before.copy_(after)


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: Any) -> Tensor:
    """Memory that nobody has written: NaN, or a number that is no index."""
    memory = torch.empty_strided(size, stride, dtype=dtype)
    return memory.fill_(torch.nan if dtype.is_floating_point else -(2**30))


def run(
    made: fake_cuda.Generated, interpreter: Interpreter, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """The outputs of a generated wrapper, all of whose kernels are templates."""
    found = _CALL.search(made.code)
    assert found is not None
    body = {**vars(torch), "cuda": types.SimpleNamespace()}
    body["cuda"]._DeviceGuard = lambda index: nullcontext()
    body["cuda"].set_device = lambda index: None
    guards = vars(torch._C._dynamo.guards)
    names: dict[str, Any] = {
        **{name: check for name, check in guards.items() if name.startswith("assert_")},
        "torch": types.SimpleNamespace(**body),
        "empty_strided_cuda": _empty,
        "get_raw_stream": lambda index: 0,
    }
    for name, text in fake_cuda.triton_sources(made.code).items():
        names[name] = _Kernel(interpreter, name, text)
    exec(textwrap.dedent(found[0]), names)
    return names["call"](None, list(inputs))
