"""The kept copies of weights: made once, and never stale."""

from __future__ import annotations

import contextlib
import gc
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from inductor_sparse import backend
from inductor_sparse.runtime import prepared_weights

OP = torch.ops.inductor_sparse.row_major_weight


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    prepared_weights.forget(graphs_are_gone=True)
    yield
    prepared_weights.forget(graphs_are_gone=True)


def transposed(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The kept row-contiguous transpose of ``weight [N, K]``."""
    with torch.no_grad():
        N, K = weight.shape
        return OP(weight, [K, N], [1, K], 0, dtype or weight.dtype)


def test_the_copy_is_made_once_and_counted() -> None:
    weight = nn.Parameter(torch.randn(48, 80))
    first = transposed(weight)
    assert first.is_contiguous()
    assert torch.equal(first, weight.t())
    assert transposed(weight).data_ptr() == first.data_ptr()
    assert prepared_weights.nbytes() == weight.nbytes


def test_a_cast_is_part_of_the_copy() -> None:
    weight = nn.Parameter(torch.randn(48, 80))
    low = transposed(weight, torch.bfloat16)
    assert torch.equal(low, weight.t().bfloat16())
    assert transposed(weight).dtype is torch.float32
    assert prepared_weights.nbytes() == weight.nbytes * 3 // 2


def add_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1.0)


def write_one_element(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[3, 5] = 7.0


def scale_data(weight: nn.Parameter) -> None:
    weight.data.mul_(0.5)  # not seen by the version counter


def announce_a_write(weight: nn.Parameter) -> None:
    weight.data[50, 70] += 1.0  # not seen by the version counter, nor in the sample
    torch.autograd.graph.increment_version(weight)


def replace_data(weight: nn.Parameter) -> None:
    weight.data = torch.randn_like(weight)


def replace_data_twice(weight: nn.Parameter) -> None:
    # The second tensor may be given the address of the first weight.
    weight.data = torch.randn_like(weight)
    gc.collect()
    weight.data = torch.randn_like(weight)


def step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1).step()


@pytest.mark.parametrize(
    "change",
    [
        add_in_place,
        write_one_element,
        scale_data,
        announce_a_write,
        replace_data,
        replace_data_twice,
        step,
    ],
)
def test_the_copy_follows_the_weight(change: Callable[[nn.Parameter], None]) -> None:
    weight = nn.Parameter(torch.randn(100, 80))
    for _ in range(2):
        transposed(weight)
        change(weight)
        assert torch.equal(transposed(weight), weight.t())


def test_the_copy_of_a_freed_weight_is_dropped() -> None:
    weight = nn.Parameter(torch.randn(48, 80))
    transposed(weight)
    del weight
    gc.collect()
    assert prepared_weights.nbytes() == 0


def placed(memory: bytearray, N: int, K: int) -> Tensor:
    """A weight of its own storage, at the address of ``memory``."""
    weight = torch.frombuffer(memory, dtype=torch.float32, count=N * K).view(N, K)
    return weight.copy_(torch.randn(N, K))


def test_the_copy_in_a_cuda_graph_outlives_its_weight() -> None:
    memory = bytearray(48 * 80 * 4)
    weight = placed(memory, 48, 80)
    copy = transposed(weight)
    (entry,) = prepared_weights.entries_of(weight)
    entry.captured = True  # as a capture does
    del weight
    assert prepared_weights.nbytes() == copy.nbytes
    # A graph is replayed if another weight has come to lie in the same place.
    other = placed(memory, 48, 80)
    assert torch.equal(transposed(other), other.t())
    (entry,) = prepared_weights.entries_of(other)
    assert entry.captured


def test_a_reset_leaves_a_cuda_graph_its_copy_until_the_weight_is_gone() -> None:
    """The graph may be one that its caller captured: nobody says when it goes."""
    weight = nn.Parameter(torch.randn(100, 80))
    transposed(weight)
    (entry,) = prepared_weights.entries_of(weight)
    in_graph = StorageWeakRef(entry.copies[0].untyped_storage())
    entry.captured = True  # as a capture does
    transposed(weight, torch.bfloat16)
    del entry
    backend.reset()
    assert prepared_weights.nbytes() == weight.nbytes
    assert not in_graph.expired()
    del weight
    prepared_weights.forget()  # not by this: Inductor's graphs can still be replayed
    assert not in_graph.expired()
    backend.reset()
    assert in_graph.expired()
    assert prepared_weights.nbytes() == 0


@pytest.mark.parametrize("captured", [False, True])
def test_what_is_forgotten_is_copied_again(captured: bool) -> None:
    weight = nn.Parameter(torch.randn(100, 80))
    transposed(weight)
    (entry,) = prepared_weights.entries_of(weight)
    entry.captured = captured
    weight.data[50, 70] = 7.0  # not seen by the version counter, nor in the sample
    assert not torch.equal(transposed(weight), weight.t())
    prepared_weights.forget()
    assert torch.equal(transposed(weight), weight.t())
    (entry,) = prepared_weights.entries_of(weight)
    assert entry.captured is captured


def test_another_view_of_a_weight_has_copies_of_its_own() -> None:
    weight = torch.randn(48, 80)
    transposed(weight)
    for view in (weight[:24], weight.view(24, 160), weight.view(torch.int32)):
        assert view.data_ptr() == weight.data_ptr()
        assert prepared_weights.entries_of(view) == []
    assert len(prepared_weights.entries_of(weight.detach())) == 1


@contextlib.contextmanager
def between_lines(read: Callable[[], object]) -> Iterator[None]:
    """Let another thread, as it were, read before each line of the module that runs."""

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != prepared_weights.__file__:
            return None
        if event == "line":
            sys.settrace(None)
            try:
                read()
            finally:
                sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("write", [prepared_weights.nbytes, prepared_weights.forget])
def test_readers_never_meet_a_copy_that_is_half_dropped(
    write: Callable[[], object],
) -> None:
    weight, other = torch.randn(48, 80), torch.randn(48, 80)
    transposed(weight)
    transposed(other)
    transposed(other, torch.bfloat16)
    (entry,) = prepared_weights.entries_of(weight)
    entry.storage = StorageWeakRef(torch.empty(1).untyped_storage())
    found: list[tuple[int, int]] = []

    def read() -> None:
        of_both = map(prepared_weights.entries_of, (weight, other))
        dead, living = map(len, of_both)
        found.append((dead, living))

    with between_lines(read):
        write()
    left = 0 if write is prepared_weights.forget else 2
    assert (found[0], found[-1]) == ((1, 2), (0, left))
    assert set(found) <= {(1, 2), (0, 2), (0, 0)}


def test_the_memory_of_a_dead_weight_belongs_to_another() -> None:
    """Where nothing is compared, as on a GPU, the storage alone tells."""
    weight = torch.randn(48, 80)
    transposed(weight)
    (entry,) = prepared_weights.entries_of(weight)
    entry.places = None
    assert entry.is_right(weight)
    del weight
    gc.collect()
    assert not entry.is_right(torch.randn(48, 80))


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda")  # type: ignore[assignment]


def test_a_copy_that_a_cuda_graph_reads_keeps_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepared_weights, "outside_graph_pools", lambda _, make: make())
    capturing = False
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: capturing, raising=False
    )
    weight = torch.randn(48, 80).as_subclass(OnGpu)
    window = ([80, 48], [1, 80], 0, weight.dtype)
    copy = prepared_weights.fetch(weight, *window)
    (entry,) = prepared_weights.entries_of(weight)
    assert not entry.captured
    capturing = True
    assert prepared_weights.fetch(weight, *window) is copy
    assert entry.captured
    with torch.no_grad():
        weight.mul_(2)
    # A graph that nobody warmed up makes a copy of its own.
    assert prepared_weights.fetch(weight, *window).data_ptr() != copy.data_ptr()
    capturing = False
    assert prepared_weights.fetch(weight, *window).data_ptr() == copy.data_ptr()
    assert torch.equal(copy, weight.t())
    (entry,) = prepared_weights.entries_of(weight)
    assert entry.captured


def test_a_new_weight_at_the_same_address_has_its_own_copy() -> None:
    for _ in range(20):  # the allocator hands out the same block again
        weight = nn.Parameter(torch.randn(48, 80))
        assert torch.equal(transposed(weight), weight.t())
        del weight


def test_windows_of_one_weight_are_kept_apart() -> None:
    weight = nn.Parameter(torch.randn(48, 80))
    with torch.no_grad():
        left = OP(weight, [40, 48], [1, 80], 0, weight.dtype)
        right = OP(weight, [40, 48], [1, 80], 40, weight.dtype)
    assert torch.equal(left, weight[:, :40].t())
    assert torch.equal(right, weight[:, 40:].t())


def test_a_small_weight_is_compared_whole() -> None:
    weight = nn.Parameter(torch.randn(24, 40))
    transposed(weight)
    weight.data[23, 38] = 7.0  # one element, not seen by the version counter
    assert torch.equal(transposed(weight), weight.t())


@pytest.mark.parametrize("shape", [(0, 8), (300, 1), (1, 9000)])
def test_sizes_of_zero_and_one(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.randn(shape))
    for _ in range(2):
        assert torch.equal(transposed(weight), weight.t())


def test_an_expanded_weight_takes_less_memory_than_it_has_elements() -> None:
    weight = torch.randn(5).expand(2000, 5)
    for _ in range(2):
        assert torch.equal(OP(weight, [5, 2000], [1, 0], 0, weight.dtype), weight.t())


def test_an_inference_tensor_is_copied_every_time() -> None:
    with torch.inference_mode():
        weight = torch.randn(48, 80)
        first = transposed(weight)
        weight.mul_(2)
        assert torch.equal(transposed(weight), weight.t())
    assert first.data_ptr() != transposed(weight).data_ptr()
