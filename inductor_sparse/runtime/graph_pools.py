"""Memory that outlives a CUDA graph, asked for while one is warmed up.

Inductor runs a graph for the first time inside the memory pool of the graph itself, and
takes back what it does not know.  The pool holds for one thread: another one gets
ordinary memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def outside_graph_pools(device: torch.device, make: Callable[[], T]) -> T:
    """What ``make`` returns, its tensors on ``device`` in no pool of a CUDA graph.

    Work of ``make`` comes after what the current stream has been given so far, and
    before what it is given next.  What ``make`` raises is raised here.  Not while a
    graph is being captured: a captured stream waits for nothing outside.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)
    before = stream.record_event()
    made: list[Any] = []

    def run() -> None:
        try:
            with torch.cuda.device(device), torch.no_grad():
                own = torch.cuda.current_stream(device)
                own.wait_event(before)
                made.append(make())
                made.append(own.record_event())
        except BaseException as error:
            made[:] = [error]

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if len(made) == 1:
        raise made[0]
    stream.wait_event(made[1])
    return made[0]
