"""Candidates for autotuning: which there are, and that a wrong one never wins."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import fake_cuda
import pytest
import torch
from torch import Tensor
from torch._inductor import ir

from inductor_sparse import _compat, formats
from inductor_sparse.lowerings import (
    candidate_check,
    sparse24_choices,
    sparse24_kernel,
    sparse24_mm,
    vendor24,
)

CPU = torch.device("cpu")
BF16 = torch.bfloat16
M, N, K = 200, 64, 192
op = torch.ops.inductor_sparse.sparse24_mm


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    draw = candidate_check.generator(CPU)
    shape = formats.values_shape(M, K)
    values = candidate_check.random_values(shape, K, BF16, CPU, draw)
    words = formats.metadata_shape(M, K)
    metadata = candidate_check.random_metadata(words, CPU, draw)
    w = candidate_check.random_weight(torch.empty(K, N, dtype=BF16), draw)
    return values, metadata, w


@pytest.fixture(autouse=True)
def _no_gpu_to_measure_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Clock:
        def benchmark_gpu(self, fn: Callable[[], object]) -> float:
            fn()
            return 0.25

    monkeypatch.setattr(candidate_check, "benchmarker", Clock())
    yield


def timed(compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    oracle = sparse24_choices.Oracle((False, False))
    return candidate_check.checked_time("candidate", oracle, compute, inputs)


def test_a_right_result_is_timed(inputs: tuple[Tensor, ...]) -> None:
    assert timed(op, inputs) == 0.25


def test_an_answer_that_could_not_be_computed_is_tried_again(
    inputs: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    oracle = sparse24_choices.Oracle((False, False))
    with monkeypatch.context() as short:
        short.setattr(candidate_check, "expected_rows", fail)
        assert candidate_check.checked_time("first", oracle, op, inputs) == math.inf
        assert (oracle.timed, oracle.short_of_memory) == (0, True)
    assert candidate_check.checked_time("second", oracle, op, inputs) == 0.25
    assert oracle.timed == 1


def test_the_answer_is_computed_once_and_forgotten(
    inputs: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    expected_rows = candidate_check.expected_rows

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return expected_rows(*args)

    monkeypatch.setattr(candidate_check, "expected_rows", counted)
    oracle = sparse24_choices.Oracle((False, False))
    result = op(*inputs)
    with sparse24_choices.forgetting(oracle):
        assert oracle.error(result, inputs) < 1e-2
        assert oracle.error(result, tuple(t.view_as(t) for t in inputs)) < 1e-2
        assert len(calls) == 1
    assert not oracle._inputs
    assert oracle.error(result, inputs) < 1e-2
    assert len(calls) == 2
    # Other inputs have another answer.
    values, metadata, w = inputs
    assert oracle.error(2 * result, (2 * values, metadata, w)) < 1e-2
    assert len(calls) == 3


def choices_of(monkeypatch: pytest.MonkeyPatch, answer: int | Exception) -> list[Any]:
    """What autotuning is offered; it takes the choice of number ``answer``."""
    offered: list[Any] = []

    def select(name: str, choices: list[Any], *rest: Any, **how: Any) -> ir.TensorBox:
        offered.extend(choices)
        assert how["return_multi_template"] is False
        if isinstance(answer, Exception):
            raise answer
        return choices[answer].output_node()

    monkeypatch.setattr(sparse24_mm, "autotune_select_algorithm", select)
    return offered


def generate(dtype: torch.dtype = BF16) -> fake_cuda.Generated:
    words = formats.metadata_shape(512, 1024)
    return fake_cuda.generate(
        lambda v, m, w, b: op(v, m, w.t()) + b,
        torch.empty(formats.values_shape(512, 1024), dtype=dtype, device="meta"),
        torch.empty(words, dtype=torch.int32, device="meta"),
        torch.empty(256, 1024, dtype=dtype, device="meta"),
        torch.empty(256, dtype=BF16, device="meta"),
        inductor={"max_autotune_gemm": True},
    )


@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn])
@pytest.mark.parametrize("cusparselt", [False, True])
def test_every_tile_and_the_kernels_of_others_are_offered(
    cusparselt: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    offered = choices_of(monkeypatch, 1)
    generated = generate(dtype)
    tiles = sparse24_kernel.configs(dtype)
    assert tuple(choice.tile for choice in offered[: len(tiles)]) == tiles
    externs = [choice.choice for choice in offered[len(tiles) :]]
    expected = [vendor24.MASKED_DENSE] + [vendor24.CUSPARSELT] * cusparselt
    assert externs == expected
    assert len({choice.hash_key() for choice in offered}) == len(offered)
    assert generated.kernels == ("sparse24_mm_0",)
    assert f"threads={tiles[1].threads}, cluster={tiles[1].cluster}" in generated.code


def test_one_tensor_in_two_roles_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Autotuning would merge the two, and candidates would get one input too few."""
    monkeypatch.delattr(sparse24_mm, "autotune_select_algorithm")
    like: dict[str, Any] = {"dtype": torch.int8, "device": "meta"}
    words = formats.metadata_shape(256, 1024)
    generated = fake_cuda.generate(
        lambda v, m, w, s: op(v, m, w.t(), s, s),
        torch.empty(formats.values_shape(256, 1024), **like),
        torch.empty(words, dtype=torch.int32, device="meta"),
        torch.empty(256, 1024, **like),
        torch.empty(256, device="meta"),
        inductor={"max_autotune_gemm": True},
    )
    assert generated.kernels == ("sparse24_mm_0",)


