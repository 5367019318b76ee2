from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from inductor_sparse import formats
from inductor_sparse.lowerings import candidate_check as check

CPU = torch.device("cpu")
Operands = tuple[Tensor, Tensor, Tensor]


def operands(M: int, N: int, K: int) -> Operands:
    draw = check.generator(CPU)
    shape = formats.values_shape(M, K)
    values = check.random_values(shape, K, torch.bfloat16, CPU, draw)
    metadata = check.random_metadata(formats.metadata_shape(M, K), CPU, draw)
    w = check.random_weight(torch.empty(N, K, dtype=torch.bfloat16).t(), draw)
    return values, metadata, w


def test_metadata_is_valid_and_the_same_each_time() -> None:
    shape = (3, 2, 128)
    metadata = check.random_metadata(shape, CPU, check.generator(CPU))
    index = formats.unpack_index(metadata, 192, torch.bfloat16)
    assert (index[:, 0::2] < index[:, 1::2]).all()
    assert index.unique().tolist() == [0, 1, 2, 3]
    again = check.random_metadata(shape, CPU, check.generator(CPU))
    assert torch.equal(metadata, again)


def test_drawing_leaves_the_generator_of_the_model_alone() -> None:
    before = torch.get_rng_state()
    operands(64, 8, 64)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_values_beyond_the_reduction_are_zero(dtype: torch.dtype) -> None:
    values = check.random_values((64, 64), 70, dtype, CPU, check.generator(CPU))
    assert values[:, :36].float().count_nonzero() > 64
    assert values[:, 36:].float().count_nonzero() == 0


@pytest.mark.parametrize("M", [1, 63, 64, 200, 5000])
def test_every_block_of_rows_is_met(M: int) -> None:
    rows = check.sample_rows(M)
    assert rows.unique().equal(rows)
    assert rows.max() == M - 1
    assert set((rows // 64).tolist()) == set(range(-(-M // 64)))
    assert len(rows) <= 2 * 128 + -(-M // 64)
    # The first and the last tile, in full.
    assert {*range(min(M, 128)), *range(max(0, M - 128), M)} <= set(rows.tolist())


@pytest.mark.parametrize("M", [100, 4200])
def test_the_expected_rows_are_those_of_the_product(M: int) -> None:
    values, metadata, w = operands(M, 24, 100)
    rows = check.sample_rows(M)
    row_scale, col_scale = torch.rand(M), torch.rand(24)
    found = check.expected_rows(rows, values, metadata, w, row_scale, col_scale)
    dense = formats.unpack(values, metadata, 100).double() @ w.double()
    scaled = dense * row_scale.double()[:, None] * col_scale.double()
    torch.testing.assert_close(found, scaled[rows], rtol=1e-12, atol=1e-12)


def test_a_wrong_tile_is_found() -> None:
    values, metadata, w = operands(512, 256, 256)
    rows = check.sample_rows(512)
    expected = check.expected_rows(rows, values, metadata, w)
    product = formats.unpack(values, metadata, 256).float() @ w.float()
    right = product.bfloat16()
    allowed = check.tolerance(torch.bfloat16)
    assert check.relative_error(right[rows], expected) < allowed / 2
    wrong = right.clone()
    wrong[320:384, 64:128] = product[256:320, 64:128].bfloat16()
    assert check.relative_error(wrong[rows], expected) > 10 * allowed


def test_a_forgotten_step_is_found() -> None:
    values, metadata, w = operands(128, 256, 4096)
    rows = check.sample_rows(128)
    expected = check.expected_rows(rows, values, metadata, w)
    short = check.expected_rows(rows, values[:, :-32], metadata[:, :-1], w[:-64])
    allowed = check.tolerance(torch.bfloat16)
    assert check.relative_error(short, expected) > 3 * allowed


def test_nan_is_an_infinite_error() -> None:
    expected = torch.ones(2, 2, dtype=torch.float64)
    result = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    assert check.relative_error(result, expected) == float("inf")


def test_what_overflows_is_expected_to() -> None:
    expected = torch.tensor([[1e5, -1e6, 3e4]], dtype=torch.float64)
    assert check.relative_error(expected.half(), expected) < 1e-3
    wrong = torch.tensor([[1e5, -1e6, 1e5]]).half()
    assert check.relative_error(wrong, expected) > 0.1


class Doubled(check.Oracle):
    """What is right is twice the input."""

    def error(self, result: Any, inputs: Sequence[Tensor]) -> float:
        values = result if isinstance(result, Tensor) else result[0]
        return check.relative_error(values, 2 * inputs[0].double())


class Clock:
    def benchmark_gpu(self, fn: Callable[[], object]) -> float:
        fn()
        return 0.25


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[float, Doubled]]:
    """What autotuning is told of a candidate, and the oracle's notes."""
    monkeypatch.setattr(check, "benchmarker", Clock())

    def run(compute: Callable[[Tensor], Any], **how: bool) -> tuple[float, Doubled]:
        oracle = Doubled()
        x = torch.arange(8).bfloat16()
        return check.checked_time("number 1", oracle, compute, [x], **how), oracle

    return run


Race = Callable[..., tuple[float, Doubled]]


@pytest.mark.parametrize("compute", [lambda x: x + x, lambda x: (x + x, x)])
def test_a_right_result_is_timed(
    compute: Callable[[Tensor], Any], race: Race, caplog: pytest.LogCaptureFixture
) -> None:
    took, oracle = race(compute)
    assert (took, oracle.timed, oracle.short_of_memory) == (0.25, 1, False)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("factor", "off"), [(1.5, "2.5e-01"), (math.nan, "inf")], ids=["off", "nan"]
)
def test_a_wrong_result_takes_forever(
    factor: float, off: str, race: Race, caplog: pytest.LogCaptureFixture
) -> None:
    took, oracle = race(lambda x: (factor * x.float()).to(x.dtype))
    assert (took, oracle.timed) == (math.inf, 0)
    assert caplog.messages == [
        f"autotuning rejects number 1: it is off by {off} of the largest value, "
        "1.2e-02 is allowed; please report it"
    ]


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB\nmore"),
        RuntimeError("cublasCreate(handle): CUBLAS_STATUS_ALLOC_FAILED"),
        ValueError("no such tile"),
    ],
)
def test_a_failing_candidate_takes_forever(
    problem: Exception, race: Race, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Tensor) -> Tensor:
        raise problem

    took, oracle = race(fail)
    short = not isinstance(problem, ValueError)
    assert (took, oracle.timed, oracle.short_of_memory) == (math.inf, 0, short)
    first_line = str(problem).partition("\n")[0]
    assert caplog.messages == [
        f"autotuning rejects number 1 for operands [8]: {first_line}; another kernel "
        "takes its place"
    ]
    assert 1e6 < race(fail, last_resort=True)[0] < math.inf


