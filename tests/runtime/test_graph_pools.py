"""Memory asked for outside of the pools of CUDA graphs; on a CPU a plain call."""

from __future__ import annotations

import threading

import pytest
import torch

from inductor_sparse.runtime.graph_pools import outside_graph_pools


def test_on_a_cpu_it_is_a_call() -> None:
    device = torch.device("cpu")
    assert outside_graph_pools(device, threading.get_ident) == threading.get_ident()
    with pytest.raises(KeyError):
        outside_graph_pools(device, lambda: {}["missing"])