def test_nothing_is_measured_where_runs_must_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(sparse24_mm, "autotune_select_algorithm")
    monkeypatch.setattr(_compat, "is_deterministic", lambda: True)
    assert generate().kernels == ("sparse24_mm_0",)


def test_the_dense_product_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    choices_of(monkeypatch, -1)
    generated = generate()
    assert "extern_kernels.inductor_sparse_masked_dense(arg0_1" in generated.code
    assert generated.cuda_kernels == ()


def test_no_memory_to_measure_in_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choices_of(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    with caplog.at_level(logging.WARNING, logger=sparse24_mm.log.name):
        generated = generate()
    assert generated.kernels == ("sparse24_mm_0",)
    assert "512x256x1024: not enough memory to measure candidates" in caplog.text


@pytest.mark.parametrize("timed", [0, 1])
def test_no_memory_to_check_in_is_no_reason_for_the_dense_product(
    timed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)

    def select(name: str, choices: list[Any], *rest: Any, **how: Any) -> ir.TensorBox:
        choices[0].oracle.short_of_memory = True
        choices[0].oracle.timed = timed
        return choices[-1].output_node()

    monkeypatch.setattr(sparse24_mm, "autotune_select_algorithm", select)
    with caplog.at_level(logging.WARNING, logger=sparse24_mm.log.name):
        generated = generate()
    dense = "inductor_sparse_masked_dense(" in generated.code
    assert dense is bool(timed)
    assert ("not enough memory to measure" in caplog.text) is not dense
    assert generated.cuda_kernels == (() if dense else ("sparse24_mm_0",))


def test_the_dense_product_cannot_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    offered = choices_of(monkeypatch, 0)
    generate()
    nothing = torch.empty(0)  # none of them can multiply this
    times = [choice.benchmark(nothing, out=nothing) for choice in offered]
    assert [math.isfinite(time) for time in times[:-2]] == [False] * (len(times) - 2)
    assert 1e6 < times[-2] < math.inf
    assert times[-1] == math.inf


def test_a_lack_of_memory_is_not_kept_on_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    offered = choices_of(monkeypatch, 0)
    generate()
    before = [choice.hash_key() for choice in offered]
    assert before == [choice.hash_key() for choice in offered]
    offered[0].oracle.short_of_memory = True
    after = [choice.hash_key() for choice in offered]
    assert not set(before) & set(after)
    assert len(set(after)) == len(after)


def test_inputs_are_valid_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[int, Any] = {}

    def select(name: str, choices: list[Any], *rest: Any, **how: Any) -> ir.TensorBox:
        monkeypatch.setattr(
            sparse24_choices,
            "_example",
            lambda node: torch.empty_strided(
                [int(n) for n in node.get_size()],
                [int(n) for n in node.get_stride()],
                dtype=node.get_dtype(),
            ),
        )
        for at, make in how["input_gen_fns"].items():
            made[at] = make(choices[0].input_nodes[at])
        return choices[0].output_node()

    monkeypatch.setattr(sparse24_mm, "autotune_select_algorithm", select)
    generate()
    values, metadata, w = made[0], made[1], made[2]
    formats.check_packed(values, metadata, 1024)
    assert w.shape == (1024, 256)
    assert w.stride() == (1, 1024)
    assert timed(op, (values, metadata, w)) == 0.25
