"""Settings shared by all tests.

Random tensors are the same in every run, whatever else is selected.  Property tests
are repeatable and have no deadline.  Every graph is compiled anew, in a cache folder
that belongs to this run: what an earlier test or run compiled decides nothing here.
Kernels are the exception: the compiled form of the same C++ text is shared by all
workers of the run.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Helper modules such as `numerics` are imported by name from any folder of tests.
sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# One C++ compilation at a time in each worker: a pool of compile processes costs more
# to start than it saves on graphs this small.  Read by torch when it is imported.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Triton 3.9 warns wherever its coming default is not decided beforehand.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Tensors made when a test file is imported are the same in every run."""
    import torch

    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What was imported so far stays: looking for garbage in it took 7 % of the time.

    Compiling makes garbage by the million, so it is looked for less often as well.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tensors made by a test do not depend on the tests that ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point Inductor, here and in child processes, at a folder of this run."""
    base = tmp_path_factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(run / "inductor"))
        yield


@pytest.fixture(autouse=True)
def _no_graph_cache() -> Iterator[None]:
    """A graph out of a warm cache has no decisions; tests of the caches turn it on."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    with (
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.fixture(autouse=True)
def _no_structured_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest listens to every logger that keeps to itself; torch takes that as a wish.

    A logger that propagates is left alone, and without a handler nothing is traced.
    """
    logger = logging.getLogger("torch.__trace")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])


@pytest.fixture
def launched_by_cuda_graphs() -> Iterator[None]:
    """As a caller says who captures what is compiled in CUDA graphs."""
    from inductor_sparse import config

    with config.patch(cuda_graphs=True):
        yield
