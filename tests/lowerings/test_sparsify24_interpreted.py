"""The Triton kernels of ``sparsify24``, interpreted: the bits of the reference."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_kernels import (
    FORMATS,
    INF,
    NAN,
    assert_quantized,
    awkward,
    quantizable,
    quantize,
    same_bits,
    select,
)
from torch import Tensor
from triton_interpreter import Interpreter

from inductor_sparse import ops, reference, templates
from inductor_sparse.runtime import sparsify24_cuda
from inductor_sparse.runtime.sparsify24_cuda import Selection

pytest.importorskip("triton")

WAYS = (
    ("relu2", "largest"),
    ("relu", "largest_abs"),
    ("identity", "largest"),
    ("identity", "largest_abs"),
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


@pytest.mark.parametrize("dtype", sparsify24_cuda.DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_sparsify24(
    interpreter: Interpreter, way: tuple[str, str], dtype: torch.dtype
) -> None:
    for M, K in ((1, 1), (63, 66), (65, 130), (64, 128)):
        x = awkward(M, K, dtype)
        values, metadata, _ = select(interpreter, x, *way)
        expected = ops.sparsify24(x, *way)
        assert torch.equal(metadata, expected[1])
        assert same_bits(values, expected[0])


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, INF, -INF, NAN, 1e-45, -1e-45])


@settings(max_examples=25)
@given(
    row=st.lists(NUMBERS | st.floats(width=16), min_size=1, max_size=70),
    way=st.sampled_from(WAYS),
    dtype=st.sampled_from(sparsify24_cuda.DTYPES),
)
def test_sparsify24_of_any_row(
    interpreter: Interpreter, row: list[float], way: tuple[str, str], dtype: torch.dtype
) -> None:
    x = torch.tensor([row]).to(dtype)
    values, metadata, _ = select(interpreter, x, *way)
    expected = ops.sparsify24(x, *way)
    assert torch.equal(metadata, expected[1])
    assert same_bits(values, expected[0])


def test_columns_may_be_far_apart(interpreter: Interpreter) -> None:
    x = awkward(130, 70, torch.bfloat16).t()[:, ::2]
    values, metadata, _ = select(interpreter, x, "relu2", "largest")
    expected = ops.sparsify24(x, "relu2", "largest")
    assert torch.equal(metadata, expected[1])
    assert same_bits(values, expected[0])


def test_energy(interpreter: Interpreter) -> None:
    x = awkward(70, 130, torch.float16, finite=True)
    values, _, energy = select(interpreter, x, "relu2", "largest")
    total = torch.relu(x).square().double().square().sum()
    expected = torch.stack((values.double().square().sum(), total))
    torch.testing.assert_close(energy.sum(0), expected, rtol=1e-6, atol=0)
    assert energy.count_nonzero() == 2 * 2 * 3  # a slot for each of 2 x 3 programs


@pytest.mark.parametrize(
    ("tiles", "programs", "summed"),
    # Of the second 32 rows of tiles the one that is summed is number 23.
    [((255, 1), 3, 3), ((256, 1), 55, 1), ((256, 1), 56, 2), ((8, 32), 33, 1)],
    ids=str,
)
def test_of_256_tiles_one_of_32_is_summed(
    interpreter: Interpreter, tiles: tuple[int, int], programs: int, summed: int
) -> None:
    x = torch.ones(64 * tiles[0], 64 * tiles[1], dtype=torch.bfloat16)
    _, _, energy = select(interpreter, x, "relu", "largest", programs)
    assert energy.sum(0).tolist() == [summed * 64 * 32, summed * 64 * 64]


@pytest.mark.parametrize(
    ("source", "K", "way", "whole", "dtype"),
    [
        *((torch.bfloat16, 130, WAYS[0], True, dtype) for dtype in FORMATS),
        *((torch.float32, 66, WAYS[3], True, dtype) for dtype in FORMATS),
        *((torch.float16, 130, WAYS[3], False, dtype) for dtype in FORMATS),
        (torch.bfloat16, 131, WAYS[0], True, FORMATS[0]),
        (torch.float16, 126, WAYS[0], False, FORMATS[1]),
        (torch.float16, 64, WAYS[1], True, FORMATS[0]),
        (torch.bfloat16, 100, WAYS[2], True, FORMATS[1]),
        (torch.bfloat16, 66, WAYS[3], True, FORMATS[0]),
        (torch.float16, 65, WAYS[3], False, FORMATS[1]),
        (torch.bfloat16, 128, WAYS[2], False, FORMATS[0]),
    ],
    ids=str,
)
def test_sparsify24_quantized(
    interpreter: Interpreter,
    source: torch.dtype,
    K: int,
    way: tuple[str, str],
    whole: bool,
    dtype: torch.dtype,
) -> None:
    assert_quantized(interpreter, quantizable(K, source), way, whole, dtype)


@settings(max_examples=6)
@given(
    numbers=st.lists(NUMBERS | st.floats(width=16), min_size=1, max_size=35),
    way=st.sampled_from((WAYS[0], WAYS[1], WAYS[3])),
    source=st.sampled_from((torch.bfloat16, torch.float16)),
    dtype=st.sampled_from(FORMATS),
)
def test_two_groups_at_a_time_of_any_rows(
    interpreter: Interpreter,
    numbers: list[float],
    way: tuple[str, str],
    source: torch.dtype,
    dtype: torch.dtype,
) -> None:
    # A program for each of 64 rows runs in any case: here on all neighbors of numbers.
    row = torch.tensor(numbers + numbers[::-1])
    x = torch.stack([row.roll(places) for places in range(len(row))][:64]).to(source)
    plan = sparsify24_cuda.row_plan(x.shape[1])
    results = quantize(interpreter, x, way, dtype, plan, paired=True)
    expected = ops.sparsify24_quantized(x, *way, dtype)
    assert torch.equal(results[1], expected[1])
    assert same_bits(results[0], expected[0])
    assert same_bits(results[2], expected[2])


def test_when_two_groups_are_handled_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    squared = Selection("relu2", "largest")
    assert squared.is_paired(torch.float16, even=True)
    assert Selection("identity", "largest_abs").is_paired(torch.bfloat16, even=True)
    assert not Selection("identity", "largest").is_paired(torch.bfloat16, even=True)
    assert not squared.is_paired(torch.float32, even=True)
    assert not squared.is_paired(torch.bfloat16, even=False)
    gated = Selection("relu2", "largest_abs", gated=True)
    assert not gated.is_paired(torch.bfloat16, even=True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not squared.is_paired(torch.float16, even=True)


def small_integers(M: int, K: int) -> Tensor:
    """Rows whose squares of squares are added without rounding, no two alike."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-8, 8, (M, K), generator=generator).bfloat16()


