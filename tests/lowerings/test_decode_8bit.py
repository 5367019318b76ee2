"""Decode with rows of 8 bits: interpreted, against the reference, and as generated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import decode_kernels
import fake_cuda
import pytest
import torch
from decode_kernels import Interpreter
from torch import Tensor

from inductor_sparse import reference
from inductor_sparse.lowerings import activation_spmm_cuda

OPS = torch.ops.inductor_sparse
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INT8, E4M3 = torch.int8, torch.float8_e4m3fn
TOKENS = {1: 1, 2: 2, 3: 4, 8: 8, 17: 8}


@pytest.fixture(scope="module")
def interpret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    with decode_kernels.interpreter(tmp_path_factory.mktemp("kernels")) as made:
        yield made


def sparse(*size: int, dtype: torch.dtype = FP32) -> Tensor:
    z = torch.rand(size) + 0.1
    return torch.where(torch.rand(size) < 0.3, z, -z).to(dtype)


def rows(K: int, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of very different magnitudes, and their scales."""
    return reference.quantize_rows(torch.randn(K, N) * torch.rand(K, 1) ** 4, dtype)


def check(
    interpret: Interpreter,
    z: Tensor,
    weight: tuple[Tensor, Tensor],
    activation: str = "relu",
    **tile: int,
) -> Tensor:
    """The product is that of the reference, but for a few roundings."""
    w, scale = weight
    a = reference.activation(z, activation)
    exact = reference.activation_spmm(a.double(), w, "identity", scale)
    tile = {"TOKENS": TOKENS[len(z)], **tile}
    run = decode_kernels.run_spmm
    y = interpret(run, z, w, activation, w_scale=scale, **tile)
    # The interpreter rounds to bfloat16 towards zero: 2 roundings of a square.
    ulps = 16 if z.dtype == FP32 else 2
    finite = exact.isfinite()
    assert torch.equal(finite, y.isfinite())
    limit = ulps * torch.finfo(z.dtype).eps * exact.nan_to_num(0, 0, 0).abs().max()
    assert ((y.double() - exact)[finite].abs() <= limit).all()
    return y


KINDS = [(INT8, FP32, "relu2"), (INT8, FP16, "relu"), (E4M3, BF16, "identity")]


@pytest.mark.parametrize(("dtype", "z_dtype", "activation"), KINDS)
@pytest.mark.parametrize(("M", "dot"), [(1, 0), (2, 0), (8, 0), (3, 1), (17, 1)])
def test_product(
    interpret: Interpreter,
    M: int,
    dot: int,
    dtype: torch.dtype,
    z_dtype: torch.dtype,
    activation: str,
) -> None:
    torch.manual_seed(M)
    z = sparse(M, 123, dtype=z_dtype)
    z[:, ::3] = 0.0
    check(interpret, z, rows(123, 45, dtype), activation, DOT=dot)


@pytest.mark.parametrize(("M", "dot"), [(1, 0), (3, 0), (3, 1)])
def test_zeros_touch_neither_row_nor_scale(
    interpret: Interpreter, M: int, dot: int
) -> None:
    torch.manual_seed(0)
    z, (w, scale) = sparse(M, 100), rows(100, 40, E4M3)
    scale[7], scale[8] = torch.nan, torch.inf
    w[9, 5] = torch.nan
    z[:, 7:10] = -1.0
    assert check(interpret, z, (w, scale), DOT=dot).isfinite().all()
    z[M - 1, 7:10] = 1.0
    y = check(interpret, z, (w, scale), DOT=dot)
    assert y[M - 1].isnan().all()
    assert y[: M - 1].isfinite().all()


def test_tensor_cores_get_all_bits_of_a_scaled_activation(
    interpret: Interpreter,
) -> None:
    # The product has 18 significant bits, and what is multiplied is given 11 here.
    z, scale = torch.full((4, 16), 1 + 2.0**-7), torch.full((16,), 1 + 2.0**-10)
    how = {"w_scale": scale, "dot_dtype": "float16", "TOKENS": 4, "DOT": True}
    w = torch.ones(16, 32, dtype=INT8)
    y = interpret(decode_kernels.run_spmm, z.to(BF16), w, "relu", **how)
    assert torch.equal(y, torch.full((4, 32), 16 * (1 + 2.0**-7) * (1 + 2.0**-10)))


