"""Memory asked for outside of the pools of CUDA graphs; on a CPU a plain call."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from inductor_sparse.runtime.graph_pools import outside_graph_pools


def test_on_a_cpu_it_is_a_call() -> None:
    device = torch.device("cpu")
    assert outside_graph_pools(device, threading.get_ident) == threading.get_ident()
    with pytest.raises(KeyError):
        outside_graph_pools(device, lambda: {}["missing"])


class Stream:
    """A stream that tells what it was given, and by whom."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self.told = told

    def record_event(self) -> str:
        self.told.append(f"{self.name} records")
        return self.name

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")


def test_streams_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    here = threading.get_ident()

    def current_stream(device: torch.device) -> Stream:
        return Stream("outer" if threading.get_ident() == here else "own", told)

    def make() -> int:
        assert not torch.is_grad_enabled()
        told.append("made")
        return 7

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    assert outside_graph_pools(torch.device("cuda"), make) == 7
    assert told == [
        "outer records",
        "own waits for outer",
        "made",
        "own records",
        "outer waits for own",
    ]
    with pytest.raises(KeyError):
        outside_graph_pools(torch.device("cuda"), lambda: {}["missing"])
