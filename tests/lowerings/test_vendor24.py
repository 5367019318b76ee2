from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass,
)
from triton_interpreter import Interpreter

from inductor_sparse import formats, reference
from inductor_sparse.lowerings import candidate_check, vendor24

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)


def packed(M: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = candidate_check.generator(CPU)
    values = candidate_check.random_values(
        formats.values_shape(M, K), K, dtype, CPU, draw
    )
    shape = formats.metadata_shape(M, K)
    return values, candidate_check.random_metadata(shape, CPU, draw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("M, K", [(64, 64), (192, 320)])
def test_cutlass_reads_the_words_in_its_order(
    M: int, K: int, dtype: torch.dtype
) -> None:
    values, metadata = packed(M, K, dtype)
    words = vendor24.cutlass_metadata(metadata, dtype)
    assert words.dtype == (torch.int32 if dtype == torch.int8 else torch.int16)
    # Torch's own conversion undoes the order in which CUTLASS stores its words.
    dense = sparse_semi_structured_to_dense_cutlass(values, words)
    assert torch.equal(dense, formats.unpack(values, metadata, K))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_masked_dense_product_is_the_op(dtype: torch.dtype, scaled: bool) -> None:
    M, K, N = 70, 100, 24
    values, metadata = packed(M, K, dtype)
    w = candidate_check.random_weight(
        torch.empty(N, K, dtype=dtype).t(), candidate_check.generator(CPU)
    )
    scales = (torch.rand(M) + 0.5, torch.rand(N) + 0.5) if scaled else (None, None)
    found = vendor24.masked_dense(values, metadata, w, *scales)
    assert found.dtype == reference.result_dtype24(dtype, None)
    rows = torch.arange(M)
    expected = candidate_check.expected_rows(rows, values, metadata, w, *scales)
    error = candidate_check.relative_error(found, expected)
    assert error < torch.finfo(found.dtype).eps


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as running:
        yield running


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K", [(1, 64), (70, 100), (130, 320)])
def test_unpacking_on_a_gpu(
    M: int, K: int, dtype: torch.dtype, interpreter: Interpreter
) -> None:
    values, metadata = packed(M, K, dtype)
    wide = dtype.itemsize == 2
    bits = torch.int16 if wide else torch.uint8
    values = torch.nn.functional.pad(values.view(bits), (0, 5))  # a row stride
    dense = torch.full((M, K), 7, dtype=bits)
    rows, columns = vendor24._UNPACK_ROWS, vendor24._UNPACK_COLUMNS
    _, _, dense, *_ = interpreter.run(
        ["unpack24"],
        "unpack24_kernel",
        (-(-M // rows), -(-K // columns)),
        *(values, metadata, dense, M, K, values.stride(0)),
        WIDE=wide,
        BLOCK_M=rows,
        BLOCK_K=columns,
    )
    expected = formats.unpack(values[:, :-5].view(dtype), metadata, K)
    assert torch.equal(dense.view(dtype).view(bits), expected.view(bits))


def product_of(M: int, K: int, dtype: torch.dtype, by_row: bool) -> tuple[Any, ...]:
    """values, metadata, w, and what they multiply to."""
    values, metadata = packed(M, K, dtype)
    w = candidate_check.random_weight(
        torch.empty(32, K, dtype=dtype).t(), candidate_check.generator(CPU)
    )
    w = w.contiguous() if by_row else w
    expected = formats.unpack(values, metadata, K).double() @ w.double()
    return values, metadata, w, expected


SIZES = [(64, 128), (70, 100), (1, 192), (130, 72)]


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("M, K", SIZES)
def test_cutlass_is_given_whole_blocks(
    M: int, K: int, dtype: torch.dtype, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def multiply(values: Tensor, words: Tensor, w: Tensor, out_dtype: Any) -> Tensor:
        assert values.shape[0] % 64 == w.shape[0] % 64 == 0
        # Of 8 bits it has a kernel for contiguous columns only.
        assert w.t().is_contiguous() or (dtype != torch.int8 and w.is_contiguous())
        dense = sparse_semi_structured_to_dense_cutlass(values, words)
        return (dense.double() @ w.double()).to(out_dtype or dtype)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", multiply)
    values, metadata, w, expected = product_of(M, K, dtype, by_row)
    wide = {"out_dtype": torch.float32} if dtype == torch.int8 else {}
    found = vendor24.cutlass(values, metadata, w, **wide)
    assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("M, K", SIZES)
def test_cusparselt_is_given_whole_blocks(
    M: int, K: int, dtype: torch.dtype, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = vendor24._Algorithm(7, 2, 1)

    def multiply(compressed: Tensor, w: Tensor, **how: Any) -> Tensor:
        assert compressed.shape[0] % 32 == compressed.shape[1] % 64 == 0
        assert compressed.shape[1] == w.shape[0]
        assert w.t().is_contiguous() or (dtype != torch.int8 and w.is_contiguous())
        out_dtype = how.pop("out_dtype") or dtype
        assert how == algorithm._asdict()
        return (compressed.double() @ w.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(vendor24, "_cusparselt_algorithm", lambda *args: algorithm)
    values, metadata, w, expected = product_of(M, K, dtype, by_row)
    wide = {"out_dtype": torch.float32} if dtype == torch.int8 else {}
    found = vendor24.cusparselt(values, metadata, w, **wide)
    assert torch.equal(found, expected.to(found.dtype))


def test_scales_are_applied_before_rounding() -> None:
    product = torch.tensor([[3.0, 5.0]], dtype=torch.float32)
    scaled = vendor24._scaled(
        product, torch.tensor([2.0]), torch.tensor([1.0, 0.5]), torch.bfloat16
    )
    assert scaled.dtype == torch.bfloat16
    assert scaled.tolist() == [[6.0, 5.0]]


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_e4m3_is_multiplied_in_16_bits_where_nothing_else_does(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == torch.float16
        taken.append("mm")
        return (a.double() @ b.double()).to(out_dtype)

    def scaled_mm(a: Tensor, b: Tensor, *_: Any, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        taken.append("scaled_mm")
        return (a.double() @ b.double()).to(out_dtype)

    taken: list[str] = []
    a = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    a = torch.where(a.float().isnan(), torch.zeros(()), a.float()).to(a.dtype)
    a, w = a.repeat(32, 1), a.repeat(16, 1).t()
    expected = (a.double() @ w.double()).float()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    assert torch.equal(vendor24._dense_product(a, w), expected)
    assert taken == ["scaled_mm" if capability >= (8, 9) else "mm"]


REFUSALS = [
    (torch.bfloat16, torch.float32, 64, False, "gives no torch.bfloat16 product"),
    (torch.bfloat16, torch.bfloat16, 64, True, "gives no torch.bfloat16 product"),
    (torch.bfloat16, torch.bfloat16, 12, False, "multiple of 8, not 12"),
    (torch.int8, torch.bfloat16, 24, True, "multiple of 16, not 24"),
    (torch.float32, torch.float32, 64, False, "does not multiply torch.float32"),
    (torch.float16, torch.float16, 64, False, None),
    (torch.int8, torch.bfloat16, 64, True, None),
]


@pytest.mark.parametrize("dtype, out, N, scaled, reason", REFUSALS)
@pytest.mark.parametrize("kernel", ["cutlass", "cusparselt"])
def test_refusals_name_the_obstacle(
    kernel: str,
    dtype: torch.dtype,
    out: torch.dtype,
    N: int,
    scaled: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    refusal = getattr(vendor24, f"{kernel}_refusal")(dtype, out, N, scaled=scaled)
    if reason is None:
        assert refusal is None
    else:
        assert reason in str(refusal)


def test_no_cusparselt_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    half = torch.float16
    refusal = vendor24.cusparselt_refusal(half, half, 64, scaled=False)
    assert refusal == "torch has no cuSPARSELt"


def test_generated_code_says_which_scales_it_passes() -> None:
    values, metadata = packed(64, 64, torch.float16)
    w = torch.randn(64, 8).half()
    col = torch.rand(8) + 0.5
    call = vendor24.MASKED_DENSE.to_callable()
    found = call(values, metadata, w, col, col=True, out_dtype=torch.float32)
    expected = vendor24.masked_dense(
        values, metadata, w, None, col, out_dtype=torch.float32
    )
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
