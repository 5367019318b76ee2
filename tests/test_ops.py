"""The registered ops: schemas, fakes and gradients."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_within_budget
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from inductor_sparse import formats, ops, reference
from inductor_sparse.errors import SparseError

sparse = torch.ops.inductor_sparse
UTILS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
DIFFERENTIABLE = (
    "activation_spmm",
    "activation_spmm_3d",
    "glu_spmm",
    "row_major_weight",
)


def randn(
    *shape: int, dtype: torch.dtype = torch.float64, grad: bool = False
) -> Tensor:
    """The same numbers for the same shape; never close to the kink of ReLU at zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.where(x.abs() < 0.05, 0.5, x).to(dtype)
    return x.requires_grad_(grad)


def sample(name: str, **kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """An op and arguments for it; ``kind`` is given to every floating tensor."""
    if name == "activation_spmm":
        return sparse.activation_spmm, (
            randn(5, 8, **kind),
            randn(8, 3, **kind),
            "relu2",
        )
    if name == "activation_spmm_3d":
        tensors = randn(2, 5, 8, **kind), randn(2, 8, 3, **kind)
        return sparse.activation_spmm, (*tensors, "relu")
    if name == "glu_spmm":
        sizes = ((4, 7), (4, 5), (7, 5), (7, 6))
        return sparse.glu_spmm, (*(randn(*size, **kind) for size in sizes), "relu")
    if name == "row_major_weight":
        dtype = kind["dtype"]
        return sparse.row_major_weight, (randn(4, 6, **kind), [6, 4], [1, 6], 0, dtype)
    x = randn(9, 70, **kind)
    if name == "sparsify24":
        return sparse.sparsify24, (x, "relu2", "largest")
    packed = ops.sparsify24(x, "relu", "largest")
    scales = randn(9, **kind), randn(3, **kind)
    return sparse.sparse24_mm, (*packed, randn(70, 3, **kind), *scales)


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "sparsify24", "sparse24_mm"])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op, args = sample(name, dtype=dtype)
    torch.library.opcheck(op.default, args, test_utils=UTILS)


