"""How ``sparse24_mm``'s kernel stores its result, run as it is written, by a processor.

The text behind the main loop is cut out of the kernel and run by a thread for each
lane of a warpgroup, on accumulators that are given.  A copy by TMA writes what lies in
shared memory at the swizzled places to where its box is, clipped to the matrix.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import compile_cuda, cuda_sources, generate
from host_code import host_library
from torch import Tensor

from inductor_sparse import formats
from inductor_sparse.lowerings import sparse24_kernel as hopper
from inductor_sparse.lowerings import sparse24_mm
from inductor_sparse.lowerings.sparse24_kernel import Epilogue, TileConfig

PRELUDE = """
#include <barrier>
#include <cstring>
#include <thread>
#include <vector>
typedef unsigned int u32; typedef unsigned short u16; typedef unsigned char u8;
#define DEVICE static
alignas(1024) static u8 memory[1 << 19];
static std::barrier<> all(128);
static thread_local u32 lane, warp;

static void group_sync(u32) { all.arrive_and_wait(); }
static void matrices(u32 address, const u32 (&pairs)[4], bool other_way) {
  static u32 addresses[4][32];
  addresses[warp][lane] = address;
  all.arrive_and_wait();
  for (int j = 0; j < 4; j++)
    for (int e = 0; e < 2; e++) {
      const u16 value = (u16)(pairs[j] >> 16 * e);
      const u32 row = lane / 4, column = lane % 4 * 2 + e;
      const u32 line = other_way ? column : row, place = other_way ? row : column;
      memcpy(memory + addresses[warp][j * 8 + line] + place * 2, &value, 2);
    }
  all.arrive_and_wait();
}
static void store_matrices(u32 address, const u32 (&pairs)[4]) {
  matrices(address, pairs, false);
}
static void store_columns(u32 address, const u32 (&pairs)[4]) {
  matrices(address, pairs, true);
}
static u32 half(float v) { _Float16 h = v; u16 r; memcpy(&r, &h, 2); return r; }
static u32 pack16(float low, float high) { return half(high) << 16 | half(low); }

struct Map { u16* base; int inner, outer, box_inner, box_outer, swizzle; };
static void tma_store(const Map* map, u32 from, int inner, int outer) {
  const int line = map->box_inner * 2;  // bytes, as many as the swizzle spans
  for (int r = 0; r < map->box_outer; r++)
    for (int c = 0; c < map->box_inner; c++) {
      const u32 at = from + r * line + c * 2;
      const u32 mask = map->swizzle / 16 - 1;
      const u32 place = at ^ (at >> 7 & mask) << 4;
      if (inner + c < map->inner && outer + r < map->outer)
        memcpy(map->base + (long long)(outer + r) * map->inner + inner + c,
               memory + place, 2);
    }
}
"""

KERNEL = """
struct Part {{ int m_tile, first_n; bool half; }};
static void one(u32 thread, const float* sums, const Map& map_d, int M, int N,
                bool half) {{
  const u32 shared = 0, in_group = thread;
  lane = thread % 32, warp = thread / 32;
  const u32 lane = ::lane, warp = ::warp;
  const int columns = half ? BLOCK_N / 2 : BLOCK_N;
  for (int m_tile = 0; m_tile * BLOCK_M < M; m_tile++)
  for (int first_n = 0; first_n < N; first_n += columns)
  for (u32 group = 0; group < CONSUMERS; group++) {{
    const Part part = {{m_tile, first_n, half}};
    float acc[M64][BLOCK_N / 2];
    for (int i = 0; i < M64; i++)
      for (int at = 0; at < columns / 2; at++) {{
        const int m = m_tile * BLOCK_M + (group * M64 + i) * 64 + warp * 16 + lane / 4
                      + at % 4 / 2 * 8;
        const int n = first_n + at / 4 * 8 + lane % 4 * 2 + at % 2;
        acc[i][at] = m < M && n < N ? sums[(long long)m * N + n] : -1.f;
      }}
    {body}
  }}
}}
extern "C" void run(const float* sums, u16* out, int M, int N, int half, int transposed,
                    int box_inner, int box_outer, int swizzle) {{
  const Map map = {{out, transposed ? M : N, transposed ? N : M, box_inner, box_outer,
                   swizzle}};
  std::vector<std::thread> threads;
  for (u32 t = 0; t < 128; t++)
    threads.emplace_back([=, &map] {{ one(t, sums, map, M, N, half); }});
  for (auto& thread : threads) thread.join();
}}
"""


def stored(
    tile: TileConfig, epilogue: Epilogue, half: bool, sums_MN: Tensor, folder: Path
) -> Tensor:
    """What the kernel's text makes of the sums, ``[M, N]`` or ``[N, M]``."""
    transposed = epilogue.transposed
    source = hopper.kernel_source("k", torch.float16, tile, epilogue)
    constants = "\n".join(re.findall(r"^constexpr int .*", source, re.M))
    begin = source.index("      // ---- epilogue")
    end = source.index("cp.async.bulk.wait_group 0;")
    body = source[begin:end].rpartition("\n")[0]
    body = body[: body.rindex("}")]  # of the loop over tiles
    body = re.sub(r"asm volatile\([^;]*;[^;]*\);", ";", body)
    library = host_library(PRELUDE + constants + KERNEL.format(body=body), folder)
    M, N = sums_MN.shape
    out = torch.full((N, M) if transposed else (M, N), -2.0, dtype=torch.float16)
    box = hopper.map_boxes(torch.float16, tile, epilogue)[2]
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (sums_MN, out))
    sizes = (M, N, half, transposed, *box["box"], box["swizzle"])
    library.run(*pointers, *map(ctypes.c_int, sizes))
    assert box["transposed"] == transposed
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "tile, half",
    [
        (TileConfig(), False),
        (TileConfig(), True),
        (TileConfig(store_columns=32), False),
        (TileConfig(m64=2, block_n=128, stages=5), False),
        (TileConfig(m64=2, block_n=192, store_buffers=1, store_columns=32), True),
        (TileConfig(block_n=64, stages=10, cluster=1, store_buffers=1), False),
    ],
    ids=str,
)
def test_every_element_has_its_place(
    tile: TileConfig, half: bool, transposed: bool, tmp_path: Path
) -> None:
    M, N = tile.block_m + 72, tile.block_n + 40
    sums_MN = torch.arange(M * N).remainder(2039).float().view(M, N)
    epilogue = Epilogue(torch.float16, transposed=transposed)
    out = stored(tile, epilogue, half, sums_MN, tmp_path)
    assert torch.equal(out.float(), sums_MN.t() if transposed else sums_MN)


