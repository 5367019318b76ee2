"""The eager definitions against float64, and against the meaning written in words."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_within_budget
from torch import Tensor

from inductor_sparse import reference
from inductor_sparse.errors import SparseShapeError

INF, NAN = math.inf, math.nan


def relu2_input(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Pre-activations of which about one in seven is positive."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) - 1.1).to(
        dtype
    )


def weight(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", ["identity", "relu", "relu2"])
def test_activation_values(name: str) -> None:
    z = torch.tensor([-INF, -2.0, -0.0, 0.0, 0.5, 3.0, INF, NAN])
    expected = {
        "identity": [-INF, -2.0, -0.0, 0.0, 0.5, 3.0, INF, NAN],
        "relu": [0.0, 0.0, 0.0, 0.0, 0.5, 3.0, INF, NAN],
        "relu2": [0.0, 0.0, 0.0, 0.0, 0.25, 9.0, INF, NAN],
    }[name]
    actual = reference.activation(z, name)
    torch.testing.assert_close(
        actual, torch.tensor(expected), rtol=0, atol=0, equal_nan=True
    )


def test_relu2_is_rounded_to_the_dtype_before_it_is_multiplied() -> None:
    z = torch.tensor([[1.0 + 2**-7]], dtype=torch.bfloat16)
    w = torch.tensor([[2.0**7]], dtype=torch.bfloat16)
    # (1 + 2**-7)**2 = 1 + 2**-6 + 2**-14, of which bfloat16 keeps the first two terms.
    assert reference.activation_spmm(z, w, "relu2").item() == 2**7 * (1 + 2**-6)


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 96, 33), (1, 256, 7), (3, 2, 64, 5)], ids=str)
def test_activation_spmm_against_float64(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    *batch, M, K, N = shape
    z = relu2_input(*batch, M, K, dtype=dtype)
    w = weight(*batch, N, K, dtype=dtype).mT
    a = torch.relu(z) ** 2
    actual = reference.activation_spmm(z, w, "relu2")
    assert actual.is_contiguous()
    assert_within_budget(actual, a @ w, a.double() @ w.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    K = 4096
    z, w = torch.ones(1, K, dtype=dtype), torch.ones(K, 1, dtype=dtype)
    z[0, 0] = K  # from here on, adding ones one by one in 16 bits changes nothing
    assert reference.activation_spmm(z, w, "relu").item() == torch.tensor(
        2.0 * K - 1
    ).to(dtype)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("zero", [-1.0, 0.0, -0.0])
def test_a_zero_activation_never_touches_the_weight(zero: float, bad: float) -> None:
    z = torch.tensor([[zero, 2.0, 1.0], [1.0, zero, zero]])
    w = torch.tensor([[bad, 1.0], [3.0, 4.0], [5.0, 6.0]])
    y = reference.activation_spmm(z, w, "relu")
    assert y[0].tolist() == [11.0, 14.0]
    torch.testing.assert_close(y[1], torch.tensor([bad, 1.0]), equal_nan=True)


def test_a_zero_of_one_batch_does_not_hide_the_nan_of_another() -> None:
    z = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]])
    w = torch.tensor([[[NAN], [2.0]], [[NAN], [2.0]]])
    y = reference.activation_spmm(z, w, "identity").flatten().tolist()
    assert y[0] == 2.0
    assert math.isnan(y[1])


@pytest.mark.parametrize(
    ("z", "w", "expected"),
    [
        ([NAN, 0.0], [0.0, 1.0], NAN),
        ([INF, 0.0], [0.0, 1.0], NAN),
        ([INF, 1.0], [2.0, 1.0], INF),
        ([INF, 1.0], [-2.0, 1.0], -INF),
        ([INF, INF], [1.0, -1.0], NAN),
        ([-INF, 1.0], [NAN, 1.0], 1.0),
    ],
)
def test_nan_and_inf_in_the_activation(
    z: list[float], w: list[float], expected: float
) -> None:
    y = reference.activation_spmm(torch.tensor([z]), torch.tensor(w)[:, None], "relu2")
    torch.testing.assert_close(y, torch.tensor([[expected]]), equal_nan=True)


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
def test_glu_spmm_against_float64(dtype: torch.dtype) -> None:
    M, D, F, N = 4, 48, 80, 24
    gate, x = relu2_input(M, F, dtype=dtype), weight(M, D, dtype=dtype, seed=2)
    w_up, w_down = weight(F, D, dtype=dtype), weight(F, N, dtype=dtype, seed=3)
    actual = reference.glu_spmm(gate, x, w_up, w_down, "relu2")
    hidden = torch.relu(gate) ** 2 * (x @ w_up.T)
    wide = (t.double() for t in (gate, x, w_up, w_down))
    gate64, x64, up64, down64 = wide
    exact = (torch.relu(gate64) ** 2 * (x64 @ up64.T)) @ down64
    assert_within_budget(actual, hidden @ w_down, exact)


def test_glu_spmm_rounds_the_up_projection() -> None:
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    x = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    # 257 is rounded to 256 before it meets the gate; 3 * 257 would be rounded to 772.
    y = reference.glu_spmm(3 * one, x, one.expand(1, 2), one, "relu")
    assert y.item() == 768.0


@pytest.mark.parametrize("side", ["row_scale", "col_scale"])
def test_sparse24_mm_scales_before_it_rounds(side: str) -> None:
    x24 = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    scale = {side: torch.tensor([1 / 257])}
    y = reference.sparse24_mm(x24, torch.ones(2, 1, dtype=torch.bfloat16), **scale)
    assert y.item() == 1.0


def test_glu_spmm_ignores_the_rows_of_closed_neurons() -> None:
    gate = torch.tensor([[-1.0, 2.0, 3.0]])
    x = torch.tensor([[1.0, 1.0]])
    w_up = torch.tensor([[NAN, INF], [1.0, 2.0], [1.0, -1.0]])
    # The third neuron is open, but its hidden value is 3 * 0.
    w_down = torch.tensor([[NAN, INF], [1.0, 10.0], [INF, NAN]])
    y = reference.glu_spmm(gate, x, w_up, w_down, "relu")
    assert y.tolist() == [[6.0, 60.0]]


def test_glu_spmm_propagates_the_nan_of_an_open_neuron() -> None:
    gate, x = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0]])
    y = reference.glu_spmm(
        gate, x, torch.tensor([[NAN], [1.0]]), torch.ones(2, 1), "relu"
    )
    assert y.isnan().all()


@pytest.mark.parametrize("sizes", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (1, 1, 1)], ids=str)
def test_empty_and_single_sizes(sizes: tuple[int, int, int]) -> None:
    M, K, N = sizes
    z, w = torch.ones(M, K), torch.full((K, N), 2.0)
    y = reference.activation_spmm(z, w, "relu2")
    assert y.tolist() == [[2.0 * K] * N] * M
    batched = reference.activation_spmm(z[None], w[None], "relu2")
    assert batched.tolist() == [y.tolist()]
    assert reference.glu_spmm(
        z, torch.ones(M, 0), torch.ones(K, 0), w, "relu"
    ).tolist() == ([[0.0] * N] * M)


def test_row_major_weight_is_a_contiguous_copy_of_the_window() -> None:
    flat = torch.arange(24.0)
    parameter = flat[4:].view(4, 5)  # a view into a flat buffer: its offset is 4
    copy = reference.row_major_weight(parameter, [3, 2], [1, 5], 6, torch.float32)
    assert copy.is_contiguous()
    assert torch.equal(copy, parameter[1:3, 1:4].T)
    same = reference.row_major_weight(parameter, [4, 5], [5, 1], 0, torch.float32)
    assert same.data_ptr() != parameter.data_ptr()
    cast = reference.row_major_weight(parameter, [4, 5], [5, 1], 0, torch.bfloat16)
    assert torch.equal(cast, parameter.bfloat16())


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (([4, 4], [4, 1], 0), "needs 16 elements, the weight spans 12"),
        (([3, 4], [4, 1], 1), "needs 13 elements, the weight spans 12"),
        (([3, 4], [4], 0), "differ in length"),
        (([3, 4], [4, 1], -1), "must not be negative"),
    ],
)
def test_row_major_weight_refuses_to_leave_the_weight(
    window: tuple[list[int], list[int], int], message: str
) -> None:
    # The buffer behind it is larger: what is refused would be read without a fault.
    parameter = torch.arange(100.0)[20:32].view(3, 4)
    with pytest.raises(SparseShapeError, match=message):
        reference.row_major_weight(parameter, *window, torch.float32)


def slow_sparsify24(row: list[float], select: str) -> tuple[list[float], list[int]]:
    """The text of the definition as a loop over one row of Python floats."""
    row = row + [0.0] * (-len(row) % 64)
    values, index = [], []
    for start in range(0, len(row), 4):
        group = row[start : start + 4]

        def rank(i: int, group: list[float] = group) -> tuple[bool, float, int]:
            size = abs(group[i]) if select == "largest_abs" else group[i]
            return (math.isnan(size), 0.0 if math.isnan(size) else size, -i)

        for i in sorted(sorted(range(4), key=rank)[2:]):
            values.append(0.0 if group[i] == 0 else group[i])
            index.append(i)
    return values, index


AWKWARD = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, INF, -INF, NAN, 1e-45, -1e-45]
)
ROWS = st.lists(AWKWARD | st.floats(width=32), max_size=70)


@given(row=ROWS, select=st.sampled_from(reference.SELECTS))
def test_sparsify24_against_a_slow_loop(row: list[float], select: str) -> None:
    x = torch.tensor([row], dtype=torch.float32).view(1, len(row))
    values, index = reference.sparsify24(x, "identity", select)
    slow_values, slow_index = slow_sparsify24(row, select)
    assert index[0].tolist() == slow_index
    expected = torch.tensor([slow_values], dtype=torch.float32).view(1, -1)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    signs_of_numbers = values.signbit()[~values.isnan()]
    assert torch.equal(signs_of_numbers, expected.signbit()[~expected.isnan()])


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
def test_sparsify24_applies_the_rounded_activation(dtype: torch.dtype) -> None:
    x = relu2_input(3, 128, dtype=dtype)
    values, index = reference.sparsify24(x, "relu2", "largest")
    rounded = reference.sparsify24(torch.relu(x) ** 2, "identity", "largest")
    assert torch.equal(values, rounded[0])
    assert torch.equal(index, rounded[1])


def test_dropped_energy() -> None:
    assert reference.dropped_energy(
        torch.tensor([3.0, 4.0, 12.0, 0.0]), "relu", "largest"
    ) == (9 / 169)
    x = torch.tensor([[[-9.0, 1.0, 2.0, -9.0], [0.0, 0.0, 0.0, 0.0]]])
    assert reference.dropped_energy(x, "relu", "largest") == 0.0
    assert reference.dropped_energy(x, "identity", "largest_abs") == 5 / 167
    assert reference.dropped_energy(torch.zeros(2, 8), "relu", "largest") == 0.0
    assert reference.dropped_energy(torch.zeros(0, 8), "relu", "largest") == 0.0
    # Sums of ones get stuck at 256 in bfloat16: the energy is summed in float64.
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert reference.dropped_energy(ones, "relu2", "largest") == 0.5


def test_density() -> None:
    assert reference.density(torch.tensor([[0.0, -0.0], [NAN, 1e-45]])) == 0.5
    assert reference.density(torch.zeros(0, 4)) == 0.0