@pytest.mark.parametrize("short", [False, True])
def test_a_lack_of_memory_may_be_the_cause_of_another_error(short: bool) -> None:
    try:
        try:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY" if short else "CUDA_ERROR_X")
        except RuntimeError as cause:
            raise ValueError("the module cannot be loaded") from cause
    except ValueError as error:
        assert check.is_out_of_memory(error) is short


def test_what_fails_only_when_it_is_timed_is_out(
    race: Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, __: object) -> float:
        raise RuntimeError("launch failed")

    monkeypatch.setattr(Clock, "benchmark_gpu", fail)
    took, oracle = race(lambda x: x + x)
    assert (took, oracle.timed) == (math.inf, 0)


def test_an_unknown_error_is_too_large(
    race: Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Doubled, "error", lambda *_: math.nan)
    took, oracle = race(lambda x: x + x)
    assert (took, oracle.timed) == (math.inf, 0)


@pytest.fixture
def _no_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_failed", set())


@pytest.mark.usefixtures("_no_failures")
def test_times_without_memory_are_kept_where_nobody_looks(race: Race) -> None:
    def fail(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    _, short = race(fail)
    # All candidates of that race: the times of some mean little without the others.
    for name in ("number 1", "number 2"):
        key = short.kept_key("key", name)
        assert key.startswith("key-")
        assert key == short.kept_key("key", name)
    _, again = race(fail)
    assert again.kept_key("key", "number 1") != short.kept_key("key", "number 1")
    _, enough = race(lambda x: x + x)
    assert enough.kept_key("key", "number 1") == "key"


@pytest.mark.usefixtures("_no_failures")
def test_a_failure_is_kept_for_this_process_only(
    race: Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("launch failed")

    _, oracle = race(fail)
    key = oracle.kept_key("key", "number 1")
    assert key.startswith("key-")
    assert oracle.kept_key("key", "number 2") == "key"
    _, next_layer = race(lambda x: x + x)
    assert next_layer.kept_key("key", "number 1") == key
    monkeypatch.setattr(check, "_PROCESS", "another")
    assert next_layer.kept_key("key", "number 1") == "key-another"


@pytest.mark.usefixtures("_no_failures")
def test_a_wrong_result_is_wrong_in_every_process(race: Race) -> None:
    _, oracle = race(lambda x: x)
    assert oracle.kept_key("key", "number 1") == "key"
