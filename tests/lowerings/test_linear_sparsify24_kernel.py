"""The Hopper kernel of ``linear_sparsify24`` without a GPU.

What it compiles to, what it takes, and what its selection selects.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fake_cuda import compile_cuda
from host_code import host_library
from machine_code import main_loop, spills
from torch import Tensor

from inductor_sparse import profitability, reference
from inductor_sparse.errors import SparseShapeError
from inductor_sparse.lowerings import linear_sparsify24_kernel as hopper
from inductor_sparse.lowerings.linear_sparsify24_kernel import TileConfig
from inductor_sparse.runtime import cuda_kernel

PLAIN = TileConfig()

# What the selection uses of CUDA, for a CPU.
PRELUDE = """
#include <algorithm>
using std::max; using std::min;
typedef unsigned int u32;
#define DEVICE static
u32 __byte_perm(u32 x, u32 y, u32 s) {
  u32 r = 0;
  unsigned long long v = ((unsigned long long)y << 32) | x;
  for (int i = 0; i < 4; i++)
    r |= (u32)((v >> (8 * (s >> (4 * i) & 7))) & 255) << (8 * i);
  return r;
}
"""
LOOP = """
extern "C" void run(const u32* groups, u32* kept, u32* nibbles, int count) {
  for (int i = 0; i < count; i++)
    kept[i] = select(groups[2 * i], groups[2 * i + 1], nibbles[i]);
}
"""


# Of both types of 16 bits, and with a bias, the two tiles with the most sums.
COMPILED = [
    *((tile, torch.bfloat16, False) for tile in hopper.TILES),
    *((tile, torch.float16, True) for tile in list(hopper.TILES)[:2]),
]


@pytest.mark.parametrize("tile, dtype, bias", COMPILED, ids=str)
def test_its_main_loop_spills_nothing_and_lanes_exchange_nothing(
    tile: TileConfig, dtype: torch.dtype, bias: bool, tmp_path: Path
) -> None:
    source = hopper.kernel_source("k", dtype, tile, has_bias=bias)
    made = compile_cuda(source, tmp_path)
    loop = main_loop(tmp_path, tile.block_k)
    assert sum("GMMA" in line for line in loop) >= 4 * tile.m64
    assert spills(loop) == []
    assert made.local <= (8 if tile.m64 > 1 else 0)
    assert "C7510" not in made.log and "serializ" not in made.log
    assert f"m64n{tile.block_k}k16" in made.ptx
    # One group of products stays in flight in the loop, unrolled or not; none after.
    *inside, behind = re.findall(r"wgmma.wait_group.sync.aligned (\d)", made.ptx)
    assert (set(inside), behind) == ({"1"}, "0")
    assert "shfl" not in made.ptx
    assert tile.shared_bytes <= hopper.SHARED_BYTES


def test_counting_energy_adds_one_sum_of_a_tile(tmp_path: Path) -> None:
    source = hopper.kernel_source("k", torch.bfloat16, PLAIN, has_energy=True)
    made = compile_cuda(source, tmp_path)
    assert made.local == 0
    assert len(re.findall("shfl.sync", made.ptx)) == 10
    assert "red.global.add.f64" in made.ptx or "atom.global.add.f64" in made.ptx


def _select_on_a_cpu(a_MK: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
    """The kernel's own selection, compiled for this processor."""
    source = hopper.kernel_source("k", a_MK.dtype, PLAIN)
    function = re.search(r"DEVICE u32 select\(.*?\n}\n", source, re.S)
    assert function is not None
    library = host_library(PRELUDE + function[0] + LOOP, folder)
    kept = torch.empty(a_MK.shape[0], a_MK.shape[1] // 2, dtype=a_MK.dtype)
    nibbles = torch.empty(a_MK.shape[0], a_MK.shape[1] // 4, dtype=torch.int32)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a_MK, kept, nibbles)]
    library.run(*pointers, nibbles.numel())
    return kept, nibbles ^ 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_selection_is_that_of_the_reference(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    few = torch.tensor([0.0, 1.0, 2.5, torch.inf, torch.nan, 6e-8])
    groups = torch.cartesian_prod(few, few, few, few).reshape(-1, 64).to(dtype)
    kept, nibbles = _select_on_a_cpu(groups.contiguous(), tmp_path)
    expected, index = reference.sparsify24(groups, "identity", "largest")
    assert torch.equal(kept.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(nibbles, index[:, 0::2].int() | index[:, 1::2].int() << 2)


def test_every_activation_it_takes_is_never_negative() -> None:
    z = torch.linspace(-3, 3, 64)
    for activation in hopper.ACTIVATIONS:
        assert (reference.ACTIVATIONS[activation](z) >= 0).all()


def _refusal(x: Tensor, w1: Tensor, activation: str = "relu2") -> str | None:
    with patch.object(profitability, "architecture", lambda device: "sm_90"):
        return hopper.refusal(x, w1, activation)


def test_what_it_takes_and_why_not() -> None:
    x, w1 = torch.zeros(70, 64).bfloat16(), torch.zeros(100, 64).bfloat16()
    assert _refusal(x, w1) is None
    assert _refusal(x[::2], w1) is None
    assert _refusal(x.float(), w1.float()) == "it has no code for torch.float32"
    assert _refusal(x, w1, "identity") == "values of 'identity' may be negative"
    rows = "rows with strides (64, 1) are not aligned to 16 B"
    assert _refusal(x[:, :60], w1[:, :60]) is None
    assert _refusal(x[:, :60].contiguous(), w1) == rows.replace("64", "60")
    assert (
        _refusal(x.t(), w1.t()) == "rows with strides (1, 64) are not aligned to 16 B"
    )
    empty = "a size of (0, 64) is 0 or over 1073741824"
    assert _refusal(x[:0], w1) == empty
    shifted = "an operand does not start at a multiple of 16 bytes"
    padded = torch.zeros(70, 72).bfloat16()[:, 1:65]
    assert _refusal(padded, w1) == _refusal(x, padded) == shifted


@pytest.mark.parametrize(
    ("size", "stride", "taken"),
    [
        ((2**30, 64), (64, 1), True),
        ((2**30 + 1, 64), (64, 1), False),
        ((70, 64), (0, 1), False),
        ((70, 64), (56, 1), False),
        ((70, 64), (128, 2), False),
        ((70, 0), (64, 1), False),
    ],
)
def test_layouts_that_bulk_copies_take(
    size: tuple[int, int], stride: tuple[int, int], taken: bool
) -> None:
    assert (hopper.layout_refusal(size, stride) is None) is taken


def test_another_gpu_is_refused() -> None:
    x = torch.zeros(64, 64).bfloat16()
    with patch.object(profitability, "architecture", lambda device: "sm_80"):
        assert hopper.refusal(x, x, "relu2") == "it is for sm_90, this is sm_80"


def test_offsets_beyond_31_bits_are_computed_in_64() -> None:
    source = hopper.kernel_source("k", torch.bfloat16, PLAIN)
    assert "const long long S = " in source
    assert "values + (long long)(row + half * 8) * S + " in source
    assert "metadata[((long long)m_block * k_blocks + k_block) * 128 + " in source


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernel, "unavailable_reason", lambda: "no NVRTC; install")
    x = torch.zeros(64, 64).bfloat16()
    assert _refusal(x, x) == "no NVRTC; install"


def test_sums_that_are_no_energies_are_refused() -> None:
    x = torch.zeros(64, 64).bfloat16()
    for energy in (torch.zeros(256, 2), torch.zeros(255, 2).double()):
        with pytest.raises(SparseShapeError, match="linear_sparsify24: energy "):
            hopper.linear_sparsify24(x, x, None, "relu2", "largest", energy)


def test_the_shared_memory_it_asks_for_is_what_the_text_uses(tmp_path: Path) -> None:
    tile = PLAIN
    limit = f"<= {hopper.SHARED_BYTES}, "
    source = hopper.kernel_source("k", torch.bfloat16, tile, has_bias=True)
    assert source.count(limit) == 1
    compile_cuda(source.replace(limit, f"<= {tile.shared_bytes}, "), tmp_path)
    with pytest.raises(AssertionError, match="shared memory"):
        compile_cuda(source.replace(limit, f"<= {tile.shared_bytes - 1}, "), tmp_path)
