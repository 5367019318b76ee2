"""Copies of weights under CUDA graphs: looked after before each call.

A captured graph is replayed without a call of ``row_major_weight``, so nobody would
notice that a weight has changed.  Here the inputs of a compiled graph are compared with
the copies that were made of them, and a copy that is stale is written again where it
lies.  That costs a microsecond for a weight, and nothing without copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from inductor_sparse.runtime import prepared_weights


class _Watch:
    """The inputs of one compiled graph that copies were made of, by their position."""

    def __init__(self) -> None:
        self._positions: list[int] = []
        self._known = -1

    def refresh(self, args: Sequence[Any]) -> None:
        """Write every copy again whose weight has changed in place."""
        for position in self._positions:
            weight = args[position]
            for entry in prepared_weights.entries_of(weight):
                if not entry.is_right(weight):
                    prepared_weights.refresh(entry.key, weight.detach())

    def learn(self, args: Sequence[Any]) -> None:
        """Find the inputs that have copies, if a copy was made since the last call."""
        if self._known == prepared_weights.changes():
            return
        self._known = prepared_weights.changes()
        found = {
            position
            for position, value in enumerate(args)
            if is_on_gpu(value)
            and not value.is_inference()
            and prepared_weights.entries_of(value)
        }
        self._positions = sorted(found.union(self._positions))


def is_on_gpu(value: object) -> bool:
    """Whether a value is a tensor on a GPU."""
    return isinstance(value, Tensor) and value.is_cuda


def watched(
    compiled: Callable[..., Any], example_inputs: Iterable[Any]
) -> Callable[..., Any]:
    """``compiled``, its copies of weights kept right; itself if none is on a GPU."""
    if not any(map(is_on_gpu, example_inputs)):
        return compiled
    watch = _Watch()

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        watch.refresh(args)
        result = compiled(*args)
        watch.learn(args)
        return result

    return call
