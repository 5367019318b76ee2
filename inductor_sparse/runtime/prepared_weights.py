"""Row-contiguous copies of weights, made once and kept right.

``nn.Linear`` stores a weight ``[out, in]``; skipping neurons needs the rows of its
transpose to be contiguous.  :func:`fetch` is the CPU kernel of
``torch.ops.inductor_sparse.row_major_weight``: it returns a copy that is made on first
use and made again when the weight has changed.  A change is noticed by

- the identity of the storage, held by a weak reference so that a freed and reused
  address is never taken for the old weight (``param.data = x``, re-tying);
- the version counter, bumped by every in-place operation that autograd sees
  (``load_state_dict``, optimizer steps, ``copy_`` under ``no_grad``);
- a sample of elements, for writes that bypass the counter (``param.data.mul_()``).

A write through ``.data`` or ``numpy()`` to elements outside the sample only is the one
thing not noticed: :func:`forget` drops the copies, :func:`inductor_sparse.prepare`
avoids them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from inductor_sparse import ops, reference
from inductor_sparse.runtime.huge_pages import empty_in_huge_pages

WHOLE = 4096
"""A weight of so many elements is compared whole: that is as quick as a sample."""

RUNS, RUN = 4, 16
"""A larger weight is sampled in so many places, so many elements each."""

Places = tuple[tuple[int, ...], tuple[int, ...]]

Key = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclasses.dataclass
class _Entry:
    """One copy, and the state of the weight that it was made from.

    ``places`` are the size and strides of the sample.
    """

    storage: StorageWeakRef
    version: int
    places: Places
    sample: Tensor
    copy: Tensor

    def is_right(self, weight: Tensor) -> bool:
        """Whether ``weight``, at the address of the copied one, still has its values.

        A NaN never equals itself: in the sample it costs a refresh, never a stale copy.
        """
        return (
            weight._version == self.version
            and not self.storage.expired()
            and torch.equal(
                weight.as_strided(*self.places, weight.storage_offset()), self.sample
            )
        )


_entries: dict[Key, _Entry] = {}
_lock = threading.Lock()


def _places(weight: Tensor) -> Places:
    """Size and strides of the sample of a weight; all of a small one.

    Of a large one, a few runs spread over its memory: runs of neighbours, because each
    place that is looked at is a miss of every cache.
    """
    if weight.numel() == 0:
        return (0,), (1,)
    extent = reference.strided_extent(weight.shape, weight.stride())
    if extent <= WHOLE:
        return (extent,), (1,)
    return (RUNS, RUN), (extent // RUNS, 1)


def fetch(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """The cached copy of a window of ``weight``; see ``reference.row_major_weight``.

    Raises:
        SparseShapeError: the window does not lie inside the weight.
    """
    if weight.is_inference():  # no version counter: nothing could be noticed
        return reference.row_major_weight(weight, size, stride, storage_offset, dtype)
    key = (weight.data_ptr(), storage_offset, tuple(size), tuple(stride), dtype)
    entry = _entries.get(key)
    if entry is not None and entry.is_right(weight):
        return entry.copy
    return _refresh(key, weight.detach())


def _refresh(key: Key, weight: Tensor) -> Tensor:
    _, storage_offset, size, stride, dtype = key
    reference.check_window(weight, size, stride, storage_offset)
    with _lock, torch.no_grad():
        _drop_dead()
        version = weight._version
        places = _places(weight)
        copy = empty_in_huge_pages(size, dtype)
        start = weight.storage_offset() + storage_offset
        copy.copy_(weight.as_strided(size, stride, start))
        _entries[key] = _Entry(
            storage=StorageWeakRef(weight.untyped_storage()),
            version=version,
            places=places,
            sample=weight.as_strided(*places, weight.storage_offset()).clone(),
            copy=copy,
        )
        return copy


def _drop_dead() -> None:
    for key in [k for k, entry in _entries.items() if entry.storage.expired()]:
        del _entries[key]


def nbytes() -> int:
    """Bytes held by all copies of weights that are still alive."""
    with _lock:
        _drop_dead()
        return sum(entry.copy.nbytes for entry in _entries.values())


def forget() -> None:
    """Drop every copy; each is made again when it is next needed."""
    with _lock:
        _entries.clear()


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
_library.impl("row_major_weight", fetch, "CPU")