# torch 2.15's own check asks its inputs for gradients that they do not keep.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name: str, dtype: torch.dtype) -> None:
    op, args = sample(name, dtype=dtype, grad=True)
    torch.library.opcheck(op.default, args, test_utils=UTILS)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_in_float64(name: str) -> None:
    op, args = sample(name, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


def dense_spmm(z: Tensor, w: Tensor, activation: str) -> Tensor:
    return reference.ACTIVATIONS[activation](z) @ w


def dense_glu(
    gate: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, activation: str
) -> Tensor:
    return (reference.ACTIVATIONS[activation](gate) * (x @ w_up.mT)) @ w_down


def gradients(fn: Callable[..., Tensor], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    out = fn(*args)
    return torch.autograd.grad(out, leaves, randn(*out.shape, dtype=out.dtype))


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize(
    ("op", "dense", "sizes"),
    [
        (sparse.activation_spmm, dense_spmm, ((6, 64), (64, 5))),
        (sparse.activation_spmm, dense_spmm, ((2, 6, 64), (2, 64, 5))),
        (sparse.glu_spmm, dense_glu, ((6, 64), (6, 40), (64, 40), (64, 5))),
    ],
    ids=["spmm", "spmm 3d", "glu"],
)
def test_gradients_are_those_of_the_dense_graph(
    op: Any,
    dense: Callable[..., Tensor],
    sizes: tuple[tuple[int, ...], ...],
    activation: str,
    dtype: torch.dtype,
) -> None:
    args = (*(randn(*size, dtype=dtype, grad=True) for size in sizes), activation)
    wide = tuple(
        arg.detach().double().requires_grad_() if isinstance(arg, Tensor) else arg
        for arg in args
    )
    results = (gradients(fn, args) for fn in (op, dense))
    for actual, expected, exact in zip(*results, gradients(dense, wide), strict=True):
        assert_within_budget(actual, expected, exact)


@pytest.mark.parametrize("needed", range(4))
def test_only_the_gradients_asked_for_are_computed(needed: int) -> None:
    op, args = sample("glu_spmm", dtype=torch.float64)
    args[needed].requires_grad_()
    (actual,) = gradients(op, args)
    (expected,) = gradients(dense_glu, args)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_gradient_at_zero_and_nan_is_that_of_eager(activation: str) -> None:
    z = torch.tensor([[0.0, -0.0, math.nan, math.inf, -1.0]], requires_grad=True)
    w = torch.tensor([[math.inf, 1.0, 1.0, 1.0, math.nan]]).T
    (actual,) = gradients(sparse.activation_spmm, (z, w, activation))
    (expected,) = gradients(dense_spmm, (z, w, activation))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


BASE = torch.arange(60.0, dtype=torch.float64)


@pytest.mark.parametrize(
    ("weight", "window"),
    [
        (BASE.view(6, 10), ([10, 6], [1, 10], 0)),
        (BASE.view(3, 4, 5), ([5, 3, 4], [1, 20, 5], 0)),
        (BASE.view(6, 10).T, ([6, 10], [10, 1], 0)),
        (BASE.view(1, 60), ([60, 1], [1, 1], 0)),
        (BASE[10:50].view(4, 10), ([10, 2], [1, 10], 20)),
        (BASE.view(6, 10)[:, 2:8], ([6, 3], [10, 1], 3)),
        (BASE.view(6, 10), ([3, 6, 10], [0, 10, 1], 0)),
        (BASE.view(6, 10), ([5, 4], [2, 3], 1)),
        (BASE[:10].expand(6, 10), ([10, 6], [1, 0], 0)),
        (BASE.as_strided((8, 4), (2, 1)), ([4, 8], [1, 2], 0)),
        (BASE.view(6, 10), ([6], [10], 0)),
        (BASE.view(6, 10), ([0, 10], [10, 1], 0)),
        (BASE[:1].view(()), ([], [], 0)),
    ],
    ids=[
        "transpose", "permute", "back to row-major", "sizes of one",
        "rows of a flat buffer", "columns", "expanded window", "overlapping window",
        "expanded weight", "overlapping weight", "one column", "empty", "scalar",
    ],
)  # fmt: skip
def test_row_major_weight_gradient_is_that_of_as_strided(
    weight: Tensor, window: tuple[list[int], list[int], int]
) -> None:
    size, stride, offset = window

    def as_strided(w: Tensor) -> Tensor:
        return w.as_strided(size, stride, w.storage_offset() + offset)

    leaf = weight.detach().requires_grad_()
    assert leaf.stride() == weight.stride()
    copy = sparse.row_major_weight(leaf, *window, torch.float64)
    assert torch.equal(copy, as_strided(weight))
    # Multiples of 12: sums and shares of up to 4 or 6 are exact in any order.
    grad = 12 * torch.arange(copy.numel(), dtype=torch.float64).view(size)
    (actual,) = torch.autograd.grad(copy, leaf, grad)
    (expected,) = torch.autograd.grad(as_strided(leaf), leaf, grad)
    assert torch.equal(actual, expected)


def test_row_major_weight_gradient_has_the_dtype_of_the_weight() -> None:
    weight = randn(4, 6, dtype=torch.float32, grad=True)
    copy = sparse.row_major_weight(weight, [6, 4], [1, 6], 0, torch.bfloat16)
    (grad,) = torch.autograd.grad(copy, weight, torch.ones_like(copy))
    assert torch.equal(grad, torch.ones(4, 6))


@pytest.mark.parametrize("name", ["sparsify24", "sparse24_mm"])
def test_ops_without_a_gradient_say_so(name: str) -> None:
    op, args = sample(name, dtype=torch.float32)
    args = tuple(
        arg.requires_grad_()
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for arg in args
    )
    out = op(*args)
    out = out if isinstance(out, Tensor) else out[0]
    with pytest.raises(SparseError, match=f"{name} has no gradient; .*activation_spmm"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
def test_sparse24_mm_against_float64(dtype: torch.dtype) -> None:
    M, K, N = 70, 100, 9
    x, w = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype).T
    row, col = randn(M, dtype=torch.float32), randn(N, dtype=torch.float32)
    values, metadata = sparse.sparsify24(x, "relu", "largest")
    kept = formats.unpack(values, metadata, K)
    exact = kept.double() @ w.double()
    assert_within_budget(sparse.sparse24_mm(values, metadata, w), kept @ w, exact)
    scaled = sparse.sparse24_mm(values, metadata, w, row, col)
    dense = (row[:, None] * (kept @ w) * col).to(dtype)
    assert_within_budget(scaled, dense, row.double()[:, None] * exact * col.double())
    by_column = sparse.sparse24_mm(values, metadata, w, col_scale=col)
    assert_within_budget(by_column, (kept @ w * col).to(dtype), exact * col.double())


def test_sparsify24_keeps_a_tensor_that_is_24_already() -> None:
    x = torch.relu(randn(65, 66, dtype=torch.bfloat16)) * (torch.arange(66) % 4 > 1)
    values, metadata = sparse.sparsify24(x, "identity", "largest")
    assert torch.equal(formats.unpack(values, metadata, 66), x)
    assert sparse.sparsify24(x.fill_(1), "relu", "largest")[1].eq(0x44444444).all()


def test_fakes_have_symbolic_sizes() -> None:
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env, static_shapes=False) as mode:
        z = mode.from_tensor(torch.empty(20, 96))
        w = torch.empty(96, 8)
        M = z.shape[0]
        y = sparse.activation_spmm(z, w, "relu2")
        values, metadata = sparse.sparsify24(z, "relu2", "largest")
        assert y.shape == (M, 8)
        assert sparse.glu_spmm(z, y, torch.empty(96, 8), w, "relu").shape == (M, 8)
        assert sparse.sparse24_mm(values, metadata, w).shape == (M, 8)
        assert values.shape == (M, 64)
        assert metadata.shape == ((M + 63) // 64, 2, 128)
        assert metadata.dtype == torch.int32
    assert not [
        guard for guard in shape_env.guards if M.node.expr in guard.expr.free_symbols
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fakes_stay_on_the_device(device: str) -> None:
    with FakeTensorMode():
        z = torch.empty(3, 64, device=device, dtype=torch.bfloat16)
        w = torch.empty(64, 5, device=device, dtype=torch.bfloat16)
        y = sparse.activation_spmm(z, w, "relu")
        copy = sparse.row_major_weight(w, [5, 64], [1, 5], 0, torch.float32)
        assert (y.device.type, y.dtype, tuple(y.shape)) == (device, z.dtype, (3, 5))
        assert (copy.device.type, copy.dtype) == (device, torch.float32)
        assert copy.stride() == (64, 1)


def test_importing_again_keeps_the_ops() -> None:
    before = sparse.activation_spmm.default
    importlib.reload(ops)
    assert torch.ops.inductor_sparse.activation_spmm.default is before
    assert before(torch.ones(1, 2), torch.ones(2, 1), "relu").item() == 2.0


OVERRIDE = """
import torch
from inductor_sparse import ops, reference

def kernel(weight, *window):
    return 2 * reference.row_major_weight(weight, *window)

library = torch.library.Library("inductor_sparse", "IMPL")
library.impl("row_major_weight", kernel, "CPU")
weight = torch.ones(2, 3, requires_grad=True)
op = torch.ops.inductor_sparse.row_major_weight
copy = op(weight, [3, 2], [1, 3], 0, weight.dtype)
copy.sum().backward()
print(copy.tolist(), weight.grad.tolist())
"""


def test_a_kernel_for_a_device_wins_over_the_default_and_keeps_the_gradient() -> None:
    command = [sys.executable, "-W", "error", "-c", OVERRIDE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"{[[2.0] * 2] * 3} {[[1.0] * 3] * 2}"
