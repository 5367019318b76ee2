"""Row-contiguous and quantized copies of weights, made once and kept right.

``nn.Linear`` stores a weight ``[out, in]``; skipping neurons needs the rows of its
transpose to be contiguous, and 8-bit products need its rows quantized.  :func:`fetch`
and :func:`fetch_quantized` are the kernels of ``row_major_weight`` and
``quantized_weight``: they return copies that are made on first use and made again when
the weight has changed.  A change is noticed by

- the identity of the storage, held by a weak reference so that a freed and reused
  address is never taken for the old weight (``param.data = x``, re-tying);
- the version counter, bumped by every in-place operation that autograd sees
  (``load_state_dict``, optimizer steps, ``copy_`` under ``no_grad``);
- on a CPU, a sample of elements, for writes that bypass the counter
  (``param.data.mul_()``).  On a GPU that would wait for the device.

A CUDA graph that is replayed asks for nothing: :mod:`~.watched_weights` looks after the
copies in it.  For that they keep their address, and outlive their weight until
Inductor's graphs are gone: one is replayed if another weight lies in the same place.

A write through ``.data`` or ``numpy()`` to elements outside the sample only is the one
thing not noticed: :func:`forget` drops the copies, :func:`inductor_sparse.prepare`
avoids them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from inductor_sparse import ops, reference
from inductor_sparse.runtime.graph_pools import outside_graph_pools
from inductor_sparse.runtime.huge_pages import empty_in_huge_pages

WHOLE = 4096
"""A weight of so many elements is compared whole: that is as quick as a sample."""

RUNS, RUN = 4, 16
"""A larger weight is sampled in so many places, so many elements each."""

UNKNOWN = -1
"""The version of a weight that is to be copied again, whatever its own is."""

Places = tuple[tuple[int, ...], tuple[int, ...]]


class Key(NamedTuple):
    """Which copy of which weight; a tuple, because one is made at every call.

    The weight is known by how it lies as well as by its address: a tensor of another
    size may begin there when it has died, and the old window be no part of that.
    """

    address: int
    device: torch.device
    weight_size: tuple[int, ...]
    weight_stride: tuple[int, ...]
    weight_dtype: torch.dtype
    storage_offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    quantized: bool = False

    @classmethod
    def of(
        cls,
        weight: Tensor,
        size: Sequence[int],
        stride: Sequence[int],
        storage_offset: int,
        dtype: torch.dtype,
        *,
        quantized: bool = False,
    ) -> Key:
        """The key of a window of ``weight``; see ``reference.row_major_weight``."""
        return cls(
            weight.data_ptr(),
            weight.device,
            weight.shape,
            weight.stride(),
            weight.dtype,
            storage_offset,
            tuple(size),
            tuple(stride),
            dtype,
            quantized,
        )

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight``, at the address of the copied one, lies as that did."""
        return (
            self.weight_size == weight.shape
            and self.weight_stride == weight.stride()
            and self.weight_dtype == weight.dtype
            and self.device == weight.device
        )

    def make(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The copy of ``weight``, as the tensors it consists of."""
        window = (weight, self.size, self.stride, self.storage_offset, self.dtype)
        if self.quantized:
            return reference.quantized_weight(*window)
        if weight.device.type != "cpu":
            return (reference.row_major_weight(*window),)
        reference.check_window(*window[:-1])
        copy = empty_in_huge_pages(self.size, self.dtype)
        start = weight.storage_offset() + self.storage_offset
        return (copy.copy_(weight.as_strided(self.size, self.stride, start)),)


@dataclasses.dataclass
class Entry:
    """One copy, and the state of the weight that it was made from.

    ``places`` are the size and strides of the sample; both are None on a GPU.
    ``captured`` says that a CUDA graph reads the copy: it may be replayed when another
    weight has come to lie in the same place, so the memory must stay.
    """

    key: Key
    storage: StorageWeakRef
    version: int
    copies: tuple[Tensor, ...]
    places: Places | None = None
    sample: Tensor | None = None
    captured: bool = False

    def is_right(self, weight: Tensor) -> bool:
        """Whether ``weight``, in the place of the copied one, still has its values.

        A NaN never equals itself: in the sample it costs a refresh, never a stale copy.
        """
        if weight._version != self.version or self.storage.expired():
            return False
        if self.places is None or self.sample is None:
            return True
        window = weight.as_strided(*self.places, weight.storage_offset())
        return torch.equal(window, self.sample)


Entries = dict[Key, Entry]

# By the address of the weight.  Read without the lock: the inner dicts are replaced as
# a whole, never changed.
_entries: dict[int, Entries] = {}
_none: Entries = {}
_changes = 0
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
    """The kept copy of a window of ``weight``; see ``reference.row_major_weight``.

    Raises:
        SparseShapeError: the window does not lie inside the weight.
    """
    key = Key.of(weight, size, stride, storage_offset, dtype)
    (copy,) = _fetch(key, weight)
    return copy


def fetch_quantized(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept quantized copy of a window; see ``reference.quantized_weight``.

    Raises:
        SparseShapeError: the window does not lie inside the weight or is not 2-D, or a
            dtype is not supported.
    """
    key = Key.of(weight, size, stride, storage_offset, dtype, quantized=True)
    values, scale, norm = _fetch(key, weight)
    return values, scale, norm


def kept(key: Key, weight: Tensor) -> tuple[Tensor, ...] | None:
    """The copies of ``weight`` that are kept and right, None if there are none.

    None as well where more than looking is needed: in a CUDA graph being captured, and
    for a weight without a version counter.
    """
    if weight.is_inference() or _is_captured(weight):
        return None
    entry = _entries.get(key.address, _none).get(key)
    return entry.copies if entry is not None and entry.is_right(weight) else None


def _is_captured(weight: Tensor) -> bool:
    """Whether what reads ``weight`` now goes into a CUDA graph."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _fetch(key: Key, weight: Tensor) -> tuple[Tensor, ...]:
    copies = kept(key, weight)
    if copies is not None:
        return copies
    if weight.is_inference():  # no version counter: nothing could be noticed
        return key.make(weight)
    if _is_captured(weight):
        return _captured(key, weight)
    return refresh(key, weight.detach()).copies


def _captured(key: Key, weight: Tensor) -> tuple[Tensor, ...]:
    """The kept copy, for a CUDA graph that reads it from now on.

    A graph that nobody has warmed up makes a copy of its own at every replay.
    """
    with _lock:
        entry = _entries.get(key.address, _none).get(key)
        if entry is not None and entry.is_right(weight):
            entry.captured = True
            return entry.copies
    return key.make(weight)


def refresh(key: Key, weight: Tensor) -> Entry:
    """Make a copy of ``weight`` again, or for the first time.

    On a GPU it keeps its place in memory: captured CUDA graphs read from there.  So
    does that of a dead weight in whose place ``weight`` has come to lie: a graph that
    is replayed knows its inputs by their addresses only.

    Raises:
        SparseShapeError: the window does not lie inside the weight.
    """
    global _changes
    with _lock, torch.no_grad():
        _drop(_is_dead, but=key)
        version = weight._version
        old = _entries.get(key.address, _none).get(key)
        copies = outside_graph_pools(weight.device, lambda: key.make(weight))
        if old is not None and weight.device.type == "cuda":
            for kept, new in zip(old.copies, copies, strict=True):
                kept.copy_(new)
            copies = old.copies
        storage = StorageWeakRef(weight.untyped_storage())
        captured = old is not None and old.captured
        entry = Entry(key, storage, version, copies, captured=captured)
        if weight.device.type == "cpu":
            entry.places = _places(weight)
            sample = weight.as_strided(*entry.places, weight.storage_offset())
            entry.sample = sample.clone()
        _entries[key.address] = {**_entries.get(key.address, _none), key: entry}
        _changes += 1
        return entry


def _is_dead(entry: Entry) -> bool:
    return entry.storage.expired() and not entry.captured


def _drop(unwanted: Callable[[Entry], bool], but: Key | None = None) -> None:
    """Drop the copies that are unwanted, except one."""
    for address, entries in list(_entries.items()):
        wanted = {k: e for k, e in entries.items() if k == but or not unwanted(e)}
        if not wanted:
            del _entries[address]
        elif len(wanted) < len(entries):
            _entries[address] = wanted


def entries_of(weight: Tensor) -> list[Entry]:
    """The copies of ``weight``, or of one that has lain just as it does."""
    entries = _entries.get(weight.data_ptr())
    return [e for e in entries.values() if e.key.is_of(weight)] if entries else []


def changes() -> int:
    """How often a copy was made: a number that says whether there is anything new."""
    return _changes


def nbytes() -> int:
    """Bytes held by the copies of living weights, and by those in CUDA graphs."""
    with _lock:
        _drop(_is_dead)
        kept = [entry for entries in _entries.values() for entry in entries.values()]
        return sum(copy.nbytes for entry in kept for copy in entry.copies)


def forget(*, graphs_are_gone: bool = False) -> None:
    """Drop every copy; each is made again when it is next needed.

    One that a CUDA graph reads stays where it is, because the graph may be replayed
    when its weight, or another in the place of that, is next used: it is written again
    before.

    Args:
        graphs_are_gone: Inductor's own graphs will never be replayed.  Those of callers
            may be, but not without their weight: no copy outlives its weight then.
    """
    with _lock:
        _drop(lambda e: not e.captured or (graphs_are_gone and e.storage.expired()))
        for entries in _entries.values():
            for entry in entries.values():
                entry.version = UNKNOWN


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
for _device in ("CPU", "CUDA"):
    _library.impl("row_major_weight", fetch, _device)
    _library.impl("quantized_weight", fetch_quantized, _device)
