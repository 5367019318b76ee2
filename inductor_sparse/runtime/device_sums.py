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


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sums to begin with, in no pool of a CUDA graph; not while one is captured."""
    return outside_graph_pools(
        device, lambda: torch.zeros(shape, dtype=dtype, device=device)
    )


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


def start_copies(sums: Sequence[Tensor]) -> Copies:
    """Copy sums of one device and shape, behind what its stream has been given."""
    first = sums[0]
    if first.device.type != "cuda":
        return Copies(torch.stack(tuple(sums)).cpu(), None)
    size = (len(sums), *first.shape)
    # The device is said because the user may have set another one as the default.
    copies = torch.empty(size, dtype=first.dtype, device="cpu", pin_memory=True)
    with torch.cuda.device(first.device):
        for copy, values in zip(copies, sums, strict=True):
            copy.copy_(values, non_blocking=True)
        event = torch.cuda.current_stream(first.device).record_event()
    return Copies(copies, event)


def own_stream(device: torch.device) -> Any:
    """A context in which copies from ``device`` wait for nothing that is queued."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))
