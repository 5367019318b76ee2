"""What is told to the driver about a tensor, and which tensors cannot be told of."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inductor_sparse.errors import SparseKernelError
from inductor_sparse.runtime import cuda_driver, tensor_map
from inductor_sparse.runtime.tensor_map import Layout, MapCache, TensorMap

BOX = TensorMap((32, 64), swizzle=64)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls that would have made the driver encode a map."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cuda_driver, "encode_tiled", lambda *args: calls.append(args))
    return calls


@given(
    outer=st.integers(1, 5),
    inner=st.integers(1, 40),
    pad=st.integers(0, 3),
    transposed=st.booleans(),
)
def test_layout(outer: int, inner: int, pad: int, transposed: bool) -> None:
    width = -(-inner // 8) * 8 + 8 * pad
    matrix = torch.zeros(outer, width, dtype=torch.bfloat16)[:, :inner]
    given_tensor = matrix.t() if transposed else matrix
    spec = TensorMap((32, 64), 64, transposed)
    stride = 2 * width if outer > 1 else -(-inner // 8) * 16
    assert spec.layout(given_tensor) == Layout(matrix.data_ptr(), inner, outer, stride)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.zeros(8, 32, 4).half().mT, "is 3-D; a matrix is needed"),
        (torch.zeros(4, 32).double(), "has dtype torch.float64"),
        (torch.zeros(4, 33).half(), "66 bytes apart: a multiple of 16 not below 66"),
        (torch.zeros(32, 4).half().t(), "axis 1 must be contiguous; make it .contig"),
        (torch.zeros(4, 40).half()[:, 4:], "starts 8 bytes past a 16-byte boundary"),
        (torch.zeros(1, 32).half().expand(4, 32), "has rows 0 bytes apart"),
        (torch.zeros(4, 32), "a box of 32 is 128 bytes wide, a multiple of 16 and at "),
    ],
)
def test_a_tensor_without_a_map(tensor: Tensor, problem: str) -> None:
    with pytest.raises(SparseKernelError) as caught:
        BOX.layout(tensor)
    assert problem in str(caught.value)


def test_a_contiguous_tensor_of_more_axes_is_the_matrix_of_its_last() -> None:
    words = torch.zeros(3, 5, 128, dtype=torch.int32)
    expected = Layout(words.data_ptr(), 128, 15, 512)
    assert TensorMap((128, 1)).layout(words) == expected


def test_a_weight_of_more_than_2_to_the_31_elements_has_a_map() -> None:
    weight = torch.empty(2**17, 2**15, dtype=torch.bfloat16, device="meta")
    expected = Layout(0, 2**15, 2**17, 2**16)
    assert BOX.layout(weight) == expected
    assert dataclasses.replace(BOX, transposed=True).layout(weight.t()) == expected


def test_a_transposed_map_says_which_axis() -> None:
    spec = TensorMap((32, 64), transposed=True)
    with pytest.raises(SparseKernelError, match=r"axis 0 .* column-major with .t\(\)"):
        spec.layout(torch.zeros(64, 64).half())


def test_a_tensor_beyond_what_a_map_can_address() -> None:
    spec = TensorMap((16, 64))
    largest = torch.empty(2**30, 16, dtype=torch.int8, device="meta")
    assert spec.layout(largest).outer == 2**30
    for size, stride in (((2**30 + 1, 16), 16), ((2, 2**31), 2**31), ((2, 16), 2**40)):
        huge = torch.empty_strided(size, (stride, 1), dtype=torch.int8, device="meta")
        with pytest.raises(SparseKernelError, match=r"too large .* split it"):
            spec.layout(huge)


def test_a_box_is_whole_pieces_of_16_bytes() -> None:
    with pytest.raises(SparseKernelError, match="a box of 12 is 24 bytes wide, a mult"):
        TensorMap((12, 8)).layout(torch.zeros(8, 64).half())


@pytest.mark.parametrize(
    ("box", "swizzle", "problem"),
    [
        ((32, 64), 16, "not 16"),
        ((32, 257), 0, r"not \(32, 257\)"),
        ((0, 64), 0, r"not \(0, 64\)"),
    ],
)
def test_a_map_that_no_gpu_has(
    box: tuple[int, int], swizzle: int, problem: str
) -> None:
    with pytest.raises(SparseKernelError, match=problem):
        TensorMap(box, swizzle)


def test_the_driver_is_told_and_the_map_is_aligned(
    encoded: list[tuple[Any, ...]],
) -> None:
    tensor = torch.zeros(48, 64, dtype=torch.bfloat16)[:, :40]
    address = MapCache(BOX).get(tensor).address
    assert address % 128 == 0
    arguments = (9, tensor.data_ptr(), (40, 48), 128, (32, 64), (0, 2, 2, 0))
    assert encoded == [(address, *arguments)]


def test_maps_are_kept_by_address_and_layout(encoded: list[tuple[Any, ...]]) -> None:
    cache = MapCache(BOX)
    tensor = torch.zeros(64, 64, dtype=torch.float16)
    first = cache.get(tensor)
    assert cache.get(tensor.view(64, 64)) is first
    others = [tensor[:32], tensor.view(torch.bfloat16), tensor.view(32, 128)]
    others.append(tensor.as_strided((32, 64), (128, 1)))
    assert all(cache.get(other) is not first for other in others)
    assert len(encoded) == len(cache) == 5


def test_the_maps_used_last_are_kept(encoded: list[tuple[Any, ...]]) -> None:
    cache = MapCache(BOX, limit=3)
    memory = torch.zeros(6, 16, 32, dtype=torch.float16)
    maps = [cache.get(memory[i]) for i in range(3)]
    assert cache.get(memory[0]) is maps[0]
    cache.get(memory[3])
    assert len(cache) == 3
    assert cache.get(memory[0]) is maps[0]
    assert cache.get(memory[1]) is not maps[1]


def test_numbers_are_those_of_the_bindings() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    names = {
        torch.int8: "UINT8",
        torch.float8_e4m3fn: "UINT8",
        torch.int32: "INT32",
        torch.float16: "FLOAT16",
        torch.float32: "FLOAT32",
        torch.bfloat16: "BFLOAT16",
    }
    types = driver.CUtensorMapDataType
    for dtype, name in names.items():
        member = getattr(types, f"CU_TENSOR_MAP_DATA_TYPE_{name}")
        assert tensor_map.ELEMENT_TYPES[dtype] == int(member)
    for swizzle, number in tensor_map.SWIZZLES.items():
        name = f"{swizzle}B" if swizzle else "NONE"
        member = getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{name}")
        assert int(member) == number
    promotion = driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B
    assert int(promotion) == tensor_map._L2_128_BYTES


def test_without_the_bindings_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> Any:
        raise ImportError("No module named 'cuda'")

    cuda_driver._bindings.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(SparseKernelError, match="pip install 'inductor-sparse"):
        cuda_driver.make_context_current(0)
