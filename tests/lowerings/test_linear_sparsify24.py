"""``linear_sparsify24`` in generated code: the kernel where it is expected to win.

Shape legend: ``M`` tokens, ``D`` features of the model, ``K`` neurons.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake_cuda import compile_cuda, cuda_sources, generate
from torch import Tensor

from inductor_sparse import formats, lowerings
from inductor_sparse.lowerings import candidate_check, linear_sparsify24
from inductor_sparse.lowerings import linear_sparsify24_kernel as hopper
from inductor_sparse.lowerings.cuda_template import CudaTemplateBuffer
from inductor_sparse.lowerings.linear_sparsify24_choices import Candidate, Oracle

KERNEL = "linear_sparsify24_bf16"
H200 = 132


def _op(**kwargs: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    settings = {"activation": "relu2", "select": "largest", **kwargs}

    def call(x: Tensor, w1: Tensor, bias: Tensor | None = None) -> Any:
        op = torch.ops.inductor_sparse.linear_sparsify24
        return op(x, w1, bias, settings["activation"], settings["select"])

    return call


def _meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


@pytest.mark.parametrize("tokens", [(), (2048,)])
def test_one_kernel_and_its_launch(tokens: tuple[int, ...], tmp_path: Path) -> None:
    inputs = _meta(2048, 512), _meta(8196, 512), _meta(8196)
    made = generate(_op(), *inputs, dynamic=tokens)
    assert not made.triton_kernels
    (name,) = made.cuda_kernels
    assert name.startswith(KERNEL)
    assert f"{name}.run(arg0_1, arg1_1, arg2_1, " in made.code
    assert "extern_kernels." not in made.code
    assert compile_cuda(cuda_sources(made.code)[name], tmp_path).local == 0


def test_what_comes_before_and_after_is_not_fused() -> None:
    def block(x: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
        values, metadata = _op()(x + 1, w1)
        return values * 2, metadata + 1

    made = generate(block, _meta(2048, 512), _meta(4096, 512))
    assert len(made.cuda_kernels) == 1
    assert "epilogue::" not in made.code
    assert len(made.triton_kernels) >= 2
    launch = made.code.index(f"{made.cuda_kernels[0]}.run(")
    first, last = (made.code.index(f"{made.triton_kernels[i]}.run(") for i in (0, -1))
    assert first < launch < last


def test_energy_is_an_argument_that_is_written() -> None:
    def block(x: Tensor, w1: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        op = torch.ops.inductor_sparse.linear_sparsify24
        site = torch.ops.inductor_sparse.site_energy(x, "site")
        return (*op(x, w1, None, "relu2", "largest", site), energy)

    energy = _meta(256, 2, dtype=torch.float64)
    made = generate(block, _meta(2048, 512), _meta(4096, 512), energy)
    (name,) = made.cuda_kernels
    assert "double* __restrict__ energy" in cuda_sources(made.code)[name]
    assert f"{name}.run(arg0_1, arg1_1, buf" in made.code
    (kernel,) = (b for b in made.graph.buffers if isinstance(b, CudaTemplateBuffer))
    # Metadata and energy, which others may read afterwards.
    assert len(kernel.mutation_outputs) == 2


def _rows(columns: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _meta(2048, columns, **kwargs), _meta(4096, columns, **kwargs)


@pytest.mark.parametrize(
    ("inputs", "settings", "options", "reason"),
    [
        (_rows(512), {"activation": "identity"}, {}, "values of 'identity' may be"),
        (_rows(512, dtype=torch.float32), {}, {}, "no code for torch.float32"),
        (_rows(508), {}, {}, "rows with strides (508, 1) are not aligned to 16 B"),
        (_rows(512), {}, {"capability": (8, 0)}, "it is for sm_90, this is sm_80"),
    ],
)
def test_a_product_and_a_packing_elsewhere(
    inputs: tuple[Tensor, ...],
    settings: dict[str, Any],
    options: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "inductor_sparse.lowerings.linear_sparsify24"):
        made = generate(_op(**settings), *inputs, **options)
    assert reason in caplog.text
    assert not made.cuda_kernels
    assert "extern_kernels.mm(" in made.code


def _narrowed(x: Tensor, flat: Tensor) -> Any:
    return _op()(x, flat.narrow(0, 4, 4096 * 512).view(4096, 512))


def _made_by_an_op(x: Tensor, w1: Tensor) -> Any:
    copy = torch.ops.inductor_sparse.row_major_weight
    return _op()(x, copy(w1, [4096, 512], [512, 1], 0, torch.bfloat16))


@pytest.mark.parametrize(
    ("fn", "w1", "options"),
    [
        (_narrowed, _meta(4 + 4096 * 512), {}),
        (_made_by_an_op, _meta(4096, 512), {"assume_unaligned_fallback_output": True}),
    ],
)
def test_an_unaligned_operand_is_multiplied_elsewhere(
    fn: Callable[..., Any],
    w1: Tensor,
    options: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "inductor_sparse.lowerings.linear_sparsify24"):
        made = generate(fn, _meta(2048, 512), w1, inductor=options)
    assert "is not 16-byte aligned" in caplog.text
    assert not made.cuda_kernels


def test_one_matrix_in_both_roles_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Autotuning would merge the two, and candidates would get one input too few."""
    monkeypatch.delattr(linear_sparsify24, "autotune_select_algorithm")
    tuned = {"max_autotune_gemm": True}
    made = generate(lambda x: _op()(x, x), _meta(4096, 4096), inductor=tuned)
    assert len(made.cuda_kernels) == 1


