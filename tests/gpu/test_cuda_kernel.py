"""Kernels on a GPU: arguments, maps, streams, threads, CUDA graphs, refusals."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inductor_sparse.errors import SparseKernelError
from inductor_sparse.runtime.cuda_kernel import CudaKernel, TensorMap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU: the kernels are compiled for it",
    ),
]

AFFINE = """
extern "C" __global__ void affine(
    const float* x, float* out, int n, long long shift, float scale) {
  const int step = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
    out[i] = (x ? x[i] : 1.0f) * scale + (float)(shift - 5000000000ll);
}
"""

# One box of 16x32 floats, fetched by the tensor memory accelerator.
BOX = """
struct __align__(64) Map { unsigned long long words[16]; };
extern "C" __global__ void box(
    const __grid_constant__ Map map, float* out, int column, int row) {
  __shared__ __align__(128) float tile[16 * 32];
  __shared__ unsigned long long barrier;
  unsigned to, bar;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }"
      : "=r"(to) : "l"(tile));
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }"
      : "=r"(bar) : "l"(&barrier));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(bar) : "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 2048;"
        :: "r"(bar) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global"
        ".mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(to), "l"(&map), "r"(column), "r"(row), "r"(bar) : "memory");
  }
  __syncthreads();
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], 0;"
      " @!p bra again; }" :: "r"(bar) : "memory");
  for (int i = threadIdx.x; i < 16 * 32; i += blockDim.x) out[i] = tile[i];
}
"""


def affine() -> CudaKernel:
    signature = ("pointer", "pointer", "int32", "int64", "float32")
    return CudaKernel("affine", AFFINE, signature=signature, threads=128)


def box(transposed: bool = False) -> CudaKernel:
    return CudaKernel(
        "box",
        BOX,
        signature=("map", "pointer", "int32", "int32"),
        maps=(TensorMap((32, 16), transposed=transposed),),
        threads=64,
        grid=1,
    )


def current() -> int:
    return torch.cuda.current_stream().cuda_stream


def shift(value: int) -> int:
    return 5_000_000_000 + value  # more than 32 bits


def test_every_kind_of_number_arrives() -> None:
    x = torch.randn(1000, device="cuda")
    out = torch.empty_like(x)
    kernel = affine()
    kernel.run(x, out, 1000, shift(3), 0.5, stream=current())
    torch.testing.assert_close(out, x * 0.5 + 3)
    kernel.run(None, out, 999, shift(-1), 2.0, stream=current())
    assert out[:999].eq(1).all()
    assert out[999] == x[999] * 0.5 + 3


def test_a_copy_of_a_kernel_works() -> None:
    kernel = pickle.loads(pickle.dumps(affine()))
    out = torch.zeros(10, device="cuda")
    kernel.run(None, out, 10, shift(0), 1.0, stream=current())
    assert out.eq(1).all()


def padded(matrix: Tensor, column: int, row: int) -> Tensor:
    """The box of 16 rows and 32 columns at a place, zeros outside of the matrix."""
    wide = torch.zeros(256, 256, device="cuda")
    wide[: matrix.shape[0], : matrix.shape[1]] = matrix
    return wide[row : row + 16, column : column + 32]


@pytest.mark.parametrize(("column", "row"), [(0, 0), (32, 16), (64, 48), (96, 64)])
@pytest.mark.parametrize("transposed", [False, True])
def test_maps(column: int, row: int, transposed: bool) -> None:
    matrix = torch.randn(50, 72, device="cuda")
    given = matrix.t() if transposed else matrix
    out = torch.empty(16, 32, device="cuda")
    box(transposed).run(given, out, column, row, stream=current())
    assert torch.equal(out, padded(matrix, column, row))


def test_maps_of_windows_and_single_rows() -> None:
    kernel = box()
    matrix = torch.randn(64, 128, device="cuda")
    row = torch.randn(1, 77, device="cuda")
    for given in (matrix[3:40, 4:100], row, row[:, 4:]):
        out = torch.empty(16, 32, device="cuda")
        kernel.run(given, out, 0, 0, stream=current())
        assert torch.equal(out, padded(given, 0, 0))


def test_an_empty_map_launches_nothing() -> None:
    out = torch.full((16, 32), 7.0, device="cuda")
    box().run(torch.empty(0, 64, device="cuda"), out, 0, 0, stream=current())
    assert out.eq(7).all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.zeros(8, 33, device="cuda"), "rows 132 bytes apart"),
        (
            lambda: torch.zeros(8, 64, device="cuda")[:, 1:],
            "starts 4 bytes past a 16-byte boundary",
        ),
        (lambda: torch.zeros(64, 8, device="cuda").t(), "axis 1 must be contiguous"),
        (lambda: torch.zeros(8, 32), "argument 0 is on cpu"),
    ],
)
def test_tensors_without_a_map(make: Callable[[], Tensor], text: str) -> None:
    out = torch.empty(16, 32, device="cuda")
    with pytest.raises(SparseKernelError, match=text):
        box().run(make(), out, 0, 0, stream=current())


def test_another_stream_is_used() -> None:
    kernel = affine()
    out = torch.zeros(4, device="cuda")
    kernel.run(None, out, 4, shift(0), 1.0, stream=current())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        kernel.run(None, out, 4, shift(1), 1.0, stream=side.cuda_stream)
        assert not side.query()
    side.synchronize()
    assert out.eq(2).all()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_graph_captures_it(loaded: bool) -> None:
    kernel, fetch = affine(), box()
    x = torch.randn(32, 64, device="cuda")
    out, tile = torch.empty_like(x), torch.empty(16, 32, device="cuda")
    if loaded:
        kernel.run(x, out, x.numel(), shift(0), 1.0, stream=current())
        fetch.run(out, tile, 0, 0, stream=current())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.run(x, out, x.numel(), shift(0), 3.0, stream=current())
        fetch.run(out, tile, 32, 8, stream=current())
    for _ in range(3):
        x.normal_()
        graph.replay()
        torch.testing.assert_close(tile, 3 * x[8:24, 32:64])


def test_threads_share_a_kernel() -> None:
    kernel = affine()
    wrong: list[object] = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            out = torch.zeros(4096, device="cuda")
            for step in range(200):
                kernel.run(
                    None, out, 4096, shift(step), float(number), stream=current()
                )
                if step % 50 == 0 and not out.eq(number + step).all():
                    wrong.append((number, step))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_thread_that_never_used_cuda() -> None:
    kernel, out = affine(), torch.zeros(4, device="cuda")
    stream, errors = current(), []

    def work() -> None:
        try:
            kernel.run(None, out, 4, shift(0), 2.0, stream=stream)
        except SparseKernelError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert out.eq(2).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_device_has_its_own() -> None:
    kernel = affine()
    for device in (1, 0, 1):
        out = torch.zeros(8, device=f"cuda:{device}")
        stream = torch.cuda.current_stream(device).cuda_stream
        kernel.run(None, out, 8, shift(device), 1.0, stream=stream)
        assert out.eq(1 + device).all()
        assert torch.cuda.current_device() == 0


def test_too_much_shared_memory_is_refused() -> None:
    kernel = CudaKernel(
        "affine",
        AFFINE,
        signature=("pointer", "pointer", "int32", "int64", "float32"),
        threads=128,
        shared_bytes=300_000,
    )
    out = torch.zeros(4, device="cuda")
    with pytest.raises(SparseKernelError, match="300000 bytes of shared memory"):
        kernel.run(None, out, 4, shift(0), 2.0, stream=current())


def test_too_many_threads_are_refused_with_the_shapes() -> None:
    kernel = CudaKernel(
        "affine",
        AFFINE,
        signature=("pointer", "pointer", "int32", "int64", "float32"),
        threads=4096,
    )
    out = torch.zeros(4, 2, device="cuda")
    with pytest.raises(SparseKernelError, match=r"(?s)launch failed.*1: float32\[4, 2"):
        kernel.run(None, out, 8, shift(0), 2.0, stream=current())
