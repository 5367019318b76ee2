"""Copies of weights on a GPU: kept, followed, and right under CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from inductor_sparse.runtime import prepared_weights, watched_weights
from inductor_sparse.runtime.graph_pools import outside_graph_pools

pytestmark = [
    # Torch's own: its graph trees begin with one, and it advises against full float32.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROW_MAJOR = torch.ops.inductor_sparse.row_major_weight
QUANTIZED = torch.ops.inductor_sparse.quantized_weight


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    torch._dynamo.reset()
    prepared_weights.forget(graphs_are_gone=True)
    yield
    torch._dynamo.reset()
    prepared_weights.forget(graphs_are_gone=True)


def parameter(dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    weight = torch.randn(256, 512, device="cuda", dtype=dtype)
    return nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_copy_is_kept_and_follows_the_weight(dtype: torch.dtype) -> None:
    weight = parameter(dtype)

    def copy() -> Tensor:
        return ROW_MAJOR(weight, [512, 256], [1, 512], 0, torch.bfloat16)

    first = copy()
    assert copy().data_ptr() == first.data_ptr()
    weight.add_(1)
    assert copy().data_ptr() == first.data_ptr()
    assert torch.equal(first, weight.t().bfloat16())
    weight.data = torch.randn_like(weight)
    assert torch.equal(copy(), weight.t().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantized_copies(dtype: torch.dtype) -> None:
    weight = parameter()
    values, scale, norm = QUANTIZED(weight, [256, 512], [512, 1], 0, dtype)
    meant = values.float() * scale[:, None]
    torch.testing.assert_close(norm, meant.norm(dim=1).amax())
    error = meant - weight.float()
    assert error.abs().max() < weight.abs().max() / 15
    assert QUANTIZED(weight, [256, 512], [512, 1], 0, dtype)[0].data_ptr() == (
        values.data_ptr()
    )


def test_replayed_graphs_see_a_changed_weight() -> None:
    weight = parameter()
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(4, 256, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        out.copy_(x @ ROW_MAJOR(weight, [512, 256], [1, 512], 0, torch.bfloat16))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    call = watched_weights.watched(lambda *_: graph.replay(), [x, weight])
    for _ in range(3):
        call(x, weight)
        torch.testing.assert_close(out, x @ weight.t(), rtol=2e-2, atol=2e-1)
        weight.mul_(-1.5)


def test_a_reset_leaves_a_captured_graph_its_copy() -> None:
    weight = parameter()
    window = ([512, 256], [1, 512], 0, torch.bfloat16)
    address = ROW_MAJOR(weight, *window).data_ptr()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ROW_MAJOR(weight, *window) * 1
    torch._dynamo.reset()
    prepared_weights.forget()
    others = [torch.zeros(512, 256, device="cuda").bfloat16() for _ in range(8)]
    graph.replay()
    assert torch.equal(out, weight.t())
    assert ROW_MAJOR(weight, *window).data_ptr() == address
    assert all(other.data_ptr() != address for other in others)


def test_memory_is_in_no_pool_of_a_graph() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside = torch.full((1 << 20,), 3.0, device=device)
        kept = outside_graph_pools(device, lambda: inside * 2)
    assert float(kept.sum()) == 6 * (1 << 20)

    def pool_of(tensor: Tensor) -> set[tuple[int, int]]:
        return {
            segment["segment_pool_id"]
            for segment in torch.cuda.memory_snapshot()
            if 0 <= tensor.data_ptr() - segment["address"] < segment["total_size"]
        }

    assert pool_of(inside) == {pool.id}
    assert pool_of(kept) == {(0, 0)}


def test_a_graph_that_nobody_warmed_up_copies_by_itself() -> None:
    weight, before = parameter(), prepared_weights.nbytes()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy = ROW_MAJOR(weight, [512, 256], [1, 512], 0, torch.bfloat16)
    for _ in range(2):
        graph.replay()
        assert torch.equal(copy, weight.t())
        weight.add_(1)
    assert prepared_weights.nbytes() == before


def relu_ffn() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(1024, 8192, bias=False), nn.ReLU())
    model.append(nn.Linear(8192, 4096, bias=False))
    return model.cuda().bfloat16().eval()


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_reduce_overhead_with_a_changed_weight(change: str) -> None:
    model = relu_ffn()
    run = torch.compile(model, backend="sparse", mode="reduce-overhead")
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            got = run(x).clone()
            torch.testing.assert_close(got, model(x), rtol=3e-2, atol=3e-2)
        if change == "in place":
            model[2].weight.mul_(-1.5)
        else:
            model[2].weight.data = torch.randn_like(model[2].weight) / 90


@torch.no_grad()
@pytest.mark.parametrize("forgotten", [False, True])
def test_reduce_overhead_with_a_weight_in_the_place_of_a_dead_one(
    forgotten: bool,
) -> None:
    """Inductor replays the graph that it captured for the dead one."""
    model, x = relu_ffn(), torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    run = torch.compile(model, backend="sparse", mode="reduce-overhead")

    def check() -> None:
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            got = run(x).clone()
            torch.testing.assert_close(got, model(x), rtol=3e-2, atol=3e-2)

    check()
    other, down = torch.randn_like(model[2].weight) / 90, model[2].weight
    address = down.data_ptr()
    down.data = other
    if forgotten:
        prepared_weights.forget()
    kept = [torch.full_like(other, torch.nan)]
    while kept[-1].data_ptr() != address:
        assert len(kept) < 64, "the memory of the weight is not handed out again"
        kept.append(torch.full_like(other, torch.nan))
    down.data = kept.pop()
    down.copy_(other * -2)
    check()
