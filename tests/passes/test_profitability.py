"""The cost model: monotonic, never below one, and honest about few rows."""

from __future__ import annotations

import pytest

from inductor_sparse import _compat
from inductor_sparse import profitability as p


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("M", [1, 16, 128, None])
def test_gain_falls_with_density(M: int | None, dtype: str) -> None:
    densities = (0.01, 0.05, 0.1, 0.3, 0.6, 1.0)
    gains = [p.expected_gain(M, density, dtype) for density in densities]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > gains[-1] == 1.0


def test_one_token_gains_most() -> None:
    gains = [p.expected_gain(M, 0.05, "float32") for M in (1, 16, 512)]
    assert gains[0] == max(gains)
    assert p.expected_gain(None, 0.05, "float32") == gains[2]


def test_unknown_density_is_assumed() -> None:
    assumed = p.expected_gain(1, p.ASSUMED_DENSITY, "float32")
    assert p.expected_gain(1, None, "float32") == assumed


@pytest.mark.parametrize(
    ("M", "pays"),
    [(0, False), (1, True), (p.GLU_MAX_TOKENS, True), (p.GLU_MAX_TOKENS + 1, False)],
)
def test_glu_is_for_a_few_tokens(M: int, pays: bool) -> None:
    assert p.glu_pays(M, None, "float32") is pays


@pytest.mark.parametrize(("dtype", "reads"), [("float32", 2.0), ("bfloat16", 1.7)])
def test_glu_is_not_for_tokens_that_read_rows_too_often(
    dtype: str, reads: float
) -> None:
    assert p.glu_reads(dtype) == reads
    assert p.glu_pays(1, 1.0, dtype)
    for M in (4, 8):
        assert p.glu_pays(M, reads / M, dtype)
        assert not p.glu_pays(M, 1.01 * reads / M, dtype)


def test_training_copy() -> None:
    paid = [M for M in range(1, 100) if p.training_copy_pays(M)]
    assert paid == [*range(1, 9), *range(64, 100)]
    assert not p.training_copy_pays(None)


def test_kernels_by_device() -> None:
    assert p.has_kernel("cpu", "activation_spmm", "bfloat16")
    assert not p.has_kernel("cpu", "activation_spmm", "float64")
    assert not p.has_kernel("cuda", "activation_spmm", "bfloat16")


def test_matrix_units_are_gained_less_over(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(M, dtype) for M in (1, 16, 128) for dtype in ("bfloat16", "float32")]
    gains = []
    for units in (False, True):
        monkeypatch.setattr(_compat, "has_matrix_units", lambda units=units: units)
        gains.append([p.expected_gain(M, 0.02, dtype) for M, dtype in cases])
    without, with_units = (dict(zip(cases, gain, strict=True)) for gain in gains)
    changed = [case for case in cases if with_units[case] != without[case]]
    assert changed == [(128, "bfloat16")]
    assert 1 < with_units[128, "bfloat16"] < without[128, "bfloat16"]


def test_matrix_units_win_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}
    for units in (False, True):
        monkeypatch.setattr(_compat, "has_matrix_units", lambda units=units: units)
        limits[units] = {
            (tokens, dtype): p.dense_call_density(tokens, dtype)
            for tokens in (16, 128, None)
            for dtype in ("bfloat16", "float16", "float32")
        }
    changed = {
        case for case in limits[True] if limits[True][case] != limits[False][case]
    }
    assert changed == {(128, "bfloat16"), (None, "bfloat16")}
    assert all(limits[True][case] < 0.1 < limits[False][case] for case in changed)


def test_break_even_falls_with_tokens_and_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_compat, "has_matrix_units", lambda: False)
    break_even = p.break_even_density
    assert break_even(p.ALWAYS_WINS_TOKENS, "bfloat16") == 1.0
    assert break_even(16, "bfloat16") < break_even(33, "bfloat16")
    assert break_even(5, "bfloat16") == p.stream_reads("bfloat16") / 5
    assert break_even(16, "float32") == p.dense_call_density(16, "float32")
    assert break_even(None, "bfloat16") == break_even(10**6, "bfloat16")
    assert break_even(33, "bfloat16") < break_even(33, "float32")
    assert break_even(33, "float16") == break_even(33, "float32")


SIZES = [(28672, 8192), (21504, 5120), (8192, 8192), (16384, 4096), (4096, 2048)]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("K", "N"), SIZES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_no_number_of_tokens_of_the_packing_regime_loses(
    K: int, N: int, dtype: str, graphs: bool
) -> None:
    begin = p.cuda.prefill_min_tokens(K, N, dtype, graphs=graphs)
    assert begin is not None
    # Among them one token more than each number of whole tiles.
    tokens = {*range(begin + 1, 16384, 256), *range(begin, 16384, 97)}
    assert min(p.cuda.prefill_gain(M, K, N, dtype, graphs=graphs) for M in tokens) >= 1


def test_a_few_tiles_more_than_whole_rounds_cost_less_than_a_round() -> None:
    # 66 clusters have 160 tiles: 28 are left for a third round.
    gain = p.cuda.prefill_gain(2305, 16384, 4096, "bfloat16", graphs=True)
    assert gain >= p.cuda.PREFILL_MARGIN
    for tiles, halves, expected in (
        (160, True, 2.7),
        (160, False, 3),
        (166, True, 3),
        (132, True, 2),
    ):
        assert p.cuda.rounds(tiles, 66, halves=halves) == expected


def prefill(M: int, K: int, N: int, narrow: str, **how: bool) -> float:
    return p.cuda.prefill_gain(M, K, N, "bfloat16", pack_dtype=narrow, **how)


@pytest.mark.parametrize("narrow", ["float8_e4m3fn", "int8"])
def test_8_bits_take_the_host_of_a_small_ffn_longer_than_they_save(
    narrow: str,
) -> None:
    # Measured: 0.69x, and 1.3x to 1.5x, of the whole.
    assert prefill(8192, 4096, 1024, narrow) < 1
    assert prefill(8192, 4096, 1024, narrow, graphs=True) > 1.5
    assert prefill(8192, 4096, 1024, "") > p.cuda.PREFILL_MARGIN
    large = (8192, 16384, 4096, narrow)
    assert prefill(*large) == prefill(*large, graphs=True)
    assert prefill(4096, 8192, 2048, narrow) > p.cuda.PREFILL_MARGIN
    # Both sides are in 8 bits: nothing is quantized that was not.
    dtype = "float8_e4m3fn"
    gains = {p.cuda.prefill_gain(8192, 8192, 2048, dtype, graphs=g) for g in (0, 1)}
    assert len(gains) == 1


def test_a_gate_gives_the_host_time_and_takes_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = (2048, 5632, 2048, "float8_e4m3fn")
    gain = prefill(*small, gated=True)
    monkeypatch.setattr(p.cuda, "_NARROW_HOST_US", 0.0)
    p.cuda.prefill_gain.cache_clear()
    free = prefill(*small, gated=True)
    assert gain < free
    assert prefill(*small) + 0.1 < free
    p.cuda.prefill_gain.cache_clear()


def test_a_gate_is_read_by_either_side() -> None:
    for M, K, N in ((2048, 11008, 4096), (8192, 5632, 2048)):
        gains = [
            prefill(M, K, N, "", graphs=True, gated=gated, replaces_activation=replaces)
            for gated, replaces in ((False, False), (True, True), (False, True))
        ]
        assert gains == sorted(gains)
        assert len(set(gains)) == 3