@pytest.mark.parametrize(
    "tile, half",
    [
        (TileConfig(), True),
        (TileConfig(m64=2, block_n=192, store_buffers=1, store_columns=32), False),
        (TileConfig(m64=2, block_n=192, store_buffers=1, store_columns=32), True),
    ],
    ids=str,
)
def test_an_epilogue_is_told_where_its_values_lie(
    tile: TileConfig, half: bool, tmp_path: Path
) -> None:
    body = """
    const float at0 = (m * 31 + n) % 2039, at1 = (m * 31 + n + 1) % 2039;
    const float value0 = ok0 ? acc0 - at0 : 9.f, value1 = ok1 ? acc1 - at1 : 9.f;
    """
    primary = {"primary0": "value0", "primary1": "value1"}
    epilogue = Epilogue(torch.float16, body=body, **primary)
    M, N = tile.block_m + 72, tile.block_n + 40
    places_MN = torch.arange(M)[:, None] * 31 + torch.arange(N)
    sums_MN = places_MN.remainder(2039).float() + 1
    out = stored(tile, epilogue, half, sums_MN, tmp_path)
    assert torch.equal(out, torch.ones(M, N, dtype=torch.float16))


M, N, K = 2048, 1024, 4096


def product(values: Tensor, metadata: Tensor, weight: Tensor) -> Tensor:
    op = torch.ops.inductor_sparse.sparse24_mm
    return op(values, metadata, weight.t()).relu().t().contiguous()


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def operands(
    rows: int = M, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    metadata = empty(*formats.metadata_shape(rows, K), dtype=torch.int32)
    values = empty(*formats.values_shape(rows, K), dtype=dtype)
    return values, metadata, empty(N, K, dtype=dtype)


@pytest.mark.parametrize("tile", [-1, 0], ids=["dense", "ours"])
def test_autotuning_may_store_transposed_as_well(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def select(name: str, choices: list[Any], *rest: Any, **how: Any) -> Any:
        return choices[tile].output_node()

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    monkeypatch.setattr(sparse24_mm, "autotune_select_algorithm", select)
    generated = generate(product, *operands(), inductor={"max_autotune_gemm": True})
    assert len(generated.kernels) == 1
    stored = "stmatrix.sync.aligned.m8n8.x4.trans" in generated.code
    assert stored is bool(generated.cuda_kernels) is (tile == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_copy_of_the_transpose_is_the_kernel_s_own_store(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    generated = generate(product, *operands(dtype=dtype))
    assert len(generated.kernels) == 1
    (source,) = cuda_sources(generated.code).values()
    assert "'box': (64, " in generated.code or "box=(64, " in generated.code
    compiled = compile_cuda(source, tmp_path)
    assert compiled.ptx.count("stmatrix.sync.aligned.m8n8.x4.trans") > 0
    assert "C75" not in compiled.log  # wgmma would be serialised


def test_else_a_kernel_after_it_copies() -> None:
    # Of this many rows a transposed result cannot be stored 16 bytes at a time.
    generated = generate(product, *operands(M + 1))
    assert len(generated.kernels) == 2
    (source,) = cuda_sources(generated.code).values()
    assert "trans.shared" not in source


def test_a_result_of_32_bits_is_copied() -> None:
    def wide(values: Tensor, metadata: Tensor, weight: Tensor) -> Tensor:
        op = torch.ops.inductor_sparse.sparse24_mm
        y = op(values, metadata, weight.t(), out_dtype=torch.float32)
        return y.t().contiguous()

    generated = generate(wide, *operands())
    assert len(generated.kernels) == 2
