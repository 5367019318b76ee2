"""The compiled CPU kernels of ``activation_spmm`` against float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from inductor_sparse import lowerings, reference

OP = torch.ops.inductor_sparse.activation_spmm
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = {"best": None, "avx2": 256}


@functools.cache
def compiled(activation: str, simdlen: int | None) -> Callable[..., Tensor]:
    """One kernel a dtype, with every size symbolic."""
    lowerings.register_all()

    def product(z: Tensor, w: Tensor) -> Tensor:
        return OP(z, w, activation)

    return torch.compile(product, dynamic=True)


def run(z: Tensor, w: Tensor, activation: str, simdlen: int | None = None) -> Tensor:
    with torch.no_grad(), inductor_config.patch({"cpp.simdlen": simdlen}):
        return compiled(activation, simdlen)(z, w)


def random_case(
    M: int, K: int, N: int, dtype: torch.dtype, density: float
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M * 7919 + K * 31 + N)
    z = torch.rand(M, K, generator=generator) + 0.1
    kept = torch.rand(M, K, generator=generator) < density
    w = torch.randn(K, N, generator=generator)
    return torch.where(kept, z, -z).to(dtype), w.to(dtype)


def check(z: Tensor, w: Tensor, activation: str, actual: Tensor) -> None:
    act = reference.ACTIVATIONS[activation]
    exact = act(z).double() @ w.double()
    # Sums of other lengths in another order: one rounding of the largest partial sum.
    terms = act(z).double().abs() @ w.double().abs()
    slack = torch.finfo(z.dtype).eps * terms
    excess = (actual.double() - exact).abs() - 2 * worst(act(z) @ w, exact) - slack
    assert actual.shape == exact.shape and actual.dtype == z.dtype
    assert not (excess > 0).any(), excess.max()


def worst(dense: Tensor, exact: Tensor) -> float:
    return (dense.double() - exact).abs().max().item() if dense.numel() else 0.0


SHAPES = list(itertools.product((2, 4, 5, 70), (3, 257, 1030), (2, 65, 200)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape_matches_float64(dtype: torch.dtype, isa: str) -> None:
    for M, K, N in SHAPES:
        z, w = random_case(M, K, N, dtype, density=0.1)
        check(z, w, "relu2", run(z, w, "relu2", ISAS[isa]))


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_other_activations(activation: str) -> None:
    for M in (2, 33):
        z, w = random_case(M, 300, 70, torch.float32, density=0.2)
        z = z.relu() * torch.randn(M, 1) if activation == "identity" else z
        check(z, w, activation, run(z, w, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_any_density_matches_float64(density: float, dtype: torch.dtype) -> None:
    for M in (3, 20, 40):
        z, w = random_case(M, 600, 130, dtype, density)
        check(z, w, "relu2", run(z, w, "relu2"))


def test_more_rows_than_are_compressed_together() -> None:
    z, w = random_case(1100, 64, 80, torch.float32, density=0.1)
    check(z, w, "relu2", run(z, w, "relu2"))


@pytest.mark.parametrize(("M", "N"), [(0, 70), (40, 0), (1, 70), (40, 1), (1, 1)])
def test_sizes_of_zero_and_one(M: int, N: int) -> None:
    z, w = random_case(M, 300, N, torch.float32, density=0.1)
    check(z, w, "relu2", run(z, w, "relu2"))


@pytest.mark.parametrize("M", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_behave_as_in_the_reference(M: int, dtype: torch.dtype) -> None:
    z, w = random_case(M, 300, 70, dtype, density=0.1)
    z[0, 5], z[1, 6], z[2, 7] = float("nan"), float("inf"), -0.0
    w[7] = float("inf")  # row 2 has a zero here: 0 * Inf is skipped, not NaN
    z[:2, 7] = -1
    z[3:, 7] = -1
    actual = run(z, w, "relu2")
    expected = OP(z, w, "relu2")
    assert actual[0].isnan().all()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    assert actual[2].isfinite().all()


def test_an_odd_number_of_kept_neurons_touches_no_other_weight() -> None:
    # The bf16 dot product takes pairs: the partner of the last one must be a zero.
    z = torch.full((8, 1024), -1.0, dtype=torch.bfloat16)
    z[:, 511] = 2.0
    w = torch.full((1024, 128), float("inf"), dtype=torch.bfloat16)
    w[511] = 1.0
    assert torch.equal(run(z, w, "relu2"), torch.full((8, 128), 4.0).bfloat16())


def test_rows_far_apart_in_memory() -> None:
    z, w = random_case(40, 300, 70, torch.float32, density=0.1)
    wide_z, wide_w = torch.zeros(40, 1000), torch.zeros(300, 999)
    wide_z[:, 100:400], wide_w[:, 5:75] = z, w
    check(z, w, "relu2", run(wide_z[:, 100:400], wide_w[:, 5:75], "relu2"))
    check(z, w, "relu2", run(z.t().contiguous().t(), w.t().contiguous().t(), "relu2"))
