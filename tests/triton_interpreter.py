"""Triton kernels run on the CPU, by Triton's interpreter in a process of its own.

The interpreter is chosen by an environment variable that counts when triton is first
imported, hence the process: no other test sees it.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message of plain data and tensors."""
    body = io.BytesIO()
    torch.save(message, body)
    stream.write(struct.pack("<q", body.tell()) + body.getvalue())
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message.

    Raises:
        EOFError: the stream was closed.
    """
    header = stream.read(8)
    if not header:
        raise EOFError
    return torch.load(io.BytesIO(stream.read(struct.unpack("<q", header)[0])))


@dataclasses.dataclass(frozen=True)
class SparseFile:
    """A vector of ``size`` elements in memory that two processes share.

    It may be larger than the machine's memory: pages exist once they are written.
    """

    path: str
    size: int
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        """The vector."""
        return torch.from_file(self.path, True, self.size, dtype=self.dtype)


class Interpreter:
    """A process that runs kernels; use it as a context manager.

    What it does not do as the hardware does is mended in ``triton_worker``.
    """

    def __enter__(self) -> Interpreter:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("triton_worker.py"))],
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
        templates: Sequence[str] | str,
        kernel: str,
        grid: Sequence[int],
        *args: Any,
        first: Sequence[int] = (0, 0, 0),
        **constants: Any,
    ) -> list[Any]:
        """Launch ``kernel`` of the joined templates; the arguments as it leaves them.

        ``templates`` may be the text of a generated module instead.  An argument may be
        a :class:`SparseFile`.  The programs are those of ``grid`` from ``first`` on.

        Raises:
            AssertionError: the kernel failed; the message is its traceback.
        """
        assert self._process.stdin and self._process.stdout
        source = templates if isinstance(templates, str) else list(templates)
        sent = [vars(arg) if isinstance(arg, SparseFile) else arg for arg in args]
        request = (source, kernel, tuple(grid), tuple(first), sent, constants)
        send(self._process.stdin, request)
        failure, result = receive(self._process.stdout)
        assert failure is None, failure
        return result
