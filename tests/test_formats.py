"""The 2:4 format: round trips, what is stored, and the place of each bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inductor_sparse import formats, reference
from inductor_sparse.errors import SparseShapeError

SIXTEEN_BIT = [torch.bfloat16, torch.float16, torch.int16]
EIGHT_BIT = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
WIDER = [torch.float32, torch.float64]

AWKWARD = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40]
)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Float32, up to 70 x 140, any strides, with many zeros and awkward values."""
    M, K = draw(st.integers(0, 70)), draw(st.integers(0, 140))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    layout = draw(st.sampled_from(["rows", "columns", "every second", "expanded"]))
    rows = min(M, 1) if layout == "expanded" else M
    x = torch.randn(rows, K, generator=generator)
    x *= torch.rand(rows, K, generator=generator) < draw(st.sampled_from([0.1, 0.6, 1]))
    for value in draw(st.lists(AWKWARD, max_size=6)) if x.numel() else []:
        x[draw(st.integers(0, rows - 1)), draw(st.integers(0, K - 1))] = value
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "every second":
        return torch.stack((x, x), dim=-1).flatten(1)[:, ::2]
    return x.expand(M, K)


def keep_two(x: Tensor, select: str = "largest_abs") -> Tensor:
    """``x`` with all but the selected two of four set to zero."""
    values, index = reference.sparsify24(x, "identity", select)
    return formats.unpack(values, formats.pack_index(index, x.dtype), x.shape[1])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    as_int = bits[expected.dtype.itemsize]
    assert actual.dtype == expected.dtype
    assert torch.equal(
        actual.contiguous().view(as_int), expected.contiguous().view(as_int)
    )


@given(x=matrices(), select=st.sampled_from(reference.SELECTS))
def test_what_is_kept_is_unchanged_and_at_most_two_of_four(
    x: Tensor, select: str
) -> None:
    kept = keep_two(x, select)
    assert kept.shape == x.shape
    filled = kept != 0
    assert_same_bits(kept[filled], x[filled])
    assert not kept.signbit()[~filled].any()
    groups = torch.nn.functional.pad(filled, (0, -x.shape[1] % 4)).unflatten(1, (-1, 4))
    assert (groups.sum(-1) <= 2).all()


@given(x=matrices())
def test_selection_is_idempotent_and_pack_agrees_with_it(x: Tensor) -> None:
    kept = keep_two(x)
    values, index = reference.sparsify24(kept, "identity", "largest_abs")
    packed_values, metadata = formats.pack(kept)
    assert_same_bits(packed_values, values)
    # The positions of zeros beside a kept value are decided alike by both.
    assert torch.equal(metadata, formats.pack_index(index, x.dtype))
    assert_same_bits(formats.unpack(packed_values, metadata, x.shape[1]), kept)


@given(x=matrices())
def test_nan_and_the_largest_magnitudes_survive(x: Tensor) -> None:
    kept = keep_two(x)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 4)).unflatten(1, (-1, 4))
    kept4 = torch.nn.functional.pad(kept, (0, -x.shape[1] % 4)).unflatten(1, (-1, 4))
    nans = padded.isnan().sum(-1)
    assert torch.equal(kept4.isnan().sum(-1), nans.clamp(max=2))
    order = padded.abs().nan_to_num(math.inf, posinf=math.inf).sort(-1, descending=True)
    magnitudes = (
        kept4.abs().nan_to_num(math.inf, posinf=math.inf).sort(-1, descending=True)
    )
    assert torch.equal(magnitudes.values[..., :2], order.values[..., :2])


@pytest.mark.parametrize("dtype", SIXTEEN_BIT + EIGHT_BIT + WIDER, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 64), (3, 0), (1, 1), (64, 64), (65, 130)], ids=str
)
def test_round_trip_of_every_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M, K = shape
    kept = keep_two((torch.arange(1.0, M * K + 1) % 100).reshape(M, K)).to(dtype)
    values, metadata = formats.pack(kept)
    assert values.shape == formats.values_shape(M, K)
    assert metadata.shape == formats.metadata_shape(M, K)
    assert values.is_contiguous() and metadata.is_contiguous()
    dense = formats.unpack(values, metadata, K)
    assert dense.is_contiguous()
    assert_same_bits(dense, kept)
    assert (values.nbytes, metadata.nbytes) == formats.packed_bytes(M, K, dtype)


@given(
    rows=st.integers(0, 130), blocks=st.integers(0, 3), bits=st.sampled_from([8, 16])
)
def test_unpack_index_inverts_pack_index(rows: int, blocks: int, bits: int) -> None:
    dtype = torch.int8 if bits == 8 else torch.bfloat16
    pairs = torch.tensor([(a, b) for a in range(4) for b in range(a + 1, 4)])
    choice = torch.randint(
        6, (rows, 16 * blocks), generator=torch.Generator().manual_seed(7)
    )
    index = pairs[choice].flatten(1).byte()
    words = formats.pack_index(index, dtype)
    assert torch.equal(formats.unpack_index(words, rows, dtype), index)


