"""``bench grid --edges``: FFNs of many tokens unlike those of the main grid.

That has three large sizes in bf16 and fp8.  These are the smallest sizes that are
rewritten, last rounds with few tiles, numbers of tokens that fill no tile, other dtypes
and activations, gates, and models in fp8.  None of them may lose.
"""

from __future__ import annotations

from collections.abc import Iterator

from inductor_sparse.bench.grid import ONE_DATA

Shape = tuple[int, int, int]
"""Tokens, features, hidden features."""

DOWN: dict[str, tuple[Shape, ...]] = {
    "bfloat16": (
        *((512, 4096, 8192), (768, 6144, 4096), (768, 2560, 28672)),
        *((1000, 4096, 1536), (1000, 3072, 2560), (1024, 5120, 16384)),
        *((1500, 2560, 2048), (1500, 3072, 5120), (2048, 1536, 2048)),
        *((2048, 1024, 5120), (3000, 2560, 1024), (3000, 1536, 4096)),
        *((4096, 1536, 1024), (4097, 3072, 2048), (6000, 1024, 1536)),
        (4097, 4104, 4104),
    ),
    "float16": ((1024, 3072, 5120), (4097, 3072, 2048)),
}
"""Second matmuls, of most of which the cost model expects the least that it takes."""

FFN: dict[str, tuple[Shape, ...]] = {
    "--no-gated --dtype bfloat16": (
        *((8192, 1024, 1024), (4096, 1024, 2048), (4096, 1024, 4096)),
        *((1024, 2048, 8192), (2048, 2560, 10240)),
    ),
    "--no-gated --dtype bfloat16 --activation relu": (
        *((2048, 2048, 8192), (512, 4096, 16384)),
    ),
    "--no-gated --dtype float16": ((1024, 2048, 8192), (4096, 4096, 16384)),
    "--no-gated --dtype bfloat16 --quantize fp8": (
        *((1024, 1024, 4096), (512, 2048, 8192)),
    ),
    "--no-gated --dtype bfloat16 --quantize int8": (
        *((1024, 1024, 4096), (512, 2048, 8192), (8192, 4096, 16384)),
    ),
    "--no-gated --dtype bfloat16 --quantize fp8 --quantized-model": (
        *((4096, 1024, 4096), (2048, 2048, 8192), (1024, 4096, 16384)),
    ),
    "--gated --dtype bfloat16": (
        *((8192, 2048, 5632), (1024, 4096, 11008), (4096, 4096, 11008)),
        *((2048, 5120, 13824), (2048, 3072, 8192), (8192, 4096, 14336)),
    ),
    "--gated --dtype bfloat16 --activation relu": ((4096, 4096, 14336),),
    "--gated --dtype float16": ((2048, 4096, 14336),),
    "--gated --dtype bfloat16 --quantize fp8": (
        *((1024, 2048, 5632), (4096, 4096, 11008)),
    ),
    "--gated --dtype bfloat16 --quantize int8": (
        *((1024, 2048, 5632), (4096, 4096, 11008)),
    ),
    "--gated --dtype bfloat16 --quantize fp8 --quantized-model": (
        *((4096, 2048, 5632), (2048, 4096, 11008)),
    ),
}
"""Whole FFNs by how they are run."""


def commands() -> Iterator[str]:
    """Every ``bench`` command, without device and file."""
    for dtype, shapes in DOWN.items():
        for shape in shapes:
            yield _line(f"--op down --no-gated --dtype {dtype}", shape)
    for how, shapes in FFN.items():
        for shape in shapes:
            yield _line(f"--op ffn {how}", shape)


def _line(how: str, shape: Shape) -> str:
    tokens, features, hidden = shape
    sizes = f"--size {features}x{hidden} --tokens {tokens}"
    return f"ffn {how} {sizes} --settings default {ONE_DATA}"
