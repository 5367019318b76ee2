"""Results of one element: Inductor stores to them without the mask of a template."""

from __future__ import annotations

import re
from collections.abc import Iterator

import fake_cuda
import pytest
import torch
from torch import Tensor
from triton_interpreter import Interpreter

from inductor_sparse import formats, ops

pytest.importorskip("triton")

OPS = torch.ops.inductor_sparse
BF16, INT8 = torch.bfloat16, torch.int8


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


def meta(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def test_the_scale_of_a_single_row_is_its_own(interpreter: Interpreter) -> None:
    # 63 rows more have metadata, and no scale.
    M, K, way = 1, 128, ("relu2", "largest", INT8)
    code = fake_cuda.generate(
        lambda x: OPS.sparsify24_quantized(x, *way), meta(M, K)
    ).code
    ((name, text),) = fake_cuda.triton_sources(code).items()
    x = torch.randn(M, K).to(BF16)
    values = torch.ones(formats.values_shape(M, K), dtype=INT8)
    words = torch.zeros(formats.metadata_shape(M, K), dtype=torch.int32)
    (scales,) = re.findall(r"empty_strided_cuda\(\((\d+), \), .*float32\)", code)
    left = interpreter.run(
        text, name, (64, 1, 1), x, values, words, torch.full((int(scales),), -1.0)
    )
    expected = ops.sparsify24_quantized(x, *way)
    assert torch.equal(left[1], expected[0])
    assert torch.equal(left[2], expected[1])
    assert torch.equal(left[3][:M], expected[2])


def test_a_single_result_is_computed_by_the_op() -> None:
    w_scale = meta(96, dtype=torch.float32)
    spmm = [(meta(1, 96), meta(96, 1)), (meta(1, 1, 96), meta(1, 96, 1))]
    for z, w in spmm:
        made = fake_cuda.generate(lambda z, w: OPS.activation_spmm(z, w, "relu"), z, w)
        assert made.triton_kernels == ()
    made = fake_cuda.generate(
        lambda z, w, s: OPS.activation_spmm(z, w, "relu", None, s),
        *(meta(1, 96), meta(96, 1, dtype=INT8), w_scale),
    )
    assert made.triton_kernels == ()
    for F, N in ((1, 64), (64, 1)):
        made = fake_cuda.generate(
            lambda *operands: OPS.glu_spmm(*operands, "relu"),
            *(meta(1, F), meta(1, 32), meta(F, 32), meta(F, N)),
        )
        assert made.triton_kernels == ()


def test_several_results_of_one_row_or_column_are_not() -> None:
    for z, w in ((meta(1, 96), meta(96, 2)), (meta(2, 96), meta(96, 1))):
        made = fake_cuda.generate(lambda z, w: OPS.activation_spmm(z, w, "relu"), z, w)
        assert len(made.triton_kernels) == 2
