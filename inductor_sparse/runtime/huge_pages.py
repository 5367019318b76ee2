"""Tensors in huge pages, for weights whose rows are read in no order.

A row of a weight spans a few 4 KiB pages, and no two rows share one: skipping neurons
misses the TLB at every row.  With pages of 2 MiB it hardly ever does.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 * 1024 * 1024
MIN_BYTES = 2 * HUGE_PAGE_BYTES
"""Below this a tensor fits the TLB anyway."""


def empty_in_huge_pages(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor, in huge pages if it is large.

    The kernel decides: this only asks (``madvise``), so on a system without transparent
    huge pages, or where they are turned off, it is ordinary memory.
    """
    numel = math.prod(size)
    nbytes = numel * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or nbytes < MIN_BYTES:
        return torch.empty(tuple(size), dtype=dtype, device="cpu")
    memory = mmap.mmap(
        -1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        memory.madvise(advice)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    tensor = torch.frombuffer(
        memory, dtype=dtype, count=numel, offset=-start % HUGE_PAGE_BYTES
    )
    return tensor.view(tuple(size))