def nibble_of(word: int, group: int) -> tuple[int, int]:
    """The pair of positions in bits ``4 * group`` and up."""
    bits = word >> 4 * group & 15
    return bits & 3, bits >> 2


def slow_places(thread: int, bits: int) -> list[tuple[int, int]]:
    """Row and first column of each of the 8 groups of the word of one thread."""
    r, w = thread % 32 // 4, thread // 32
    if bits == 8:
        row, column = 16 * w + r + 8 * (thread % 2), 32 * (thread // 2 % 2)
        return [(row, column + 4 * group) for group in range(8)]
    column = 16 * (thread % 4)
    low = [(16 * w + r, column + 4 * group) for group in range(4)]
    high = [(16 * w + r + 8, column + 4 * group) for group in range(4)]
    return low + high


@pytest.mark.parametrize("bits", [8, 16])
def test_each_word_holds_the_groups_of_its_thread(bits: int) -> None:
    M, K = 100, 192
    generator = torch.Generator().manual_seed(3)
    x = keep_two(torch.randn(M, K, generator=generator))
    x = (x * 30).clamp(-127, 127).to(torch.int8 if bits == 8 else torch.bfloat16)
    _, metadata = formats.pack(x)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, 28))
    assert metadata.shape == (2, 3, 128)
    for i, j, thread in torch.cartesian_prod(
        torch.arange(2), torch.arange(3), torch.arange(128)
    ).tolist():
        word = metadata[i, j, thread].item() & 0xFFFFFFFF
        block = padded[64 * i : 64 * (i + 1), 64 * j : 64 * (j + 1)]
        for group, (row, column) in enumerate(slow_places(thread, bits)):
            filled = block[row, column : column + 4].nonzero().flatten().tolist()
            first, second = nibble_of(int(word), group)
            assert first < second
            assert set(filled) <= {first, second}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_padding_holds_valid_pairs(dtype: torch.dtype) -> None:
    _, metadata = formats.pack(torch.zeros(1, 4, dtype=dtype))
    assert (metadata == 0x44444444).all()


def test_known_words() -> None:
    """Row 0 keeps (2, 3) in its first group, row 8 keeps (1, 3) in its second."""
    x = torch.zeros(9, 64)
    x[0, 2], x[0, 3], x[8, 5], x[8, 7] = 1.0, 2.0, 3.0, 4.0
    wide = formats.pack(x.bfloat16())[1][0, 0]
    assert wide[0].item() == 0x44D4444E
    narrow = formats.pack(x.to(torch.int8))[1][0, 0]
    assert [narrow[0].item(), narrow[1].item()] == [0x4444444E, 0x444444D4]
    assert (wide[1:] == 0x44444444).all()
    assert (narrow[2:] == 0x44444444).all()


def test_a_word_may_use_its_sign_bit() -> None:
    x = torch.zeros(9, 64)
    x[8, 14], x[8, 15] = 1.0, 2.0
    values, metadata = formats.pack(x.half())
    assert metadata[0, 0, 0].item() == 0xE4444444 - 2**32
    assert torch.equal(formats.unpack(values, metadata, 64), x.half())


def test_pack_stores_a_negative_zero_as_zero() -> None:
    values, _ = formats.pack(torch.tensor([[-0.0, 1.0, -0.0, -0.0]]))
    assert not values.signbit().any()


def test_packed_bytes() -> None:
    assert formats.packed_bytes(64, 64, torch.bfloat16) == (4096, 512)
    assert formats.packed_bytes(65, 65, torch.int8) == (65 * 64, 4 * 512)
    assert (
        formats.packed_bytes(128, 256, torch.float16).total == 128 * 256 * 2 * 9 // 16
    )
    assert formats.packed_bytes(128, 256, torch.int8).total == 128 * 256 * 5 // 8
    assert formats.packed_bytes(0, 64, torch.int8) == (0, 0)


def test_a_tensor_that_is_not_24_is_refused() -> None:
    x = torch.zeros(2, 8)
    x[1, 4:7] = math.nan
    with pytest.raises(SparseShapeError, match="more than two non-zeros; choose"):
        formats.pack(x)


def test_shapes_that_do_not_fit_are_refused() -> None:
    values, metadata = formats.pack(torch.zeros(70, 100))
    with pytest.raises(SparseShapeError, match=r"expected \[M, 96\] for 129 columns"):
        formats.unpack(values, metadata, 129)
    with pytest.raises(
        SparseShapeError, match=r"torch.int32 \(2, 2, 128\) for 70 rows"
    ):
        formats.unpack(values, metadata[:1], 100)
    with pytest.raises(
        SparseShapeError, match=r"is torch.int64 .* expected torch.int32"
    ):
        formats.unpack(values, metadata.long(), 100)
    with pytest.raises(SparseShapeError, match=r"expected torch.int32"):
        formats.unpack_index(metadata[0], 64, torch.int8)
    with pytest.raises(SparseShapeError, match=r"a multiple of 32; pad K"):
        formats.pack_index(torch.zeros(4, 33, dtype=torch.uint8), torch.half)
    with pytest.raises(SparseShapeError, match=r"expected \[M, K\]"):
        formats.pack(torch.zeros(4))
