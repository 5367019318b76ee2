"""What 2:4 sites drop on a GPU: summed by kernels, in CUDA graphs too; no waiting."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import inductor_sparse
from inductor_sparse import reference
from inductor_sparse.runtime import site_energy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OP = torch.ops.inductor_sparse.site_energy
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU: others have no 2:4 kernels that were tried",
)


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_energy, "_sites", {})
    monkeypatch.setattr(site_energy, "_unsettled", [])


def add(site: str, kept: float, total: float) -> None:
    """What a kernel of a site does."""
    energy = OP(torch.empty(1, device="cuda"), site)
    energy[7, 0] += kept
    energy[7, 1] += total


def test_read_waits_for_nothing_that_is_queued() -> None:
    add("a", 3, 4)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(2_000_000_000)
        add("a", 3, 4)
        event = torch.cuda.current_stream().record_event()
        (early,) = site_energy.read()
        assert not event.query()
    torch.cuda.synchronize()
    (late,) = site_energy.read()
    assert (early.kept, early.total) == (3, 4)
    assert (late.kept, late.total, late.device) == (6, 8, "cuda:0")


def test_a_warning_comes_without_waiting(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, site_energy.log.name)
    graph = site_energy.observed(lambda: add("a", 90, 100), limit=0.05)
    for _ in range(3):
        graph()
        torch.cuda.synchronize()
    assert len(caplog.records) == 1
    assert "a: 2:4 drops 10.00 %" in caplog.text


def test_a_captured_graph_goes_on_adding() -> None:
    add("a", 1, 2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add("a", 1, 2)
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    (energy,) = site_energy.read()
    assert (energy.kept, energy.total) == (6, 12)


def test_a_site_first_met_in_a_capture_is_not_kept() -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add("a", 1, 2)
    graph.replay()
    torch.cuda.synchronize()
    assert site_energy.read() == []


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2048, 8192, bias=False)
        self.down = nn.Linear(8192, 2048, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)) ** 2)


@hopper
# Inductor begins with a graph that is empty on purpose.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_ffn(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, site_energy.log.name)
    torch.manual_seed(0)
    model = FFN().cuda().bfloat16().eval()
    x = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16)
    options = {"sparse.activation_format": "2:4"}
    if mode == "reduce-overhead":
        options["triton.cudagraphs"] = True  # type: ignore[assignment]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sparse", options=options)
    with torch.no_grad():
        for _ in range(5):
            result = compiled(x)
            torch.cuda.synchronize()
        hidden = torch.relu(model.up(x)) ** 2
        expected = model(x)
    difference = (result - expected).double().norm() / (expected - x).double().norm()
    dropped = reference.dropped_energy(hidden.cpu(), "identity", "largest_abs")
    # Sites of other tests have decisions, and no calls.
    (site,) = (site for site in inductor_sparse.report().sites if site.calls)
    assert "down" in site.site
    assert site.calls == 5
    assert site.dropped_energy == pytest.approx(dropped, rel=0.01)
    assert difference < 2 * dropped**0.5
    assert sum("2:4 drops" in record.message for record in caplog.records) == 1


@hopper
def test_explain_names_the_kernel() -> None:
    torch._dynamo.reset()
    model = FFN().cuda().bfloat16().eval()
    x = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16)
    options = {"sparse.activation_format": "2:4"}
    explanation = inductor_sparse.explain(model, x, options=options)
    (site,) = explanation.applied
    packing, _, kernel = site.kernel.partition(", ")
    assert packing in ("sparsify24", "linear_sparsify24")
    assert kernel.startswith("sparse24_mm_bf16 1")
    assert site.tflops is not None
    assert site.of_sparse_peak is not None
    assert 0.1 < site.of_sparse_peak < 1
    assert site.dropped_energy is not None
    assert "% of the sparse peak" in " ".join(str(explanation).split())