def meta(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def generate(
    M: int, dtype: torch.dtype, z_dtype: torch.dtype = BF16, K: int = 14336, **how: int
) -> fake_cuda.Generated:
    """``relu2(z) @ w`` with a residual, for K = 14336 and N = 4096."""

    def fn(z: Tensor, w: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "relu2", None, scale) + residual

    tensors = (meta(M, K, dtype=z_dtype), meta(K, 4096, dtype=dtype))
    residual = meta(M, 4096, dtype=z_dtype)
    return fake_cuda.generate(fn, *tensors, meta(K, dtype=FP32), residual, **how)


# On Hopper every number of tokens; elsewhere each dtype that there is.
COMPILED = [((9, 0), M, INT8, BF16) for M in (1, 2, 4, 8)]
COMPILED += [((9, 0), M, E4M3, dtype) for M in (1, 8) for dtype in (FP16, FP32)]
COMPILED += [((8, 0), 1, INT8, BF16), ((8, 0), 2, INT8, FP32), ((8, 0), 8, INT8, FP16)]
COMPILED += [((8, 9), 1, E4M3, BF16), ((8, 9), 2, E4M3, FP16), ((8, 9), 8, INT8, BF16)]
COMPILED += [((10, 0), 1, INT8, BF16), ((10, 0), 2, E4M3, FP32)]
COMPILED += [((8, 6), 4, INT8, BF16), ((12, 0), 4, E4M3, BF16)]


@pytest.mark.parametrize(("capability", "M", "dtype", "z_dtype"), COMPILED)
def test_nothing_is_spilled(
    capability: tuple[int, int],
    M: int,
    dtype: torch.dtype,
    z_dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    made = generate(M, dtype, z_dtype, capability=capability)
    kernels = fake_cuda.compile_triton(made, tmp_path, capability)
    assert len(made.kernels) == len(kernels) == 2
    # Sums of 8 tokens in float32 take all registers: compilers differ by a few of them.
    tight = M == 8 and z_dtype == FP32
    assert max(kernel.local for kernel in kernels.values()) <= (32 if tight else 0)


def test_rows_are_loaded_in_8_bits_and_the_residual_is_fused() -> None:
    made = generate(4, INT8)
    first, second = made.triton_kernels
    sources = fake_cuda.triton_sources(made.code)
    assert "'arg_W': '*i8'" in sources[first]
    assert sources[first].count("tl.dot") == 2
    assert "arg_SCALE" not in sources[second]


def test_an_unknown_number_of_tokens() -> None:
    assert len(generate(7, INT8, dynamic=7).kernels) == 2


def test_without_e4m3_the_op_itself_runs() -> None:
    made = generate(1, E4M3, capability=(8, 0))
    assert "activation_spmm.default" in made.code
    assert not any("sums_of_share" in s for s in made.triton_kernels)


def test_the_text_for_wide_rows_knows_no_scale() -> None:
    def fn(z: Tensor, w: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "relu2")

    code = fake_cuda.generate(fn, meta(4, 96), meta(96, 80)).code
    assert "SCALE" not in code
    assert "sums = tl.dot(a.to(DOT_DTYPE), w.to(DOT_DTYPE), sums)" in code


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, None])
def test_a_tile_of_8_bit_rows(tokens: int | None) -> None:
    tile = activation_spmm_cuda.choose_tile(tokens, 9216, 4096, BF16, 132, scaled=True)
    wide = activation_spmm_cuda.choose_tile(tokens, 9216, 4096, BF16, 132)
    assert tile.BN // tile.num_warps == (64 if tile.DOT else 256)
    assert tile.DOT == wide.DOT
    assert wide.BN // wide.num_warps == (128 if tile.DOT else 256)
