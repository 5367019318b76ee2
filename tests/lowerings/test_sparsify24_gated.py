"""The kernels that pack, interpreted, on a gate and what that is multiplied by."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from packing_kernels import (
    FORMATS,
    assert_quantized,
    awkward,
    quantizable,
    same_bits,
    select,
)
from triton_interpreter import Interpreter

from inductor_sparse import ops, reference
from inductor_sparse.runtime import sparsify24_cuda

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


GATED = (("relu2", "largest_abs"), ("relu", "largest_abs"), ("identity", "largest"))


@pytest.mark.parametrize(
    ("way", "dtype"), list(zip(GATED, sparsify24_cuda.DTYPES, strict=True)), ids=str
)
def test_sparsify24_of_a_gated_product(
    interpreter: Interpreter, way: tuple[str, str], dtype: torch.dtype
) -> None:
    for M, K in ((1, 1), (63, 66), (64, 128)):
        x, up = awkward(M, K, dtype), awkward(K, M, dtype).t()
        values, metadata, energy = select(interpreter, x, *way, up=up)
        expected = ops.sparsify24(x, *way, up=up)
        assert torch.equal(metadata, expected[1])
        assert same_bits(values, expected[0])
    assert energy.sum(0).isnan().all()


@pytest.mark.parametrize(
    ("source", "K", "way", "whole", "dtype"),
    [
        (torch.bfloat16, 130, GATED[0], True, FORMATS[1]),
        (torch.float16, 65, GATED[1], False, FORMATS[0]),
        (torch.float32, 66, GATED[2], True, FORMATS[0]),
    ],
    ids=str,
)
def test_sparsify24_quantized_of_a_gated_product(
    interpreter: Interpreter,
    source: torch.dtype,
    K: int,
    way: tuple[str, str],
    whole: bool,
    dtype: torch.dtype,
) -> None:
    x, up = quantizable(K, source), awkward(9, 2 * K, source, finite=True)[:, ::2]
    assert_quantized(interpreter, x, way, whole, dtype, up)


def test_energy_of_a_gated_product(interpreter: Interpreter) -> None:
    x, up = (awkward(70, K, torch.bfloat16, finite=True) for K in (130, 260))
    up = up[:, :130]
    values, _, energy = select(interpreter, x, "relu2", "largest_abs", up=up)
    product = (reference.activation(x, "relu2") * up).double()
    expected = torch.stack((values.double().square().sum(), product.square().sum()))
    torch.testing.assert_close(energy.sum(0), expected, rtol=1e-6, atol=0)
