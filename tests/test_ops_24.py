"""The registered 2:4 ops and row quantization: schemas, fakes, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from inductor_sparse import formats, ops, reference
from inductor_sparse.errors import SparseError, SparseShapeError

sparse = torch.ops.inductor_sparse
E4M3, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
UTILS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def energy() -> Tensor:
    return torch.zeros(ops.ENERGY_SLOTS, 2, dtype=torch.float64)


def sample(name: str) -> tuple[Any, ...]:
    """Arguments for an op, by the name of a case."""
    x = randn(9, 70, dtype=BF16)
    w1, bias = randn(66, 70, dtype=BF16), randn(66, dtype=BF16)
    return {
        "sparsify24": (x, "relu2", "largest", energy()),
        "sparsify24 gated": (x, "relu2", "largest_abs", None, x + 1),
        "sparsify24_quantized e4m3": (x, "relu", "largest", E4M3),
        "sparsify24_quantized gated": (x, "relu", "largest_abs", INT8, energy(), x - 1),
        "sparsify24_quantized int8": (x, "identity", "largest_abs", INT8, energy()),
        "linear_sparsify24": (x, w1, None, "relu2", "largest"),
        "linear_sparsify24 bias": (x, w1, bias, "relu", "largest", energy()),
        "quantize_rows e4m3": (x, E4M3),
        "quantize_rows int8": (x, INT8),
        "site_energy": (x, "site"),
    }[name]


CASES = (
    "sparsify24",
    "sparsify24 gated",
    "sparsify24_quantized gated",
    "sparsify24_quantized e4m3",
    "sparsify24_quantized int8",
    "linear_sparsify24",
    "linear_sparsify24 bias",
    "quantize_rows e4m3",
    "quantize_rows int8",
    "site_energy",
)


def op_of(name: str) -> Any:
    return getattr(sparse, name.split()[0])


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(op_of(name).default, sample(name), test_utils=UTILS)


@pytest.mark.parametrize("dtype", [INT8, E4M3], ids=str)
def test_opcheck_of_an_8_bit_product(dtype: torch.dtype) -> None:
    values, metadata, row = ops.sparsify24_quantized(
        randn(9, 70), "relu", "largest", dtype
    )
    w, col = reference.quantize_rows(randn(3, 70), dtype)
    arguments = (values, metadata, w.T, row, col)
    # The schema check multiplies its inputs, which torch cannot do in e4m3.
    utils = UTILS if dtype == INT8 else UTILS[1:]
    for out_dtype in (None, torch.float32):
        options = {"out_dtype": out_dtype}
        op = sparse.sparse24_mm.default
        torch.library.opcheck(op, arguments, options, test_utils=utils)


@pytest.mark.parametrize("name", [case for case in CASES if case != "site_energy"])
def test_no_op_of_these_has_a_gradient(name: str) -> None:
    arguments = [
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.dtype == BF16 else a
        for a in sample(name)
    ]
    results = op_of(name)(*arguments)
    wide = next((r for r in results if r.requires_grad), None)
    assert wide is not None
    with pytest.raises(SparseError, match=f"{name.split()[0]} has no gradient"):
        wide.float().sum().backward()


def test_a_linear_layer_is_packed_as_two_ops_would() -> None:
    x, w1, bias, *way = sample("linear_sparsify24 bias")
    values, metadata = sparse.linear_sparsify24(x, w1, bias, *way)
    z = torch.nn.functional.linear(x, w1, bias)
    expected = sparse.sparsify24(z, *way)
    assert torch.equal(values, expected[0])
    assert torch.equal(metadata, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_a_gate_is_multiplied_as_eager_would(
    activation: str, dtype: torch.dtype
) -> None:
    x, up = randn(9, 70, dtype=dtype), randn(70, 9, dtype=dtype).t()
    product = reference.activation(x, activation) * up
    for quantized in ((), (INT8,)):
        op = sparse.sparsify24_quantized if quantized else sparse.sparsify24
        found = op(x, activation, "largest_abs", *quantized, up=up)
        expected = op(product, "identity", "largest_abs", *quantized)
        assert all(map(torch.equal, found, expected))


def test_quantized_metadata_has_the_layout_of_8_bits() -> None:
    x = randn(70, 130)
    values, metadata, scale = sparse.sparsify24_quantized(x, "relu2", "largest", INT8)
    _, index = reference.sparsify24(x, "relu2", "largest")
    assert torch.equal(formats.unpack_index(metadata, 70, INT8), index)
    dense = formats.unpack(values, metadata, 130) * scale[:, None]
    kept = formats.unpack(*sparse.sparsify24(x, "relu2", "largest"), 130)
    assert ((dense - kept).abs() <= scale[:, None] * 0.501).all()


def test_energies_are_new_at_every_call() -> None:
    first, second = (ops.site_energy(torch.zeros(2), "a") for _ in range(2))
    assert first.dtype == torch.float64
    assert first.shape == (ops.ENERGY_SLOTS, len(ops.ENERGY))
    assert first.data_ptr() != second.data_ptr()


def test_fakes_have_symbolic_sizes() -> None:
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env, static_shapes=False) as mode:
        x = mode.from_tensor(torch.empty(20, 96, dtype=BF16))
        M = x.shape[0]
        values, metadata, scale = sparse.sparsify24_quantized(
            x, "relu", "largest", E4M3
        )
        assert (values.shape, values.dtype) == ((M, 64), E4M3)
        assert metadata.shape == ((M + 63) // 64, 2, 128)
        assert (scale.shape, scale.dtype) == ((M,), torch.float32)
        w = torch.empty(8, 96, dtype=E4M3).T
        y = sparse.sparse24_mm(values, metadata, w, scale)
        assert (y.shape, y.dtype) == ((M, 8), BF16)
        w1 = torch.empty(130, 96, dtype=BF16)
        packed = sparse.linear_sparsify24(x, w1, None, "relu2", "largest")
        assert packed[0].shape == (M, 96)
        assert packed[1].shape == ((M + 63) // 64, 3, 128)
        assert sparse.quantize_rows(x, INT8)[0].shape == (M, 96)
    assert not [g for g in shape_env.guards if M.node.expr in g.expr.free_symbols]


X, W1 = torch.zeros(2, 4), torch.zeros(6, 4)
REFUSED: list[tuple[str, tuple[Any, ...], str]] = [
    ("quantize_rows", (X, torch.float16), "dtype is torch.float16; use one of"),
    ("quantize_rows", (X[0], INT8), "x has shape (4,), expected [M, K]"),
    ("quantize_rows", (X.to(INT8), INT8), "x is torch.int8, supported are"),
    (
        "sparsify24_quantized",
        (X, "relu", "largest", BF16),
        "sparsify24_quantized: dtype is torch.bfloat16; use one of "
        "torch.float8_e4m3fn, torch.int8",
    ),
    ("sparsify24_quantized", (X, "gelu", "largest", INT8), "unknown activation"),
    ("sparsify24_quantized", (X, "relu", "top", INT8), "unknown select 'top'"),
    (
        "sparsify24",
        (X, "relu", "largest", torch.zeros(256, 2)),
        "energy is torch.float32, expected torch.float64; take it from",
    ),
    (
        "sparsify24",
        (X, "relu", "largest", torch.zeros(2, dtype=torch.float64)),
        "energy has shape (2,), expected [256, 2]",
    ),
    (
        "sparsify24",
        (X, "relu", "largest_abs", None, X[:1]),
        "up has shape (1, 4), expected [2, 4]",
    ),
    (
        "sparsify24_quantized",
        (X, "relu", "largest_abs", INT8, None, X.bfloat16()),
        "dtypes differ (x torch.float32, up torch.bfloat16)",
    ),
    (
        "linear_sparsify24",
        (X, W1, None, "relu", "largest", torch.zeros(2, 256, dtype=torch.float64).t()),
        "energy has strides (1, 256), expected a contiguous tensor; take it from",
    ),
    ("linear_sparsify24", (X, W1[:, :3], None, "relu", "largest"), "expected [K, 4]"),
    (
        "linear_sparsify24",
        (X, W1, torch.zeros(5), "relu", "largest"),
        "bias has shape (5,), expected [6]",
    ),
    (
        "linear_sparsify24",
        (X, W1.double(), None, "relu", "largest"),
        "dtypes differ (x torch.float32, w1 torch.float64)",
    ),
]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_refused(
    name: str, arguments: tuple[Any, ...], message: str, traced: bool
) -> None:
    if traced:
        mode = FakeTensorMode()
        arguments = tuple(
            mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments
        )
    with pytest.raises(SparseShapeError) as error:
        getattr(sparse, name)(*arguments)
    assert message in str(error.value)


def test_a_product_of_two_dtypes_is_refused() -> None:
    values, metadata, _ = ops.sparsify24_quantized(X, "relu", "largest", INT8)
    w = torch.zeros(4, 3)
    with pytest.raises(SparseShapeError, match=r"values torch.int8, w torch.float32"):
        sparse.sparse24_mm(values, metadata, w)
    with pytest.raises(SparseShapeError, match=r"out_dtype is torch.int32; use one of"):
        sparse.sparse24_mm(values, metadata, w.to(INT8), out_dtype=torch.int32)
