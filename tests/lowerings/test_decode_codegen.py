"""Decode kernels as Inductor generates them: fused, and compiled for several GPUs."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import decode_kernels
import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_sparse.passes import base
from inductor_sparse.profitability import cuda

OPS = torch.ops.inductor_sparse
RESIDENT = 65536 // (16 * 32)
"""Registers of a thread that leave room for the 16 warps that tiles count on."""
PREDICATES = 16
"""Bytes of stack in which the assembler keeps predicates: there are only seven."""


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def gated(M: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    sizes = ((M, 14336), (M, 4096), (14336, 4096), (14336, 4096))
    return tuple(meta(*size, dtype=dtype) for size in sizes)


def test_what_follows_is_done_where_the_splits_are_added_up() -> None:
    def fn(z: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = OPS.activation_spmm(z, w, "relu2") + bias
        return F.gelu(y) * 2 + residual

    made = fake_cuda.generate(fn, meta(2, 96), meta(96, 80), meta(80), meta(2, 80))
    assert len(made.kernels) == 2
    first, second = made.triton_kernels
    sources = fake_cuda.triton_sources(made.code)
    assert "erf" not in sources[first]
    assert "erf" in sources[second]


def test_three_dimensions_behind_a_view() -> None:
    def fn(z: Tensor, w: Tensor, residual: Tensor) -> Tensor:
        y = OPS.activation_spmm(z.view(-1, 96), w, "relu")
        return y.view(2, 1, 80) + residual

    made = fake_cuda.generate(fn, meta(2, 1, 96), meta(96, 80), meta(2, 1, 80))
    assert len(made.kernels) == 2


def test_a_gated_product_is_three_kernels() -> None:
    def fn(*tensors: Tensor) -> Tensor:
        *operands, residual = tensors
        return OPS.glu_spmm(*operands, "relu") + residual

    tensors = (*gated(1, torch.bfloat16), meta(1, 4096))
    assert len(fake_cuda.generate(fn, *tensors).kernels) == 3


def test_a_batch_and_an_unknown_number_of_tokens_are_two_kernels_each() -> None:
    def fn(z: Tensor, w: Tensor, other: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "relu") * other

    batch = fake_cuda.generate(fn, meta(3, 2, 96), meta(3, 96, 80), meta(3, 2, 80))
    assert len(batch.kernels) == 2
    tokens = fake_cuda.generate(
        fn, meta(7, 96), meta(96, 80), meta(7, 80), dynamic=(7,)
    )
    assert len(tokens.kernels) == 2


def test_other_operands_call_the_op() -> None:
    def fn(z: Tensor, w: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "relu")

    double = torch.float64
    made = fake_cuda.generate(fn, meta(1, 96, dtype=double), meta(96, 80, dtype=double))
    assert made.kernels == ()
    assert "activation_spmm.default" in made.code


def test_more_rows_than_a_grid_may_have_call_the_op() -> None:
    def fn(z: Tensor, w: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "relu")

    def kernels(*size: int) -> int:
        w = meta(*size[:-1], 96, 80)
        return len(fake_cuda.generate(fn, meta(*size, 96), w).kernels)

    assert (kernels(65535), kernels(65536)) == (2, 0)
    assert (kernels(13107, 5), kernels(16384, 4)) == (2, 0)


def rows_and_guards(made: fake_cuda.Generated) -> tuple[Any, list[str]]:
    """The most rows there may be of the only symbolic size, and what is guarded."""
    shape_env = made.graph.sizevars.shape_env
    (symbol,) = shape_env.var_to_range
    guards = [str(guard.expr) for guard in shape_env.guards]
    return shape_env.bound_sympy(symbol).upper, guards


@pytest.mark.parametrize(("M", "kernels"), [(7, 2), (65535, 2), (65536, 0)])
def test_a_symbolic_number_of_rows_stays_on_its_side_of_the_limit(
    M: int, kernels: int
) -> None:
    def fn(z: Tensor, w: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "relu")

    made = fake_cuda.generate(fn, meta(M, 96), meta(96, 80), dynamic=M)
    upper, guards = rows_and_guards(made)
    assert len(made.kernels) == kernels
    # The tile is not that of as many rows as there may be.
    assert made.code.count("SPLITS : tl.constexpr = 3") == kernels
    assert len(guards) == 1
    assert (upper == 65535) == bool(kernels)


def test_the_rows_of_all_batches_count() -> None:
    def fn(z: Tensor, w: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "relu")

    made = fake_cuda.generate(fn, meta(7, 5, 96), meta(7, 96, 80), dynamic=7)
    upper, _ = rows_and_guards(made)
    assert (len(made.kernels), upper) == (2, 65535 // 5)


def test_a_decode_site_of_the_pass_needs_no_other_guard() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(torch.relu(x), w)

    # So large that four tokens gain even if nothing is known of their density.
    x, w = meta(3, 131072), meta(8192, 131072)
    how = {"options": {}, "inductor": {"triton.cudagraphs": True}}
    made = fake_cuda.generate(fn, x, w, dynamic=3, **how)
    upper, guards = rows_and_guards(made)
    assert [decision.op for decision in made.decisions] == ["activation_spmm"]
    assert sum("sums_of_share" in s for s in made.code.splitlines()) > 0
    assert upper <= 8
    assert not any("65535" in guard for guard in guards)


def test_rows_that_come_out_of_data_call_the_op() -> None:
    def fn(z: Tensor, rows: Tensor, w: Tensor) -> Tensor:
        return OPS.activation_spmm(z.expand(rows.item(), 96), w, "relu")

    rows = meta(1, dtype=torch.int64)
    made = fake_cuda.generate(fn, meta(1, 96), rows, meta(96, 80), dynamic=7)
    assert made.kernels == ()
    assert "activation_spmm.default" in made.code


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPILED = [((9, 0), M, dtype, False) for M in (1, 2, 4, 8) for dtype in (BF16, FP32)]
OTHERS = (8, 0), (8, 6), (8, 9), (10, 0), (12, 0)
COMPILED += [(capability, 4, BF16, False) for capability in OTHERS]
# With every architecture each dtype and each number of tokens, and these two together.
COMPILED += [((8, 0), 1, BF16, True), ((8, 0), 2, FP16, True), ((8, 0), 8, FP32, True)]
COMPILED += [((8, 9), 1, FP16, True), ((8, 9), 2, FP32, True), ((8, 9), 8, BF16, True)]
COMPILED += [
    ((10, 0), 1, FP32, True),
    ((10, 0), 2, BF16, True),
    ((10, 0), 8, FP16, True),
    ((9, 0), 8, FP16, True),
]


@pytest.mark.parametrize(("capability", "M", "dtype", "counted"), COMPILED)
def test_nothing_is_spilled(
    capability: tuple[int, int],
    M: int,
    dtype: torch.dtype,
    counted: bool,
    tmp_path: Path,
) -> None:
    def fn(x: Tensor, *tensors: Tensor) -> Tensor:
        counters = OPS.site_counters(x, "site") if counted else None
        return OPS.glu_spmm(*tensors, "relu", counters)

    operands = meta(M, 4096, dtype=dtype), *gated(M, dtype)
    made = fake_cuda.generate(fn, *operands, capability=capability)
    assert ("atomic_add" in made.code) == counted
    kernels = fake_cuda.compile_triton(made, tmp_path, capability)
    assert len(kernels) == 3
    spilled = {name: k.local for name, k in kernels.items() if k.local > PREDICATES}
    assert not spilled


@pytest.mark.parametrize(
    ("arch", "M", "dtype"),
    [
        *(("gfx942", M, BF16) for M in (1, 4)),
        *(("gfx942", 2, FP32), ("gfx942", 8, FP16), ("gfx942", 8, FP32)),
        *((arch, 4, BF16) for arch in ("gfx90a", "gfx950")),
    ],
)
def test_an_amd_gpu_is_compiled_for(
    arch: str,
    M: int,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    names = ["spmm", "total", "up"]
    code = decode_kernels.compile_for_amd(tmp_path, arch, M, dtype, names)
    assert list(code) == names
    for text in code.values():
        assert re.findall(r"vgpr_spill_count: *(\d+)", text) == ["0"]


@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_counting_keeps_warps_resident(
    M: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    def fn(x: Tensor, z: Tensor, w: Tensor, counted: bool) -> Tensor:
        counters = OPS.site_counters(x, "site", 0.5, M) if counted else None
        return OPS.activation_spmm(z, w, "relu2", counters)

    sizes = ((M, 4096), (M, 16384), (16384, 4096))
    tensors = [meta(*size, dtype=dtype) for size in sizes]
    kernels = []
    for counted in (False, True):
        generated = functools.partial(fn, counted=counted)
        made = fake_cuda.generate(generated, *tensors)
        first, *_ = fake_cuda.compile_triton(made, tmp_path).values()
        assert ("atomic_add" in made.code) == counted
        kernels.append(first)
    without, counting = kernels
    assert (counting.local, counting.shared) == (without.local, without.shared)
    assert counting.registers <= max(without.registers, RESIDENT)


def test_counters_of_a_gated_product_and_of_8_bit_rows() -> None:
    def glu(x: Tensor, *operands: Tensor) -> Tensor:
        return OPS.glu_spmm(*operands, "relu", OPS.site_counters(x, "site"))

    def rows(x: Tensor, z: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return OPS.activation_spmm(z, w, "relu", OPS.site_counters(x, "site"), scale)

    x = meta(1, 4096)
    scaled = meta(1, 96), meta(96, 80, dtype=torch.int8), meta(96, dtype=FP32)
    for fn, operands in ((glu, gated(1, BF16)), (rows, scaled)):
        made = fake_cuda.generate(fn, x, *operands)
        kernels = fake_cuda.triton_sources(made.code).values()
        (counting,) = (text for text in kernels if "atomic_add" in text)
        assert "'arg_COUNTERS': '*i64'" in counting


def test_an_observed_site_is_called_with_its_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observed = functools.partial(base.PassContext, demoted={})
    monkeypatch.setattr(base, "PassContext", observed)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(torch.relu(x), w) + 1

    cudagraphs = {"triton.cudagraphs": True}
    operands = meta(4, 16384), meta(4096, 16384)
    made = fake_cuda.generate(fn, *operands, options={}, inductor=cudagraphs)
    (decision,) = made.decisions
    limit = cuda.break_even_union(4, 16384, 4096, "bfloat16")
    called = rf"kept_tensors\.site_counters\(\w+, '{decision.site}', {limit:.3f}, 4\)"
    assert len(re.findall(called, made.code)) == 1
    assert made.code.count("tl.atomic_add(COUNTERS") == 2