def test_a_wrapper_that_is_not_python_multiplies_and_packs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "inductor_sparse.lowerings.linear_sparsify24"):
        made = generate(_op(), *_rows(512), inductor={"cpp_wrapper": True})
    assert "the kernel is launched from Python" in caplog.text
    assert not made.cuda_kernels


def test_the_expected_rate_decides() -> None:
    assert hopper.best_tile(2048, 16384, H200) == hopper.TileConfig()
    # More tokens are more waves: of the larger tile, too, hardly one is not full.
    large = hopper.best_tile(8192, 16384, H200)
    assert large is not None and (large.block_m, large.block_k) == (256, 192)
    # Five blocks of 128 tokens: clusters of two would compute six.
    narrow = hopper.TileConfig(block_k=128, stages=6, cluster=1)
    assert hopper.best_tile(640, 16384, H200) in (None, narrow)
    assert hopper.best_tile(64, 16384, H200) is None
    made = generate(_op(), _meta(64, 512), _meta(4096, 512))
    assert not made.cuda_kernels


def test_no_memory_to_measure_in_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(linear_sparsify24, "autotune_select_algorithm", fail)
    inputs = _meta(2048, 512), _meta(4096, 512)
    made = generate(_op(), *inputs, inductor={"max_autotune_gemm": True})
    assert "not enough memory to measure candidates" in caplog.text
    assert len(made.cuda_kernels) == 1


@pytest.mark.parametrize("timed", [0, 1])
def test_no_memory_to_check_in_is_no_reason_for_the_pair(
    timed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    last = list(hopper.TILES)[-1]

    def select(name: str, choices: list[Any], *rest: Any, **how: Any) -> Any:
        before = {choice.hash_key() for choice in choices}
        choices[0].oracle.short_of_memory = True
        choices[0].oracle.timed = timed
        assert not before & {choice.hash_key() for choice in choices}
        return choices[-timed].output_node()

    monkeypatch.setattr(linear_sparsify24, "autotune_select_algorithm", select)
    inputs = _meta(2048, 512), _meta(4096, 512)
    made = generate(_op(), *inputs, inductor={"max_autotune_gemm": True})
    assert ("not enough memory to measure" in caplog.text) is not bool(timed)
    # Of the pair, which cannot be measured, nothing is left behind.
    assert (len(made.cuda_kernels), made.triton_kernels) == (1, ())
    assert (f"shared_bytes={last.shared_bytes}" in made.code) is bool(timed)


def test_a_cpu_multiplies_and_packs() -> None:
    lowerings.register_all()
    torch.manual_seed(0)
    x, w1 = torch.randn(70, 40), torch.randn(100, 40)
    expected = _op()(x, w1, torch.ones(100))
    compiled = torch.compile(_op())(x, w1, torch.ones(100))
    torch.testing.assert_close(compiled, expected)


def _packed(M: int, D: int, K: int) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    torch.manual_seed(0)
    inputs = [torch.randn(M, D).bfloat16(), torch.randn(K, D).bfloat16()]
    return _op()(*inputs), inputs


def test_candidates_are_checked() -> None:
    (values, metadata), inputs = _packed(130, 64, 100)
    oracle = Oracle("relu2")
    assert oracle.error((values, metadata), inputs) < 0.01
    wrong = values.clone()
    wrong[129, values[129].argmax()] = 0
    assert oracle.error((wrong, metadata), inputs) > 0.02
    index = formats.unpack_index(metadata, 130, torch.bfloat16)
    swapped = index.flip(0)
    moved = formats.pack_index(swapped, torch.bfloat16)
    assert oracle.error((values, moved), inputs) > 0.1
    assert not oracle.error((values * torch.nan, metadata), inputs) < 0.01


class _Clock:
    def benchmark_gpu(self, fn: Callable[[], object]) -> float:
        fn()
        return 0.25


def _milliseconds(
    tile: hopper.TileConfig | None, inputs: list[Tensor], pack: Callable[..., Any]
) -> float:
    """What autotuning is told of a candidate that packs with ``pack``."""
    candidate = Candidate(tile, [], None, Oracle("relu2"), lambda: None)
    with (
        patch.object(candidate_check, "benchmarker", _Clock()),
        patch.object(candidate, "_pack", pack),
    ):
        return candidate.benchmark(*inputs, out=inputs[0])


def test_a_candidate_that_is_wrong_or_fails_takes_forever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (values, metadata), inputs = _packed(130, 64, 100)
    tile = hopper.TileConfig()

    def fail(*_: Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    assert _milliseconds(tile, inputs, lambda *_: (values, metadata)) == 0.25
    assert not caplog.messages
    twice, nan = ((values * factor, metadata) for factor in (2, torch.nan))
    assert _milliseconds(tile, inputs, lambda *_: twice) == math.inf
    assert _milliseconds(tile, inputs, lambda *_: nan) == math.inf
    assert "is off by nan of the largest value" in caplog.messages[-1]
    assert _milliseconds(tile, inputs, fail) == math.inf
    assert caplog.messages[-1].startswith("autotuning rejects ")
    assert "out of memory; another kernel" in caplog.messages[-1]
    # The pair needs no measuring to be right.
    assert 1e6 < _milliseconds(None, inputs, fail) < math.inf
