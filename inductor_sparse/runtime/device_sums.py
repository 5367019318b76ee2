"""Small sums that kernels keep on a device, and how the host comes by them.

A site has its sums for the life of the process, because a captured CUDA graph goes on
adding to them.  They are copied in the background: nothing waits for the device, and a
copy is read when it is found to have arrived.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inductor_sparse.runtime.graph_pools import outside_graph_pools


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums on their device; ``filled`` is behind their zero fill, None on a CPU."""

    values: Tensor
    filled: Any = None

    def are_filled(self) -> bool:
        """Whether there is anything to read: the fill is queued like a kernel."""
        return self.filled is None or self.filled.query()


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Sums:
    """Sums to begin with, in no pool of a CUDA graph; not while one is captured."""

    def make() -> Sums:
        values = torch.zeros(shape, dtype=dtype, device=device)
        if device.type != "cuda":
            return Sums(values)
        return Sums(values, torch.cuda.current_stream(device).record_event())

    return outside_graph_pools(device, make)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclasses.dataclass(frozen=True)
class Copies:
    """Sums on their way to the host; ``event`` is behind them, None on a CPU."""

    values: Tensor
    event: Any

    def have_arrived(self) -> bool:
        """Whether ``values`` may be read."""
        return self.event is None or self.event.query()

    def wait(self) -> Tensor:
        """``values``, once they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.values


def start_copies(sums: Sequence[Sums]) -> Copies:
    """Copy sums of one device and shape, behind what its stream has been given.

    Behind their fills as well, whichever stream those were given to.
    """
    first = sums[0].values
    if first.device.type != "cuda":
        return Copies(torch.stack([each.values for each in sums]).cpu(), None)
    size = (len(sums), *first.shape)
    # The device is said because the user may have set another one as the default.
    copies = torch.empty(size, dtype=first.dtype, device="cpu", pin_memory=True)
    with torch.cuda.device(first.device):
        stream = torch.cuda.current_stream(first.device)
        for copy, each in zip(copies, sums, strict=True):
            stream.wait_event(each.filled)
            copy.copy_(each.values, non_blocking=True)
        event = stream.record_event()
    return Copies(copies, event)


def own_stream(device: torch.device) -> Any:
    """A context in which copies from ``device`` wait for nothing that is queued."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))
