"""``linear_sparsify24_quantized`` without a GPU: generated code and machine code.

Shape legend: ``M`` tokens, ``D`` features of the model, ``K`` neurons.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import compile_cuda, cuda_sources, generate
from machine_code import main_loop, spills
from torch import Tensor

from inductor_sparse import lowerings
from inductor_sparse.lowerings import linear_sparsify24_kernel as hopper
from inductor_sparse.lowerings.linear_sparsify24_kernel import TileConfig

E4M3 = torch.float8_e4m3fn
KERNEL = "linear_sparsify24_e4m3"
PLAIN = TileConfig()


def _source(tile: TileConfig = PLAIN, **kwargs: Any) -> str:
    return hopper.kernel_source("k", E4M3, tile, **kwargs)


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _inputs(M: int, D: int, K: int, bias: bool = False) -> tuple[Tensor, ...]:
    x, w1 = _meta(M, D, dtype=E4M3), _meta(K, D, dtype=E4M3)
    more = (_meta(K, dtype=torch.bfloat16),) if bias else ()
    return (x, _meta(M), w1, _meta(K), _meta(M), *more)


def _op(activation: str = "relu2") -> Callable[..., Any]:
    def call(
        x: Tensor, sx: Tensor, w: Tensor, sw: Tensor, s: Tensor, *bias: Tensor
    ) -> Any:
        op = torch.ops.inductor_sparse.linear_sparsify24_quantized
        return op(x, sx, w, sw, *(bias or (None,)), s, activation, "largest")

    return call


@pytest.mark.parametrize(
    "tile, bias", [(PLAIN, False), *((tile, True) for tile in hopper.TILES)], ids=str
)
def test_its_main_loop_spills_nothing_and_it_stores_whole_vectors(
    tile: TileConfig, bias: bool, tmp_path: Path
) -> None:
    made = compile_cuda(_source(tile, has_bias=bias), tmp_path)
    assert spills(main_loop(tmp_path, tile.block_k)) == []
    assert made.local <= (40 if tile.m64 > 1 else 0)
    assert "C7510" not in made.log and "serializ" not in made.log
    assert f"m64n{tile.block_k}k32.f32.e4m3.e4m3" in made.ptx
    chunks = tile.m64 * tile.block_k // 64
    assert made.ptx.count("cvt.rn.satfinite.e4m3x2.f32") == chunks * 8
    assert made.ptx.count("st.global.v4.b32") == chunks
    assert "shfl" not in made.ptx
    # Scales of rows are asked for before the multiplications, and waited for after.
    loads = [m.start() for m in re.finditer(r"ld\.global\.nc\.(f32|b32)", made.ptx)]
    products = made.ptx.index("wgmma.mma_async")
    columns = math.ceil(tile.block_k / 128)
    assert len(loads) == 3 * tile.m64 + columns and max(loads) < products
    assert made.ptx.index("rcp.rn.f32") > products


def test_it_fits_where_16_bits_fit(tmp_path: Path) -> None:
    tile = TileConfig()
    limit = f"<= {hopper.SHARED_BYTES}, "
    source = _source(tile, has_bias=True).replace(limit, f"<= {tile.shared_bytes}, ")
    compile_cuda(source, tmp_path)


def _lanes(source: str) -> list[list[tuple[int, int, int]]]:
    """For each lane, what it reads in order: row, 16 bytes of it, and from where."""
    found = re.search(r"const u32 r = (.+), column = (.+ half \* 2.+);", source)
    swizzle = re.search(r"u32 swizzle\(u32 r\) { return (.+); }", source)
    assert found is not None and swizzle is not None
    row, column, where = (t.replace("/", "//") for t in (*found.groups(), swizzle[1]))
    lanes = []
    for lane in range(32):
        reads = []
        for half in range(2):
            for part in range(2):
                names = {"lane": lane, "half": half, "part": part}
                r, c = eval(row, names), eval(column, names)
                reads.append((r, c, c ^ eval(where, {"r": r})))
        lanes.append(reads)
    return lanes


def test_a_lane_packs_what_its_metadata_word_describes() -> None:
    """As :mod:`inductor_sparse.formats` has it, for the 16 rows of a warp."""
    for lane, reads in enumerate(_lanes(_source())):
        r, q = lane // 4, lane % 4
        assert [row for row, _, _ in reads] == [r + 8 * (q % 2)] * 4
        assert [column * 8 for _, column, _ in reads] == [
            q // 2 * 32 + 8 * i for i in range(4)
        ]


def test_no_two_lanes_meet_in_a_bank() -> None:
    """Eight lanes read 16 bytes at a time, and a matrix has eight rows of 16 bytes."""
    source = _source()
    lanes = _lanes(source)
    for first in range(0, 32, 8):
        for read in range(4):
            assert len({lanes[first + i][read][2] for i in range(8)}) == 8
    assert "((column ^ swizzle(r)) << 4), packed);" in source
    assert "r * 128 + ((column ^ swizzle(r)) << 4))" in source


@pytest.mark.parametrize("tokens", [(), (2048,)])
@pytest.mark.parametrize("bias", [False, True])
def test_one_kernel_and_its_launch(
    tokens: tuple[int, ...], bias: bool, tmp_path: Path
) -> None:
    made = generate(_op(), *_inputs(2048, 512, 4112, bias), dynamic=tokens)
    assert not made.triton_kernels
    (name,) = made.cuda_kernels
    assert name.startswith(KERNEL)
    given = "arg0_1, arg2_1, arg1_1, arg3_1, arg4_1, " + ("arg5_1, " if bias else "")
    assert f"{name}.run({given}buf" in made.code
    assert "extern_kernels." not in made.code
    assert made.code.count("TensorMap(box=(128, ") == 2
    assert compile_cuda(cuda_sources(made.code)[name], tmp_path).local == 0


def test_few_tokens_are_packed_as_well() -> None:
    made = generate(_op("relu"), *_inputs(64, 512, 4096))
    assert len(made.cuda_kernels) == 1


@pytest.mark.parametrize(
    ("activation", "D", "options", "reason"),
    [
        ("identity", 512, {}, "values of 'identity' may be negative"),
        ("relu", 520, {}, "rows with strides (520, 1) are not aligned to 16 B"),
        ("relu", 512, {"capability": (8, 9)}, "it is for sm_90, this is sm_89"),
        ("relu", 512, {"inductor": {"cpp_wrapper": True}}, "launched from Python"),
    ],
)
def test_elsewhere_it_is_the_op_as_it_is_defined(
    activation: str,
    D: int,
    options: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = "inductor_sparse.lowerings.linear_sparsify24"
    with caplog.at_level(logging.WARNING, module):
        made = generate(_op(activation), *_inputs(2048, D, 4096), **options)
    assert "falls back to its slow eager op" in caplog.text
    assert reason in caplog.text
    assert not made.cuda_kernels
    assert "linear_sparsify24_quantized" in made.code


def test_a_cpu_computes_the_definition() -> None:
    lowerings.register_all()
    torch.manual_seed(0)
    x, w1 = (torch.randn(size).to(E4M3) for size in ((70, 48), (100, 48)))
    inputs = x, torch.rand(70), w1, torch.rand(100), torch.rand(70)
    expected = _op()(*inputs)
    compiled = torch.compile(_op())(*inputs)
    assert torch.equal(compiled[0].float(), expected[0].float())
    assert torch.equal(compiled[1], expected[1])
