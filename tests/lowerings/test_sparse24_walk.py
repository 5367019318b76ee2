"""Which CTA of the Hopper kernel takes which part of a product, run on a processor."""

from __future__ import annotations

import ctypes

import pytest
import torch
from host_code import host_library

from inductor_sparse import templates
from inductor_sparse.lowerings import sparse24_kernel, tile_model
from inductor_sparse.lowerings.sparse24_kernel import TileConfig

PRELUDE = """
#define DEVICE static
typedef unsigned int u32;
"""

WALK = """
// How often each half of each tile was taken, [rows * CLUSTER, columns, 2], and how
// many whole tiles and halves each cluster took, [clusters, 2].
extern "C" void walk(int rows, int columns, int clusters, int* taken, int* counts) {
  const int tiles = rows * columns, whole = whole_tiles(tiles, clusters);
  const int parts = whole + 2 * (tiles - whole);
  for (int cluster = 0; cluster < clusters; cluster++)
    for (u32 rank = 0; rank < CLUSTER; rank++)
      for (int at = cluster; at < parts; at += clusters) {
        const Part part = locate_part(at, whole, rows, columns, rank);
        const int half = part.first_n % BLOCK_N / (BLOCK_N / 2);
        int* tile = taken + (part.m_tile * columns + part.first_n / BLOCK_N) * 2;
        tile[half]++;
        if (!part.half) tile[1]++;
        if (rank == 0) counts[cluster * 2 + part.half]++;
      }
}
"""


@pytest.fixture(scope="module", params=[True, False], ids=["halves", "whole"])
def tile(request: pytest.FixtureRequest) -> TileConfig:
    """One whose last round may be of halves, and one that is always whole."""
    return TileConfig() if request.param else TileConfig(store_buffers=4)


@pytest.fixture(scope="module")
def walk(tile: TileConfig, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions that deal out the tiles, compiled for this machine."""
    epilogue = sparse24_kernel.plain_epilogue(torch.bfloat16, 4096)
    source = sparse24_kernel.kernel_source("k", torch.bfloat16, tile, epilogue)
    shared = templates.load("cuda/hopper.cuh")
    pieces = (
        PRELUDE,
        *(line for line in source.splitlines() if line.startswith("constexpr")),
        shared[shared.index("template <int GROUP>") :],
        source[source.index("struct Part {") : source.index("// A thread of a con")],
        WALK,
    )
    return host_library("\n".join(pieces), tmp_path_factory.mktemp("walk"))


@pytest.mark.parametrize(
    "rows, columns, clusters",
    [(8, 20, 66), (4, 20, 66), (1, 1, 66), (11, 6, 66), (8, 20, 1), (40, 13, 57)],
)
def test_every_part_is_taken_once(
    walk: ctypes.CDLL, tile: TileConfig, rows: int, columns: int, clusters: int
) -> None:
    taken = torch.zeros(rows * tile.cluster, columns, 2, dtype=torch.int32)
    counts = torch.zeros(clusters, 2, dtype=torch.int32)
    walk.walk(
        *(rows, columns, clusters),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (taken, counts)),
    )
    assert torch.equal(taken, torch.ones_like(taken))
    # A half saves time only where no cluster takes two of them.
    assert counts[:, 1].max() <= 1
    M, N = rows * tile.block_m * tile.cluster, columns * tile.block_n
    busiest = (counts[:, 0] + tile_model.rounds(tile, 1, 1, 132) * counts[:, 1]).max()
    expected = tile_model.rounds(tile, M, N, clusters * tile.cluster)
    assert busiest.item() == pytest.approx(expected)
