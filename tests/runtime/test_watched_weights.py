"""Copies behind a CUDA graph are kept right; shown with weights on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inductor_sparse.runtime import prepared_weights, watched_weights

OP = torch.ops.inductor_sparse.row_major_weight


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        watched_weights, "is_on_gpu", lambda value: isinstance(value, Tensor)
    )
    prepared_weights.forget(graphs_are_gone=True)
    yield
    prepared_weights.forget(graphs_are_gone=True)


class Replayed:
    """A graph that asks for its copy when it is captured, and never again."""

    def __init__(self) -> None:
        self.captured: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight.data_ptr() not in self.captured:
            N, K = weight.shape
            copy = OP(weight, [K, N], [1, K], 0, weight.dtype)
            self.captured[weight.data_ptr()] = copy
        return x @ prepared_copy(weight, self.captured)


def prepared_copy(weight: Tensor, captured: dict[int, Tensor]) -> Tensor:
    """On a GPU the memory of the captured copy is written again, here it is looked up.

    Either way nobody asks whether it is stale.
    """
    (entry,) = prepared_weights.entries_of(weight)
    del captured
    return entry.copies[0]


def assert_product(got: Tensor, x: Tensor, weight: Tensor) -> None:
    torch.testing.assert_close(got, x @ weight.t(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_change_in_place_is_seen_by_the_next_call() -> None:
    weight, x = nn.Parameter(torch.randn(48, 80)), torch.randn(3, 80)
    call = watched_weights.watched(Replayed(), [x, weight])
    for _ in range(3):
        assert_product(call(x, weight), x, weight)
        weight.add_(1.0)


@torch.no_grad()
def test_another_weight_is_captured_anew() -> None:
    x = torch.randn(3, 80)
    call = watched_weights.watched(Replayed(), [x])
    weights = [nn.Parameter(torch.randn(48, 80)) for _ in range(3)]
    for weight in (*weights, *weights):
        weight.mul_(2)
        assert_product(call(x, weight), x, weight)


@torch.no_grad()
def test_a_copy_that_was_there_already() -> None:
    weight, x = nn.Parameter(torch.randn(48, 80)), torch.randn(3, 80)
    OP(weight, [80, 48], [1, 80], 0, weight.dtype)
    call = watched_weights.watched(Replayed(), [x])
    for _ in range(3):
        assert_product(call(x, weight), x, weight)
        weight.add_(1.0)


@torch.no_grad()
def test_two_graphs_of_one_weight() -> None:
    weight, x = nn.Parameter(torch.randn(48, 80)), torch.randn(3, 80)
    calls = [watched_weights.watched(Replayed(), [x]) for _ in range(2)]
    for _ in range(3):
        weight.add_(1.0)
        for call in calls:
            assert_product(call(x, weight), x, weight)


@torch.no_grad()
def test_a_weight_that_comes_back_is_still_watched() -> None:
    first, other, elsewhere = (nn.Parameter(torch.randn(48, 80)) for _ in range(3))
    watch = watched_weights._Watch()
    for copied, given in ((first, first), (elsewhere, other)):
        OP(copied, [80, 48], [1, 80], 0, copied.dtype)
        watch.learn((given,))
    first.mul_(2)
    watch.refresh((first,))
    (entry,) = prepared_weights.entries_of(first)
    assert torch.equal(entry.copies[0], first.t())


@torch.no_grad()
def test_a_tensor_without_versions_is_not_watched() -> None:
    weight, x = torch.randn(48, 80), torch.randn(3, 80)
    OP(weight, [80, 48], [1, 80], 0, weight.dtype)
    with torch.inference_mode():
        alias = torch.from_dlpack(weight)
    assert alias.is_inference()
    assert alias.data_ptr() == weight.data_ptr()
    call = watched_weights.watched(Replayed(), [x])
    for _ in range(2):
        assert_product(call(x, alias), x, weight)


@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 80), (48, 40), (80, 48)])
def test_another_weight_where_one_has_died(size: tuple[int, int]) -> None:
    """Its copy is in a CUDA graph, and no part of what lies there now."""
    memory = bytearray(48 * 80 * 4)
    weight = torch.frombuffer(memory, dtype=torch.float32).view(48, 80)
    copy = OP(weight, [80, 48], [1, 80], 0, weight.dtype)
    (entry,) = prepared_weights.entries_of(weight)
    entry.captured = True  # as a capture does
    before = copy.clone()
    del weight
    count = size[0] * size[1]
    other = torch.frombuffer(memory, dtype=torch.float32, count=count).view(size)
    x = torch.randn(3, size[1])
    call = watched_weights.watched(Replayed(), [x, other])
    for _ in range(3):
        other.add_(1.0)
        assert_product(call(x, other), x, other)
    assert torch.equal(copy, before)
    assert prepared_weights.nbytes() == copy.nbytes + other.nbytes


def test_graphs_without_a_gpu_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def compiled(*args: Any) -> Any:
        return args

    assert watched_weights.watched(compiled, [torch.ones(2), 3]) is compiled


def test_quantized_copies_are_kept_and_follow_the_weight() -> None:
    op = torch.ops.inductor_sparse.quantized_weight
    weight = torch.randn(48, 80)

    def quantized() -> tuple[Tensor, Tensor, Tensor]:
        return op(weight, [48, 80], [80, 1], 0, torch.int8)

    values, scale, norm = quantized()
    assert quantized()[0].data_ptr() == values.data_ptr()
    assert prepared_weights.nbytes() == values.nbytes + scale.nbytes + 4
    weight.mul_(2)
    assert torch.equal(quantized()[0], values)
    torch.testing.assert_close(quantized()[1], 2 * scale)
    torch.testing.assert_close(quantized()[2], 2 * norm)