def energies(x: Tensor, way: tuple[str, str]) -> tuple[float, float]:
    """The energy that is kept, and all of it."""
    kept = ops.sparsify24(x, *way)[0].double().square().sum()
    total = reference.activation(x, way[0]).double().square().sum()
    return float(kept), float(total)


@pytest.mark.parametrize(
    ("M", "way", "plan"),
    [
        (90, ("relu2", "largest"), sparsify24_cuda.RowPlan(True, 128, 1)),
        (26, ("identity", "largest"), sparsify24_cuda.RowPlan(False, 64, 1)),
    ],
    ids=str,
)
def test_more_than_16_rows_and_their_energy(
    interpreter: Interpreter,
    M: int,
    way: tuple[str, str],
    plan: sparsify24_cuda.RowPlan,
) -> None:
    # Of the last 16 rows all kinds: paired, without a partner, beyond M.
    x = small_integers(M, 70)
    energy = torch.zeros(ops.ENERGY_SLOTS, 2, dtype=torch.float64)
    values, words, scale, energy = quantize(
        interpreter, x, way, torch.int8, plan, energy
    )
    expected = ops.sparsify24_quantized(x, *way, torch.int8)
    assert torch.equal(words, expected[1])
    assert torch.equal(values, expected[0])
    assert torch.equal(scale, expected[2])
    assert tuple(energy.sum(0).tolist()) == energies(x, way)
    assert energy[:, 1].count_nonzero() == M  # a slot for each program with a row


@pytest.mark.parametrize("whole", [False, True])
def test_of_a_large_matrix_one_row_of_32_is_summed(
    interpreter: Interpreter, whole: bool
) -> None:
    x, way = small_integers(1024, 64), ("identity", "largest_abs")
    energy = torch.zeros(ops.ENERGY_SLOTS, 2, dtype=torch.float64)
    plan = sparsify24_cuda.RowPlan(whole, 64, 1)
    left = quantize(interpreter, x, way, torch.int8, plan, energy, blocks=1)
    assert tuple(left[3].sum(0).tolist()) == energies(x[[0, 32 + 23]], way)


@pytest.mark.parametrize("length", [32, 64, 96, 512, 1000, 2048, 4096])
def test_no_place_of_a_sequence_is_summed_more_often(length: int) -> None:
    """The text itself, as Python: integers are all that it works on."""
    text = templates.load("triton/select24.py.jinja")
    function = text[text.index("def scattered") :].partition("\n\n")[0]
    names: dict[str, Any] = {"tl": types.SimpleNamespace(constexpr=int)}
    exec(function, names)
    rows = [row for row in range(2**18) if names["scattered"](row, 32) % 32 == 0]
    assert len(rows) == 2**18 // 32
    met = collections.Counter(row % length for row in rows)
    evenly = 2**18 / length / 32
    assert max(met.values()) < 1.3 * evenly + 2
    assert abs(met[0] - evenly) <= 0.1 * evenly + 1


def test_the_kernels_know_the_constants_of_the_reference() -> None:
    assert Selection("relu2", "largest_abs").constants() == {
        "RELU": True,
        "SQUARE": True,
        "GATED": False,
        "ORDER": 0,
    }
    for signed in (("identity", False), ("relu", True)):
        ways = [Selection(signed[0], one, signed[1]) for one in reference.SELECTS]
        assert [way.constants()["ORDER"] for way in ways] == [2, 1]
