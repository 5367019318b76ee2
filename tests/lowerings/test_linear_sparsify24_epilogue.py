"""The epilogue of ``linear_sparsify24``'s kernel, run as it is written, by a processor.

Its text is cut out of the kernel, each instruction of PTX in it becomes a call of a
function of that name, and a thread for each of the 128 lanes runs it on sums that are
given.  What comes out has the bits of the reference.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from host_code import host_library
from torch import Tensor

from inductor_sparse import formats, reference
from inductor_sparse.lowerings import linear_sparsify24_kernel as hopper
from inductor_sparse.lowerings.linear_sparsify24_kernel import TileConfig
from inductor_sparse.reference import quantized
from inductor_sparse.reference.selection import select_groups

E4M3 = torch.float8_e4m3fn

PRELUDE = """
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>
using std::max; using std::min;
typedef unsigned int u32; typedef unsigned short u16; typedef unsigned char u8;
#define DEVICE static
static u8 memory[1 << 19];
static std::barrier<> all(128), warps[4] = {std::barrier<>(32), std::barrier<>(32),
                                            std::barrier<>(32), std::barrier<>(32)};
static thread_local u32 lane, warp;

template <class To, class From> To bits(From v) {
  To r; static_assert(sizeof r == sizeof v); memcpy(&r, &v, sizeof r); return r;
}
static void __syncwarp() { warps[warp].arrive_and_wait(); }
static void group_sync(u32) { all.arrive_and_wait(); }
static float __uint_as_float(u32 v) { return bits<float>(v); }
static u32 load_shared(u32 at) { u32 v; memcpy(&v, memory + at, 4); return v; }
static u32 __byte_perm(u32 x, u32 y, u32 s) {
  u32 r = 0;
  unsigned long long v = (unsigned long long)y << 32 | x;
  for (int i = 0; i < 4; i++) r |= (u32)(v >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
static void store_matrices(u32 address, const u32 (&pairs)[4]) {
  static u32 addresses[4][32];
  addresses[warp][lane] = address;
  __syncwarp();
  for (int j = 0; j < 4; j++)
    memcpy(memory + addresses[warp][j * 8 + lane / 4] + lane % 4 * 4, pairs + j, 4);
  __syncwarp();
}

// ---- PTX
static void st_shared_b32(u32 at, u32 v) { memcpy(memory + at, &v, 4); }
static void st_shared_f32(u32 at, float v) { memcpy(memory + at, &v, 4); }
static void ld_shared_v2_f32(float& a, float& b, u32 at) {
  a = __uint_as_float(load_shared(at)), b = __uint_as_float(load_shared(at + 4));
}
static void ld_shared_v4_b32(u32& a, u32& b, u32& c, u32& d, u32 at) {
  a = load_shared(at), b = load_shared(at + 4);
  c = load_shared(at + 8), d = load_shared(at + 12);
}
static void st_global_v4_b32(void* to, u32 a, u32 b, u32 c, u32 d) {
  const u32 v[4] = {a, b, c, d};
  memcpy(to, v, 16);
}
static void rcp_rn_f32(float& r, float v) { r = 1.f / v; }
static u32 bf16(float v) {
  const u32 u = bits<u32>(v);
  return std::isnan(v) ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}
static u32 f16(float v) { return std::isnan(v) ? 0x7FFF : bits<u16>((_Float16)v); }
static float wide(u32 v) { return bits<float>(v << 16); }
static float half(u32 v) { return (float)bits<_Float16>((u16)v); }
static float relu(float v) { return v < 0 ? 0.f : v; }
static void cvt_rn_relu_bf16x2_f32(u32& r, float high, float low) {
  r = bf16(relu(high)) << 16 | bf16(relu(low));
}
static void cvt_rn_relu_f16x2_f32(u32& r, float high, float low) {
  r = f16(relu(high)) << 16 | f16(relu(low));
}
static void mul_bf16x2(u32& r) {
  const float low = wide(r & 0xFFFF), high = wide(r >> 16);
  r = bf16(high * high) << 16 | bf16(low * low);
}
static void mul_rn_f16x2(u32& r) {
  const float low = half(r), high = half(r >> 16);
  r = f16(high * high) << 16 | f16(low * low);
}
static void cvt_f32_f16(float& r, u16 v) { r = half(v); }
static u32 e4m3(float v) {  // never negative here
  if (std::isnan(v)) return 0x7F;
  if (v == 0) return 0;
  v = min(v, 448.f);
  int exponent;
  frexp(v, &exponent);
  const int lowest = std::max(exponent - 4, -9);
  const int steps = (int)nearbyint(ldexp(v, -lowest));
  return steps + (lowest + 9 << 3);
}
static void cvt_rn_satfinite_e4m3x2_f32(u16& r, float high, float low) {
  r = (u16)(e4m3(high) << 8 | e4m3(low));
}
struct Ring { int stage, phase; };
template <int> void locate(int tile, int, int columns, u32, int& m_tile, int& k_tile) {
  m_tile = tile / columns, k_tile = tile % columns;
}
"""

KERNEL = """
static void one(u32 thread, const float* sums, const float* x_scale,
    const float* w_scale, const float* row_scale, const u16* bias, {value}* values,
    u32* metadata, int M, int K) {{
  const u32 group = 0, shared = 0, rank = 0;
  lane = thread % 32, warp = thread / 32;
  const u32 lane = ::lane, warp = ::warp;
  const int columns = (K + BLOCK_K - 1) / BLOCK_K, rows = (M + BLOCK_M - 1) / BLOCK_M;
  const int tiles = rows * columns, first_tile = 0, tile_stride = 1;
  typedef float Accumulator[BLOCK_K / 2];
  {begin}
      for (int i = 0; i < M64; i++)
        for (int at = 0; at < BLOCK_K / 2; at++) {{
          const int m = (m_tile * M64 + i) * 64 + warp * 16 + lane / 4 + at % 4 / 2 * 8;
          const int k = k_tile * BLOCK_K + at / 4 * 8 + lane % 4 * 2 + at % 2;
          // Nothing is known of sums past the end of the weight.
          acc[i][at] = k >= K ? NAN : m >= M ? 0.f : sums[(long long)m * K + k];
        }}
  {end}
    }}
}}
extern "C" void run(const float* sums, const float* x_scale, const float* w_scale,
    const float* row_scale, const u16* bias, {value}* values, u32* metadata, int M,
    int K) {{
  std::vector<std::thread> threads;
  for (u32 i = 0; i < 128; i++)
    threads.emplace_back(one, i, sums, x_scale, w_scale, row_scale, bias, values,
                         metadata, M, K);
  for (auto& thread : threads) thread.join();
}}
"""

_ASM = re.compile(r'asm(?: volatile)?\(\s*"([\w.]+) [^"]*"\s*(.*?)\);', re.S)


def _call(match: re.Match[str]) -> str:
    """An instruction as a call of the function that has its name."""
    operands, depth, found = match[2], 0, [""]
    for start in (m.end() for m in re.finditer(r'"[=+]?[a-z]"\(', operands)):
        end, depth = start, 1
        while depth:
            depth += {"(": 1, ")": -1}.get(operands[end], 0)
            end += 1
        found.append(operands[start : end - 1])
    return f"{match[1].replace('.', '_')}({', '.join(found[1:])});"


def _between(source: str, first: str, last: str) -> str:
    start = source.index(first)
    return source[start : source.index(last, start)]


def _on_a_cpu(source: str, dtype: torch.dtype, folder: Path) -> ctypes.CDLL:
    functions = _between(source, "// Two neurons, rounded", 'extern "C" __global__')
    kernel = KERNEL.format(
        value="u8" if dtype == E4M3 else "u16",
        begin=_between(source, "const u32 in_group", "int previous = -1;"),
        end=_between(source, "// ---- epilogue", "    }\n  }\n  end();"),
    )
    text = (
        PRELUDE + _between(source, "constexpr", "// The dynamic") + functions + kernel
    )
    return host_library(_ASM.sub(_call, text), folder, "-ffp-contract=off")


@pytest.mark.parametrize(
    ("dtype", "activation", "bias", "m64", "block_k"),
    [
        (E4M3, "relu2", False, 1, 256),
        (E4M3, "relu", True, 2, 192),
        (E4M3, "relu", True, 1, 128),
        (torch.bfloat16, "relu2", True, 1, 256),
        (torch.bfloat16, "relu", False, 2, 192),
        (torch.float16, "relu2", True, 2, 192),
        (torch.float16, "relu2", False, 1, 128),
    ],
)
def test_the_epilogue_has_the_bits_of_the_reference(
    dtype: torch.dtype,
    activation: str,
    bias: bool,
    m64: int,
    block_k: int,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    M, K = 164, 328
    tile = TileConfig(consumers=1, m64=m64, block_k=block_k, cluster=1)
    source = hopper.kernel_source(
        "k", dtype, tile, activation=activation, has_bias=bias
    )
    neuron = torch.bfloat16 if dtype == E4M3 else dtype
    sums = torch.randn(M, K) * 3
    sums[3, 7], sums[70, 200], sums[163, 327] = torch.nan, torch.inf, -torch.inf
    scales = torch.rand(M), torch.rand(K) + 0.5, torch.rand(M) ** 8
    scales[0][5:7] = scales[2][8:10] = torch.tensor([torch.nan, torch.inf])
    b = torch.randn(K).to(neuron)
    values = torch.empty(formats.values_shape(M, K), dtype=dtype)
    metadata = torch.empty(formats.metadata_shape(M, K), dtype=torch.int32)
    tensors = (sums, *scales, b, values, metadata)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    _on_a_cpu(source, dtype, tmp_path).run(*pointers, M, K)
    z = sums * scales[0][:, None] * scales[1] if dtype == E4M3 else sums
    z = (z + b.float() if bias else z).to(neuron)
    kept, index = select_groups(reference.ACTIVATIONS[activation](z), "largest")
    if dtype == E4M3:
        kept = quantized.quantize(kept, (1 / scales[2])[:, None], E4M3)
    assert _same(values, kept)
    assert torch.equal(metadata, formats.pack_index(index, dtype))


def _same(got: Tensor, expected: Tensor) -> bool:
    nan = got.float().isnan() & expected.float().isnan()
    as_bits = torch.uint8 if got.itemsize == 1 else torch.int16
    return bool((nan | (got.view(as_bits) == expected.view(as_bits))).all())
