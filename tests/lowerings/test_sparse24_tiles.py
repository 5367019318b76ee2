"""Every tile of the Hopper kernel, compiled by NVRTC for a GPU that is not here."""

from __future__ import annotations

import math
import re
from pathlib import Path

import fake_cuda
import pytest
import torch
from machine_code import main_loop, spills

from inductor_sparse.lowerings import hopper, sparse24_kernel
from inductor_sparse.lowerings.sparse24_kernel import TileConfig

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn

TILES = [
    pytest.param(dtype, order, tile, id=f"{dtype}-{order}-{tile}")
    for dtype, order, count in (
        (BF16, "k", 99),
        (BF16, "n", 3),
        (torch.float16, "k", 1),
        (E4M3, "k", 99),
        (torch.int8, "k", 3),
    )
    for tile in sparse24_kernel.configs(dtype, order)[:count]
]


def source(dtype: torch.dtype, order: str, tile: TileConfig) -> str:
    scaled = dtype.itemsize == 1
    return sparse24_kernel.kernel_source(
        "sparse24_mm",
        dtype,
        tile,
        sparse24_kernel.plain_epilogue(BF16, 4096),
        b_order=order,
        has_row_scale=scaled,
        has_col_scale=scaled,
    )


@pytest.mark.parametrize("dtype, order, tile", TILES)
def test_a_tile_compiles_and_nothing_waits_or_spills_in_its_main_loop(
    dtype: torch.dtype, order: str, tile: TileConfig, tmp_path: Path
) -> None:
    text = source(dtype, order, tile)
    # What it is launched with, and not what a block may have, must be enough.
    limit = f"<= {hopper.SHARED_BYTES}, "
    assert limit in text
    text = text.replace(limit, f"<= {tile.shared_bytes(dtype.itemsize)}, ")
    compiled = fake_cuda.compile_cuda(text, tmp_path)
    # C7510 and its kin: ptxas made wgmma wait for itself.
    assert "C75" not in compiled.log
    assert compiled.registers <= 168
    assert compiled.local <= 64
    # What is spilled is so outside of the main loop.
    for columns in (tile.block_n, tile.block_n // 2)[: 1 + tile.halves]:
        loop = main_loop(tmp_path, columns)
        assert sum("GMMA" in line for line in loop) >= 2
        assert spills(loop) == []


@pytest.mark.parametrize("dtype, order, tile", TILES)
def test_copies_fill_what_the_kernel_expects(
    dtype: torch.dtype, order: str, tile: TileConfig
) -> None:
    text, sizes = source(dtype, order, tile), {}
    for name, value in re.findall(r"^constexpr int (\w+) = ([^;]+);", text, re.M):
        sizes[name] = eval(value.replace("/", "//"), {}, sizes)
    epilogue = sparse24_kernel.plain_epilogue(BF16, 4096)
    boxes = sparse24_kernel.map_boxes(dtype, tile, epilogue, order)
    items = (dtype.itemsize, dtype.itemsize, 2, 4)
    copied = [
        math.prod(box["box"]) * item for box, item in zip(boxes, items, strict=True)
    ]
    parts = tile.cluster if order == "k" else tile.block_n // 64
    assert copied[0] == sizes["A_BYTES"]
    assert copied[1] * parts == sizes["B_BYTES"]
    assert copied[2:] == [sizes["STORE_BYTES"], sizes["E_ROW"]]
    assert tile.block_m // 64 * copied[3] == sizes["E_BYTES"]
    # A row of a box is as wide as the pattern that it is swizzled by.
    widths = [
        box["box"][0] * item for box, item in zip(boxes[:3], items[:3], strict=True)
    ]
    assert [box["swizzle"] for box in boxes] == [*widths, 0]
