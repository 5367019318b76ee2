"""Tensors of more than 2**31 elements: the last programs of the grid, interpreted.

The kernels are those that Inductor generates.  Operands are sparse files: what is not
written takes no memory.

Shape legend: ``M`` rows, ``K`` reduction, ``N`` columns, ``F`` neurons, ``D`` features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import generate
from machine_code import triton_sources
from torch import Tensor
from triton_interpreter import Interpreter, SparseFile

from inductor_sparse import formats, ops, reference
from inductor_sparse.runtime import sparsify24_cuda

pytest.importorskip("triton")

FP16, INT8, E4M3 = torch.float16, torch.int8, torch.float8_e4m3fn
Make = Callable[..., SparseFile]
sparse = torch.ops.inductor_sparse


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Make]:
    made: list[Path] = []

    def make(*shape: int, dtype: torch.dtype = FP16) -> SparseFile:
        made.append(tmp_path / str(len(made)))
        made[-1].touch()
        return SparseFile(str(made[-1]), torch.Size(shape).numel(), dtype)

    yield make
    for path in made:
        path.unlink()


def meta(*shape: int, dtype: torch.dtype = FP16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Kernel:
    """The kernel that is generated for a call as the one of number ``at``."""

    def __init__(self, fn: Callable[..., Any], *inputs: Tensor, at: int = 0) -> None:
        code = generate(fn, *inputs).code
        self.name, self.text = list(triton_sources(code).items())[at]
        found = re.findall(r"^ +(\w+) : tl.constexpr = (\d+)$", self.text, re.M)
        self.constants = {name: int(value) for name, value in found}


@pytest.mark.parametrize(("M", "dtype"), [(1, FP16), (4, FP16), (1, INT8)])
def test_rows_of_a_weight_are_read(
    M: int, dtype: torch.dtype, memory: Make, interpreter: Interpreter
) -> None:
    K, N = 1024, 2**22
    scale = torch.rand(K) if dtype == INT8 else None
    inputs = [meta(M, K), meta(K, N, dtype=dtype)]
    inputs += [] if scale is None else [meta(K, dtype=torch.float32)]
    kernel = Kernel(
        lambda z, w, *s: sparse.activation_spmm(z, w, "relu", None, *s), *inputs
    )
    splits, columns = kernel.constants["SPLITS"], kernel.constants["BN"]
    active = torch.tensor([3, 600, K - 1])
    z = torch.full((M, K), -1.0, dtype=FP16)
    z[:, active] = torch.rand(M, 3).to(FP16)
    w, sums = memory(K, N, dtype=dtype), memory(splits, M, N, dtype=torch.float32)
    rows = torch.randint(-9, 9, (3, columns)).to(dtype)
    w.tensor().view(K, N)[active, -columns:] = rows
    scratch = torch.zeros(2**20, dtype=torch.int32)
    given = [z, w, scratch, *([] if scale is None else [scale]), sums]
    last = (N // columns - 1, 0, 0)
    interpreter.run(kernel.text, kernel.name, (1, splits, 1), *given, first=last)
    wide = rows.float() if scale is None else rows * scale[active, None]
    result = sums.tensor().view(splits, M, N)[..., -columns:].sum(0)
    torch.testing.assert_close(result, z[:, active].float() @ wide)


@pytest.mark.parametrize("batches", [(), (3,)], ids=["matrix", "batch"])
def test_results_of_many_tokens(
    batches: tuple[int, ...], memory: Make, interpreter: Interpreter
) -> None:
    # No more rows than a grid may have.
    M, K, N = (2**14 if batches else 2**15), 16, 2**17
    inputs = meta(*batches, M, K), meta(*batches, K, N)
    call = lambda z, w: sparse.activation_spmm(z, w, "relu")  # noqa: E731
    kernel, total = (Kernel(call, *inputs, at=at) for at in (0, 1))
    splits, columns = kernel.constants["SPLITS"], kernel.constants["BN"]
    tokens = kernel.constants["TOKENS"]
    z, w = memory(*batches, M, K), memory(*batches, K, N)
    last_z = torch.randint(-3, 4, (tokens, K)).to(FP16)
    last_w = torch.randint(-3, 4, (K, columns)).to(FP16)
    z.tensor().view(-1, K)[-tokens:] = last_z
    w.tensor().view(-1, N)[-K:, -columns:] = last_w
    blocks = z.size // K // tokens
    scratch = memory(blocks * splits * (tokens + 1) * 1024, dtype=torch.int32)
    sums = memory(splits, *batches, M, N, dtype=torch.float32)
    last = (N // columns - 1, splits - 1, blocks - 1)
    args = (z, w, scratch, sums)
    interpreter.run(kernel.text, kernel.name, (1, 1, 1), *args, first=last)
    expected = last_z.relu() @ last_w
    found = sums.tensor().view(splits, -1, N)[-1, -tokens:, -columns:]
    assert torch.equal(found, expected.float())
    result, width = memory(*batches, M, N), total.constants["BN"]
    last = (N // width - 1, z.size // K - 1, 0)
    interpreter.run(total.text, total.name, (1, 1, 1), sums, result, first=last)
    assert torch.equal(result.tensor()[-width:], expected[-1, -width:])


@pytest.mark.parametrize(("M", "F"), [(1, 2**26), (4, 2**30)])
def test_rows_of_open_gates_are_read(
    M: int, F: int, memory: Make, interpreter: Interpreter
) -> None:
    D, N = 64, 8
    kernel = Kernel(
        lambda *args: sparse.glu_spmm(*args, "relu"),
        *(meta(M, F), meta(M, D), meta(F, D), meta(F, N)),
    )
    block = kernel.constants["LOCAL"]
    gate, w, hidden = memory(M, F), memory(F, D), memory(M, F)
    x = torch.randint(-3, 4, (M, D)).to(FP16)
    gates = torch.randint(-2, 3, (M, block)).to(FP16)
    rows = torch.randint(-3, 4, (block, D)).to(FP16)
    gate.tensor().view(M, F)[:, -block:] = gates
    w.tensor().view(F, D)[-block:] = rows
    last = (F // block - 1, 0, 0)
    args = (gate, x, w, hidden)
    interpreter.run(kernel.text, kernel.name, (1, 1, 1), *args, first=last)
    expected = gates.float().relu() * (x.float() @ rows.float().t())
    assert torch.equal(hidden.tensor().view(M, F)[:, -block:].float(), expected)


def test_packing(memory: Make, interpreter: Interpreter) -> None:
    M, K = 2**25, 4096  # so that there are more than 2**31 words of metadata
    kernel = Kernel(lambda x: sparse.sparsify24(x, "relu", "largest"), meta(M, K))
    x, values = memory(M, K), memory(M, K // 2)
    words = memory(*formats.metadata_shape(M, K), dtype=torch.int32)
    tile = torch.randn(64, 64).to(FP16)
    x.tensor().view(M, K)[-64:, -64:] = tile
    last = (M // 64 * (K // 64) - 1, 0, 0)
    args = (x, values, words)
    interpreter.run(kernel.text, kernel.name, (1, 1, 1), *args, first=last)
    expected, expected_words = ops.sparsify24(tile, "relu", "largest")
    assert torch.equal(values.tensor().view(M, -1)[-64:, -32:], expected)
    assert torch.equal(words.tensor()[-128:], expected_words.flatten())


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_packing_in_8_bits(
    whole: bool, eager: bool, memory: Make, interpreter: Interpreter
) -> None:
    M, K = (2**24, 4096) if whole else (2**20, 40960)
    way = ("relu", "largest")
    x, values = memory(M, K), memory(M, K // 2, dtype=INT8)
    words = memory(*formats.metadata_shape(M, K), dtype=torch.int32)
    rows = torch.zeros(64, K, dtype=FP16)
    rows[-16:] = torch.randn(16, K)
    x.tensor().view(M, K)[-16:] = rows[-16:]
    scales = memory(M, dtype=torch.float32)
    how: dict[str, Any] = {"first": (M - 16, 0, 0)}
    if eager:
        text: Any = (*sparsify24_cuda.QUANTIZED_TEXT, "sparsify24_quantized_eager")
        plan = sparsify24_cuda.row_plan(K)
        how |= sparsify24_cuda.Selection(*way).constants()
        how |= {"FLOAT8": False, "PAIRED": True, "EVEN_K": True, "HAS_ENERGY": False}
        how |= {"BLOCK_K": plan.block_k, "WHOLE": plan.whole}
        args = (x, x, values, words, scales, scales, M, K, K, 1, K, 1)
        interpreter.run(text, "sparsify24_quantized_kernel", (16, 1, 1), *args, **how)
    else:
        pack = sparse.sparsify24_quantized
        kernel = Kernel(lambda x: pack(x, *way, INT8), meta(M, K))
        args = (x, values, words, scales)
        interpreter.run(kernel.text, kernel.name, (16, 1, 1), *args, **how)
    expected = ops.sparsify24_quantized(rows, *way, INT8)
    assert torch.equal(values.tensor().view(M, -1)[-16:], expected[0][-16:])
    found = words.tensor()[-K * 2 :].view(-1, formats.WORDS)[:, -32:]
    assert torch.equal(found, expected[1][0, :, -32:])
    assert torch.equal(scales.tensor()[-16:], expected[2][-16:])


def test_packing_outside_of_graphs(memory: Make, interpreter: Interpreter) -> None:
    M, K = 2**25, 4096
    x, values = memory(M, K), memory(M, K // 2)
    words = memory(*formats.metadata_shape(M, K), dtype=torch.int32)
    tile = torch.randn(64, 64).to(FP16)
    x.tensor().view(M, K)[-64:, -64:] = tile
    interpreter.run(
        (*sparsify24_cuda.SELECT_TEXT, "sparsify24_eager"),
        "sparsify24_kernel",
        (1, 1, 1),
        *(x, x, values, words, values, M, K, K, 1, K, 1),
        first=(M // 64 * (K // 64) - 1, 0, 0),
        **sparsify24_cuda.Selection("relu", "largest").constants(),
        EVEN_K=True,
        HAS_ENERGY=False,
        BLOCK_K=sparsify24_cuda.BLOCK_K,
    )
    expected, expected_words = ops.sparsify24(tile, "relu", "largest")
    assert torch.equal(values.tensor().view(M, -1)[-64:, -32:], expected)
    assert torch.equal(words.tensor()[-128:], expected_words.flatten())


@pytest.mark.parametrize("transposed", [False, True])
def test_quantizing_rows(
    transposed: bool, memory: Make, interpreter: Interpreter
) -> None:
    M, K = 2**23, 512
    stored = meta(K, M) if transposed else meta(M, K)

    def quantize(x: Tensor) -> Any:
        return sparse.quantize_rows(x.t() if transposed else x, INT8)

    kernel = Kernel(quantize, stored)
    x, values, scale = (
        memory(M, K),
        memory(M, K, dtype=INT8),
        memory(M, dtype=torch.float32),
    )
    row = torch.randn(1, K).to(FP16)
    matrix = x.tensor().view(stored.shape)
    (matrix.t() if transposed else matrix)[-1:] = row
    args = (x, scale, values)
    interpreter.run(kernel.text, kernel.name, (1, 1, 1), *args, first=(M - 1, 0, 0))
    expected, expected_scale = reference.quantize_rows(row, INT8)
    assert torch.equal(values.tensor()[-K:], expected[0])
    assert torch.equal(scale.tensor()[-1:], expected_scale)


def test_unpacking(memory: Make, interpreter: Interpreter) -> None:
    M, K, rows, columns = 2**21, 4096, 64, 256
    values, dense = (memory(M, k, dtype=torch.int16) for k in (K // 2, K))
    words = memory(*formats.metadata_shape(M, K), dtype=torch.int32)
    tile = torch.randn(rows, K).to(FP16)
    packed, metadata = ops.sparsify24(tile, "relu", "largest")
    values.tensor().view(M, -1)[-rows:] = packed.view(torch.int16)
    words.tensor()[-metadata.numel() :] = metadata.flatten()
    interpreter.run(
        ["unpack24"],
        "unpack24_kernel",
        (1, K // columns, 1),
        *(values, words, dense, M, K, K // 2),
        first=(M // rows - 1, 0, 0),
        WIDE=True,
        BLOCK_M=rows,
        BLOCK_K=columns,
    )
    expected = formats.unpack(packed, metadata, K)
    result = dense.tensor().view(M, K)[-rows:].view(FP16)
    assert torch.equal(result, expected)
