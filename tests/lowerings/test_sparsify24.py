"""``sparsify24`` in generated code for a GPU: one kernel, no spills, symbolic rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import Capability, compile_triton, generate
from machine_code import Compiled
from torch import Tensor

from inductor_sparse.runtime import sparsify24_cuda

sparse = torch.ops.inductor_sparse
BF16, INT8, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packing(
    quantized: torch.dtype | None = None,
    way: tuple[str, str] = ("relu2", "largest"),
    energy: bool = False,
) -> Callable[..., Any]:
    """A function that packs its input, and sums energies if asked to.

    What it is given besides is what that is multiplied by when activated.
    """

    def pack(x: Tensor, up: Tensor | None = None) -> Any:
        slots = sparse.site_energy(x, "site") if energy else None
        if quantized is None:
            return sparse.sparsify24(x, *way, slots, up=up)
        return sparse.sparsify24_quantized(x, *way, quantized, slots, up=up)

    return pack


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)], ids=str)
@pytest.mark.parametrize(
    ("quantized", "way", "energy", "columns"),
    [
        (None, ("relu2", "largest"), True, 4096),
        (None, ("identity", "largest_abs"), False, 1000),
        (INT8, ("relu2", "largest"), False, 16384),
        (INT8, ("identity", "largest"), False, 40000),
        (E4M3, ("relu2", "largest"), True, 28672),
        (E4M3, ("identity", "largest_abs"), False, 5000),
    ],
    ids=str,
)
def test_one_kernel_without_spills(
    quantized: torch.dtype | None,
    way: tuple[str, str],
    energy: bool,
    columns: int,
    capability: Capability,
    tmp_path: Path,
) -> None:
    if quantized == E4M3 and capability == (8, 0):
        pytest.skip("no e4m3 there")
    function = packing(quantized, way, energy)
    made = generate(function, empty(512, columns), dynamic=512, capability=capability)
    assert len(made.triton_kernels) == 1
    assert "= torch.ops.inductor_sparse.sparsify24" not in made.code
    (kernel,) = compile_triton(made, tmp_path, capability).values()
    assert kernel.local == 0
    if quantized is not None:
        assert "div.rn.f32" in kernel.ptx and "div.full" not in kernel.ptx


@pytest.mark.parametrize(
    ("quantized", "columns", "capability"),
    [
        (None, 11008, (9, 0)),
        (None, 1000, (8, 0)),
        (E4M3, 11008, (9, 0)),
        (INT8, 28672, (9, 0)),
        (INT8, 40000, (8, 0)),
    ],
    ids=str,
)
def test_a_gate_is_multiplied_in_the_same_kernel(
    quantized: torch.dtype | None, columns: int, capability: Capability, tmp_path: Path
) -> None:
    x, up = empty(512, columns), empty(512, columns + 8)[:, :columns]
    pack = packing(quantized, ("relu2", "largest_abs"), energy=True)
    made = generate(pack, x, up, dynamic=512, capability=capability, static=[])
    assert len(made.triton_kernels) == 1
    assert "GATED : tl.constexpr = True" in made.code
    (kernel,) = compile_triton(made, tmp_path, capability).values()
    assert kernel.local == 0


def test_a_gate_and_its_factor_may_be_parts_of_one_matrix() -> None:
    pack = packing(way=("relu", "largest_abs"))
    made = generate(lambda both: pack(*both.chunk(2, -1)), empty(512, 256))
    assert len(made.triton_kernels) == 1
    assert "UP = arg_UP + 128" in made.code
    assert "X = arg_UP\n" in made.code


WAYS = (("relu2", "largest"), ("identity", "largest"), ("identity", "largest_abs"))


@pytest.mark.parametrize(
    ("dtype", "way", "columns"),
    [
        # Those of bfloat16 are compiled below.
        *((torch.float16, way, 28672) for way in WAYS),
        *((torch.float32, way, 28672) for way in WAYS),
        # Even rows, which are loaded without a mask, take other registers.
        (torch.float16, WAYS[1], 32768),
        (torch.float32, WAYS[2], 32768),
        *((torch.float32, WAYS[1], columns) for columns in (16384, 4096, 40000)),
    ],
    ids=str,
)
def test_summing_energies_spills_nothing(
    dtype: torch.dtype, way: tuple[str, str], columns: int, tmp_path: Path
) -> None:
    x = empty(512, columns, dtype=dtype)
    made = generate(packing(E4M3, way, energy=True), x, dynamic=512)
    (kernel,) = compile_triton(made, tmp_path).values()
    assert kernel.local == 0


def with_and_without_energies(
    quantized: torch.dtype | None,
    way: tuple[str, str],
    x: Tensor,
    folder: Path,
    capability: Capability = (9, 0),
) -> list[Compiled]:
    """The kernel that sums energies, and the one that does not."""
    compiled = []
    for energy in (True, False):
        function = packing(quantized, way, energy)
        made = generate(function, x, dynamic=512, capability=capability)
        compiled += compile_triton(made, folder, capability).values()
    return compiled


def allocated(kernel: Compiled) -> int:
    """Registers of a thread as a multiprocessor hands them out: eight at a time."""
    return -(-kernel.registers // 8) * 8


@pytest.mark.parametrize(
    ("dtype", "way", "capability"),
    [
        *((dtype, way, (9, 0)) for dtype in (BF16, torch.float16) for way in WAYS),
        *((BF16, WAYS[2], capability) for capability in ((8, 0), (8, 9))),
        (torch.float16, WAYS[0], (8, 0)),
    ],
    ids=str,
)
def test_energies_leave_as_many_programs_running(
    dtype: torch.dtype, way: tuple[str, str], capability: Capability, tmp_path: Path
) -> None:
    # Most programs sum nothing, and must not pay for those that do.
    x = empty(512, 16384, dtype=dtype)
    summing, plain = with_and_without_energies(None, way, x, tmp_path, capability)
    assert allocated(summing) <= allocated(plain)
    assert summing.shared <= plain.shared


@pytest.mark.parametrize("columns", [4096, 16384, 28672, 40000])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_energies_of_quantized_rows_take_hardly_any_registers(
    way: tuple[str, str], columns: int, tmp_path: Path
) -> None:
    x = empty(512, columns)
    summing, plain = with_and_without_energies(E4M3, way, x, tmp_path)
    assert summing.local == 0
    # The values are not held for it, but the schedule of the compiler is another one.
    assert allocated(summing) <= allocated(plain) + 8
    assert summing.shared <= plain.shared


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quantized", [None, E4M3], ids=str)
def test_other_dtypes(
    dtype: torch.dtype, quantized: torch.dtype | None, tmp_path: Path
) -> None:
    made = generate(packing(quantized), empty(64, 4096, dtype=dtype))
    (kernel,) = compile_triton(made, tmp_path).values()
    assert kernel.local == 0


def test_loads_and_stores_are_wide(tmp_path: Path) -> None:
    made = generate(packing(), empty(128, 4096))
    (kernel,) = compile_triton(made, tmp_path).values()
    loads = [line for line in kernel.ptx.splitlines() if "ld.global" in line]
    stores = [line for line in kernel.ptx.splitlines() if "st.global" in line]
    assert loads and all(".v4.b32" in line for line in loads)
    # What is kept of 16 loaded bytes are 8; no thread gives it to another.
    assert sum(".v2.b32" in line for line in stores) == len(loads)


def test_results_are_buffers_of_the_formats_shapes() -> None:
    made = generate(packing(E4M3), empty(512, 1000), dynamic=512)
    assert "empty_strided_cuda((s" in made.code
    assert ", 512), (512, 1), torch.float8_e4m3fn)" in made.code
    assert ", 16, 128), (2048, 128, 1), torch.int32)" in made.code
    assert "math." not in made.code.split("def call(")[1]


def test_a_linear_layer_before_it_is_not_recomputed() -> None:
    def ffn(x: Tensor, w: Tensor) -> Any:
        return sparse.sparsify24(x @ w.t(), "relu2", "largest")

    made = generate(ffn, empty(100, 70), empty(130, 70))
    assert made.code.count("extern_kernels.mm(") == 1
    assert len(made.triton_kernels) == 1


@pytest.mark.parametrize(
    ("quantized", "x", "capability"),
    [
        (None, empty(64, 64, dtype=torch.float64), (9, 0)),
        (None, empty(0, 64), (9, 0)),
        (E4M3, empty(64, 64), (8, 0)),
    ],
    ids=["float64", "empty", "no e4m3"],
)
def test_what_the_kernels_do_not_take_is_left_to_the_op(
    quantized: torch.dtype | None, x: Tensor, capability: Capability
) -> None:
    made = generate(packing(quantized), x, capability=capability)
    assert "= torch.ops.inductor_sparse.sparsify24" in made.code
    assert made.triton_kernels == ()


def test_rows_that_fit_are_read_once() -> None:
    largest = sparsify24_cuda.LARGEST_WHOLE_ROW
    for columns, whole in ((64, True), (largest, True), (largest + 1, False)):
        made = generate(packing(INT8), empty(64, columns))
        called = made.code.split("def triton_")[1].split("@triton.jit")[0]
        assert ("sparsify24_whole_row(" in called) == whole
        assert ("sparsify24_split_row(" in called) != whole
    assert not sparsify24_cuda.row_plan(None).whole


EVEN: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x[:, :130],
    lambda x: x[:, 8:],
    lambda x: x + 1,
    lambda x: x[:, ::2],  # copied first
]
UNEVEN: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[:, :129],
    lambda x: x[:, 1:129],
    lambda x: x.t(),
    lambda x: x.view(-1)[: 64 * 131].view(64, 131)[:, :130],
]


@pytest.mark.parametrize(
    ("views", "dtype", "way", "paired"),
    [
        (EVEN, BF16, WAYS[0], True),
        (UNEVEN, BF16, WAYS[0], False),
        (EVEN[:1], BF16, WAYS[1], False),
        (EVEN[:1], torch.float16, WAYS[2], True),
        (EVEN[:1], torch.float32, WAYS[0], False),
    ],
    ids=["even", "uneven", "by value", "by magnitude", "float32"],
)
def test_two_groups_at_a_time_where_rows_are_even(
    views: list[Callable[[Tensor], Tensor]],
    dtype: torch.dtype,
    way: tuple[str, str],
    paired: bool,
) -> None:
    pack = packing(INT8, way)
    for view in views:
        made = generate(lambda x, view=view: pack(view(x)), empty(64, 256, dtype=dtype))
        assert f"PAIRED : tl.constexpr = {paired}" in made.code


def test_two_groups_at_a_time_of_rows_with_a_symbolic_number_of_columns() -> None:
    made = generate(packing(INT8), empty(64, 256), dynamic=256)
    assert "PAIRED : tl.constexpr = False" in made.code


def test_energies_are_added_where_the_runtime_keeps_them() -> None:
    made = generate(packing(energy=True), empty(64, 128))
    assert "= kept_tensors.site_energy(" in made.code
    assert "HAS_ENERGY : tl.constexpr = True" in made.code
    assert not generate(packing(), empty(64, 128)).code.count("site_energy")
