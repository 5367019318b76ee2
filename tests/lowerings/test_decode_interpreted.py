"""The decode kernels under Triton's interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import decode_kernels
import pytest
import torch
from decode_kernels import Interpreter
from torch import Tensor

from inductor_sparse import reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = [(FP32, "relu2"), (BF16, "relu"), (FP16, "relu2"), (FP32, "identity")]
TOKENS = {1: 1, 2: 2, 3: 4, 8: 8, 17: 8}


@pytest.fixture(scope="module")
def interpret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    with decode_kernels.interpreter(tmp_path_factory.mktemp("kernels")) as made:
        yield made


def sparse(*size: int, density: float = 0.3) -> Tensor:
    z = torch.rand(size) + 0.1
    return torch.where(torch.rand(size) < density, z, -z)


def check(actual: Tensor, exact: Tensor, ulps: float, dtype: torch.dtype) -> None:
    """``actual`` is within so many roundings of the largest value; NaN, Inf match."""
    finite = exact.isfinite()
    expected = exact[~finite].to(actual.dtype)
    torch.testing.assert_close(actual[~finite], expected, equal_nan=True)
    scale = exact[finite].abs().max().item() if finite.any() else 0.0
    limit = ulps * torch.finfo(dtype).eps * scale
    assert ((actual.double() - exact)[finite].abs() <= limit).all()


def check_spmm(
    interpret: Interpreter, z: Tensor, w: Tensor, activation: str, **tile: int
) -> None:
    a = reference.activation(z, activation)
    exact = reference.activation_spmm(a.double(), w.double(), "identity")
    tile = {"TOKENS": TOKENS[len(z)], **tile}
    y = interpret(decode_kernels.run_spmm, z, w, activation, **tile)
    # The interpreter rounds to bfloat16 towards zero: 2 roundings of a square.
    check(y, exact, 16 if z.dtype == FP32 else 2, z.dtype)


@pytest.mark.parametrize(("dtype", "activation"), KINDS)
@pytest.mark.parametrize("M", [1, 3])
def test_product(
    interpret: Interpreter, M: int, activation: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(M)
    z, w = sparse(M, 203).to(dtype), torch.randn(203, 77).to(dtype)
    z[:, ::3] = 0.0
    check_spmm(interpret, z, w, activation)


@pytest.mark.parametrize(("M", "dot"), [(2, 0), (8, 0), (3, 1), (8, 1), (17, 1)])
def test_other_numbers_of_tokens(interpret: Interpreter, M: int, dot: int) -> None:
    torch.manual_seed(M)
    check_spmm(interpret, sparse(M, 60), torch.randn(60, 30), "relu", DOT=dot)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("M", [1, 3])
def test_density(interpret: Interpreter, M: int, density: float) -> None:
    torch.manual_seed(0)
    z, w = sparse(M, 300, density=density), torch.randn(300, 40)
    check_spmm(interpret, z, w, "relu")


@pytest.mark.parametrize("tile", [(1, 16), (2, 64), (7, 16), (40, 32)])
def test_any_way_of_dealing_the_neurons(
    interpret: Interpreter, tile: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    splits, local = tile
    z, w = sparse(1, 203), torch.randn(203, 33)
    check_spmm(interpret, z, w, "relu2", SPLITS=splits, LOCAL=local)


@pytest.mark.parametrize(("M", "dot"), [(1, 0), (3, 0), (3, 1)])
def test_zeros_touch_no_weight_and_nan_stays(
    interpret: Interpreter, M: int, dot: int
) -> None:
    torch.manual_seed(0)
    z, w = sparse(M, 100), torch.randn(100, 40)
    w[7], w[8, 5] = torch.inf, torch.nan
    z[:, 7:9], z[0, 9] = -0.0, torch.nan
    check_spmm(interpret, z, w, "relu", DOT=dot)
    z[M - 1, 7] = 2.0
    check_spmm(interpret, z, w, "relu", DOT=dot)


@pytest.mark.parametrize(("M", "dot"), [(1, 0), (3, 0), (3, 1), (17, 1)])
def test_the_neurons_that_are_read_are_counted(
    interpret: Interpreter, M: int, dot: int
) -> None:
    torch.manual_seed(M)
    z, w = sparse(M, 203, density=0.1), torch.randn(203, 77)
    tokens = TOKENS[M]
    needed = sum((block > 0).any(0).sum().item() for block in z.split(tokens))
    how = {"TOKENS": tokens, "DOT": dot, "LOCAL": 16 if M < 4 else 64}
    found = interpret(decode_kernels.count, z, w, calls=2, **how)
    assert found == [0, 0, 2 * needed, 2 * 203 * -(-M // tokens)]


def test_a_repeated_sum_counts_once(interpret: Interpreter) -> None:
    z, w = torch.eye(2, 40), torch.full((40, 33), torch.inf)
    assert interpret(decode_kernels.count, z, w, calls=1, TOKENS=2) == [0, 0, 2, 40]


def test_strides_of_the_activation(interpret: Interpreter) -> None:
    torch.manual_seed(0)
    check_spmm(interpret, sparse(100, 2).t(), torch.randn(100, 40), "relu")


def check_up(
    interpret: Interpreter, M: int, activation: str, dtype: torch.dtype, **tile: int
) -> None:
    torch.manual_seed(M)
    gate, x = sparse(M, 99).to(dtype), torch.randn(M, 77).to(dtype)
    w = (torch.randn(99, 77) / 9).to(dtype)
    w[3], gate[:, 3], gate[0, 5], gate[M - 1, 6] = torch.nan, -1.0, torch.nan, 0.0
    tile = {"BM": TOKENS[M], **tile}
    hidden = interpret(decode_kernels.run_up, gate, x, w, activation, **tile)
    a = reference.activation(gate, activation).double()
    exact = torch.where(a == 0, 0.0, a * (x.double() @ w.double().t()))
    check(hidden, exact, 16 if dtype == FP32 else 4, dtype)


@pytest.mark.parametrize(("dtype", "activation"), KINDS)
@pytest.mark.parametrize(("M", "dot"), [(1, 0), (1, 1), (3, 0), (3, 1), (17, 1)])
def test_hidden_values(
    interpret: Interpreter, M: int, dot: int, activation: str, dtype: torch.dtype
) -> None:
    rows = 16 if dot else 4
    check_up(interpret, M, activation, dtype, ROWS=rows, DOT=dot)


@pytest.mark.parametrize(("M", "dot"), [(2, 0), (2, 1), (3, 1), (8, 0), (8, 1)])
@pytest.mark.parametrize(
    ("local", "rows", "features", "parts"),
    [(16, 16, 64, 1), (32, 32, 16, 4), (64, 16, 128, 2)],
)
def test_hidden_values_whatever_the_tile(
    interpret: Interpreter,
    M: int,
    dot: int,
    local: int,
    rows: int,
    features: int,
    parts: int,
) -> None:
    tile = {"LOCAL": local, "ROWS": rows, "BD": features, "PARTS": parts, "DOT": dot}
    check_up(interpret, M, "relu", FP32, **tile)
