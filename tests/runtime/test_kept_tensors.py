"""What generated code calls instead of an op: the same tensors, found without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from inductor_sparse import lowerings
from inductor_sparse.runtime import kept_tensors, prepared_weights

lowerings.register_all()
OPS = torch.ops.inductor_sparse
WINDOW = ([80, 48], [1, 80], 0, torch.float32)
EIGHT_BITS = ([48, 80], [80, 1], 0, torch.int8)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    prepared_weights.forget(graphs_are_gone=True)
    yield
    prepared_weights.forget(graphs_are_gone=True)


class Dispatched(TorchDispatchMode):
    """The names of the ops of ours that were dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "inductor_sparse":
            self.ours.append(func._opname)
        return func(*args, **(kwargs or {}))


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


CALLS = [
    ("row_major_weight", WINDOW),
    ("quantized_weight", EIGHT_BITS),
    ("site_counters", ("ffn.down",)),
    ("site_energy", ("ffn.down",)),
]


@pytest.mark.parametrize("name, args", CALLS)
@torch.no_grad()
def test_the_tensor_is_that_of_the_op(name: str, args: tuple[Any, ...]) -> None:
    weight = nn.Parameter(torch.randn(48, 80))
    direct, op = getattr(kept_tensors, name), getattr(OPS, name)
    kept = first(op(weight, *args))
    with Dispatched() as seen:
        again = first(direct(weight, *args))
    assert again.data_ptr() == kept.data_ptr()
    assert seen.ours == []


@pytest.mark.parametrize("name, args", CALLS[:2])
@torch.no_grad()
def test_a_changed_weight_is_seen(name: str, args: tuple[Any, ...]) -> None:
    weight = nn.Parameter(torch.randn(48, 80))
    direct = getattr(kept_tensors, name)
    before = first(direct(weight, *args)).clone()
    weight.mul_(-1)
    with Dispatched() as seen:
        after = first(direct(weight, *args))
    assert torch.equal(after, -before)
    assert seen.ours == [name]


def window(weight: Tensor, *args: Any) -> Tensor:
    return kept_tensors.row_major_weight(weight, *args)


@pytest.mark.parametrize(
    "direct", [window, *(getattr(kept_tensors, name) for name, _ in CALLS[1:])]
)
def test_fake_tensors_go_through_the_op(direct: Callable[..., Any]) -> None:
    args = dict(CALLS).get(direct.__name__, WINDOW)
    with FakeTensorMode() as mode:
        result = first(direct(torch.empty(48, 80), *args))
    assert isinstance(result, torch._subclasses.FakeTensor)
    assert result.fake_mode is mode


def test_a_weight_without_a_version_counter_is_never_stale() -> None:
    with torch.inference_mode():
        weight = torch.randn(48, 80)
        kept_tensors.row_major_weight(weight, *WINDOW)
        weight.mul_(-1)
        again = kept_tensors.row_major_weight(weight, *WINDOW)
        assert torch.equal(again, weight.t())
