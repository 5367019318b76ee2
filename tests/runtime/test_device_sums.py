"""Sums on a device are copied behind their zero fill, whatever stream it is on."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from inductor_sparse.runtime import device_sums

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Stream:
    """A stream that tells what it was given."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def record_event(self) -> str:
        self.told.append("event")
        return f"event {len(self.told)}"

    def wait_event(self, event: str) -> None:
        self.told.append(f"waits for {event}")


class OnDevice:
    """What is asked of sums on a GPU."""

    device, shape, dtype = CUDA, (4,), torch.int64


class Copy:
    """The copy of one tensor of sums on the host."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def copy_(self, values: OnDevice, non_blocking: bool) -> None:
        assert non_blocking
        self.told.append("copies")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(told))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return told


def test_sums_of_a_gpu_know_when_they_are_filled(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(*_: Any, **how: Any) -> OnDevice:
        told.append(f"fills {how['dtype']} on {how['device']}")
        return OnDevice()

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(device_sums, "outside_graph_pools", lambda _, make: make())
    sums = device_sums.zeros((4,), torch.int64, CUDA)
    assert told == ["fills torch.int64 on cuda", "event"]
    assert sums.filled == "event 2"


def test_sums_of_a_cpu_are_filled_at_once() -> None:
    sums = device_sums.zeros((4,), torch.int64, CPU)
    assert sums.filled is None
    assert sums.are_filled()
    assert sums.values.tolist() == [0, 0, 0, 0]


def test_a_copy_comes_behind_the_fill(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: [Copy(told), Copy(told)])
    sums = [device_sums.Sums(OnDevice(), f"fill {i}") for i in range(2)]  # type: ignore[arg-type]
    copies = device_sums.start_copies(sums)
    assert told == [
        "waits for fill 0",
        "copies",
        "waits for fill 1",
        "copies",
        "event",
    ]
    assert copies.event == "event 5"
