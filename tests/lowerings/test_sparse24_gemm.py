"""What the Hopper kernel takes, and how a weight that it does not take is copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inductor_sparse import formats, profitability
from inductor_sparse.lowerings import sparse24_gemm, sparse24_kernel, vendor24
from inductor_sparse.runtime import cuda_driver

BF16, INT8, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn

ORDERS = [
    # (K, N), strides along K and N, bytes of an element, order
    ((1024, 256), (1, 1024), 2, "k"),  # linear.weight.t()
    ((1024, 256), (1, 1032), 2, "k"),
    ((1024, 256), (1, 1028), 2, None),  # columns 2056 bytes apart
    ((1024, 256), (256, 1), 2, "n"),
    ((1024, 256), (256, 1), 1, None),  # wgmma transposes 16-bit operands only
    ((1024, 256), (1, 1024), 1, "k"),
    ((1024, 256), (1, 1032), 1, None),
    ((1022, 256), (1, 1022), 2, None),
    ((1024, 250), (250, 1), 2, None),
    ((1024, 256), (2, 2048), 2, None),
    ((1024, 256), (1, 0), 2, None),  # expanded
    ((1024, 256), (0, 1), 2, None),
    ((1, 8), (8, 1), 2, "n"),
    ((1, 8), (1, 8), 2, "k"),
    ((64, 1), (1, 64), 2, "k"),
]


@pytest.mark.parametrize("size, stride, itemsize, order", ORDERS)
def test_the_order_of_a_weight(
    size: tuple[int, int], stride: tuple[int, int], itemsize: int, order: str | None
) -> None:
    assert sparse24_gemm.weight_order(size, stride, itemsize) == order


@pytest.mark.parametrize("dtype", [BF16, INT8])
@pytest.mark.parametrize("K, N", [(100, 24), (64, 9), (1, 1)])
def test_a_copy_can_be_fetched(K: int, N: int, dtype: torch.dtype) -> None:
    w = torch.arange(K * N * 2).remainder(100).to(dtype).view(K, 2 * N)[:, ::2]
    copy, order = sparse24_gemm.fetchable(w)
    assert order == "k"
    assert torch.equal(copy, w)
    size, stride = copy.shape, copy.stride()
    assert sparse24_gemm.weight_order(size, stride, w.element_size()) == "k"


def test_what_can_be_fetched_is_not_copied() -> None:
    weight = torch.zeros(24, 64, dtype=BF16)
    kept, order = sparse24_gemm.fetchable(weight.t())
    assert (kept.data_ptr(), order) == (weight.data_ptr(), "k")
    kept, order = sparse24_gemm.fetchable(weight)
    assert (kept.data_ptr(), order) == (weight.data_ptr(), "n")


def test_an_unaligned_weight_is_copied() -> None:
    weight = torch.zeros(24 * 64 + 1, dtype=BF16)[1:].view(24, 64)
    copy, _ = sparse24_gemm.fetchable(weight.t())
    assert copy.data_ptr() != weight.data_ptr()
    assert copy.data_ptr() % 16 == 0


REFUSALS = [
    (torch.float32, torch.float32, (8, 8, 8), "no sparse tensor core multiplies"),
    (BF16, torch.float64, (8, 8, 8), "the kernel does not store torch.float64"),
    (BF16, BF16, (8, 0, 8), "the product is empty"),
    (INT8, BF16, (8, 2**30 + 1, 8), "a size is over 1073741824"),
    (INT8, torch.float16, (2**30, 8, 8), None),
    (BF16, torch.float32, (8,), None),
]


@pytest.mark.parametrize("dtype, out, sizes, reason", REFUSALS)
def test_refusals(
    dtype: torch.dtype,
    out: torch.dtype,
    sizes: tuple[int, ...],
    reason: str | None,
) -> None:
    refusal = sparse24_gemm.size_refusal(dtype, out, sizes)
    if reason is None:
        assert refusal is None
    else:
        assert reason in str(refusal)


def test_bulk_copies_store_rows_of_whole_16_bytes() -> None:
    takes = sparse24_gemm.stores_through_tma
    assert [takes(BF16, N) for N in (8, 100, 104, 7)] == [True, False, True, False]
    assert not takes(torch.float32, 8)


@pytest.mark.parametrize("tma_store", [False, True])
def test_the_arguments_of_the_plain_kernel(tma_store: bool) -> None:
    kernel = sparse24_gemm.plain_kernel(
        torch.float8_e4m3fn,
        BF16,
        sparse24_kernel.configs(torch.float8_e4m3fn)[0],
        "k",
        tma_store=tma_store,
        has_row_scale=True,
        has_col_scale=False,
    )
    tensors = kernel.signature[: kernel.signature.index("int32")]
    assert len(tensors) == 4 + tma_store  # values, w, (the result), metadata, scales
    out = () if tma_store else ("pointer",)
    assert kernel.signature == (*tensors, *("int32",) * 3, *out)
    assert [spec.transposed for spec in kernel.maps[:2]] == [False, True]
    assert ("out[m * N + n]" in kernel.source) is not tma_store


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """The kernels that the op ran, and their operands; each returns its result."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def kernel(name: str) -> Any:
        def run(*operands: Any, out_dtype: torch.dtype | None = None) -> Tensor:
            calls.append((name, operands))
            return torch.empty(0)

        return run

    for name in ("masked_dense", "cutlass", "cusparselt"):
        monkeypatch.setattr(vendor24, name, kernel(name))
    monkeypatch.setattr(sparse24_gemm, "launch", kernel("own"))
    monkeypatch.setattr(sparse24_gemm.cuda_kernel, "available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(cuda_driver, "multiprocessors", lambda _: 132)
    return calls


def on(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profitability, "architecture", lambda _: arch)


def operands(M: int, K: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    values = torch.zeros(formats.values_shape(M, K), dtype=dtype)
    metadata = torch.zeros(formats.metadata_shape(M, K), dtype=torch.int32)
    return values, metadata, torch.zeros(N, K, dtype=dtype).t()


@pytest.mark.parametrize(
    ("arch", "dtype", "N", "scaled", "kernel"),
    [
        ("sm_90", BF16, 64, False, "own"),
        ("sm_90", torch.float32, 64, False, "masked_dense"),
        ("sm_80", BF16, 64, False, "cutlass"),
        ("sm_86", INT8, 64, True, "cutlass"),
        ("sm_89", E4M3, 64, True, "masked_dense"),
        ("sm_80", BF16, 64, True, "masked_dense"),
        ("sm_80", BF16, 12, False, "masked_dense"),
        ("sm_100", E4M3, 64, True, "cusparselt"),
        ("sm_100", BF16, 0, False, "masked_dense"),
        ("gfx942", torch.float16, 64, False, "cusparselt"),
        ("sm_75", BF16, 64, False, "masked_dense"),
    ],
)
def test_the_op_runs_the_kernel_that_there_is(
    arch: str,
    dtype: torch.dtype,
    N: int,
    scaled: bool,
    kernel: str,
    called: list[tuple[str, tuple[Any, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(arch, monkeypatch)
    scales = (torch.ones(70), torch.ones(N)) if scaled else ()
    sparse24_gemm.sparse24_mm(*operands(70, 128, N, dtype), *scales)
    ((name, _),) = called
    assert name == kernel


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_without_what_it_needs_the_op_is_dense(
    arch: str,
    called: list[tuple[str, tuple[Any, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(arch, monkeypatch)
    monkeypatch.setattr(sparse24_gemm.cuda_kernel, "available", lambda: False)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    sparse24_gemm.sparse24_mm(*operands(70, 128, 64, BF16))
    ((name, _),) = called
    assert name == "masked_dense"


def test_a_vendor_is_given_what_it_can_fetch(
    called: list[tuple[str, tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on("sm_80", monkeypatch)
    _, metadata, _ = operands(70, 128, 64, BF16)
    rows, columns = formats.values_shape(70, 128)
    values = torch.zeros(rows, 1 + columns, dtype=BF16)[:, 1:]
    w = torch.zeros(1 + 64 * 128, dtype=BF16)[1:].view(64, 128).t()
    sparse24_gemm.sparse24_mm(values, metadata, w)
    ((_, (given, _, weight, *scales)),) = called
    assert given.is_contiguous()
    assert weight.stride() == (1, 128)
    assert given.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    assert scales == [None, None]
