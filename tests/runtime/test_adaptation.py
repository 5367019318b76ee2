"""Sites that are too dense at run time are noticed, and compiled again dense."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator

import pytest
import torch

from inductor_sparse import _compat
from inductor_sparse.runtime import adaptation

COUNTERS = torch.ops.inductor_sparse.site_counters
SITES = ("layers.0.down:64x16", "layers.1.down:64x16")


@pytest.fixture(autouse=True)
def recompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[types.CodeType]]:
    """The code objects that were given back to Dynamo."""
    codes: list[types.CodeType] = []
    monkeypatch.setattr(_compat, "recompile_on_next_call", codes.append)
    adaptation.reset()
    yield codes
    adaptation.reset()


def graph(rows: list[list[int]], code: types.CodeType) -> Callable[[], list[list[int]]]:
    """A compiled graph whose kernels add ``rows`` to the counters at every call."""

    def compiled() -> list[list[int]]:
        counters = [COUNTERS(torch.zeros(1), site) for site in SITES]
        for values, row in zip(counters, rows, strict=True):
            values += torch.tensor(row)
        return [values.tolist() for values in counters]

    return adaptation.observed(compiled, code)


def code_of(name: str) -> types.CodeType:
    return compile("pass", name, "exec")


def test_only_the_dense_site_is_demoted(recompiled: list[types.CodeType]) -> None:
    code = code_of("dense")
    call = graph([[1, 1, 60, 64], [1, 0, 6, 64]], code)
    for _ in range(adaptation.WINDOW - 1):
        call()
    assert adaptation.demoted(code) == {}
    call()
    assert adaptation.demoted(code) == {"layers.0.down:64x16": 0}
    assert recompiled == [code]


def test_sparse_sites_stay(recompiled: list[types.CodeType]) -> None:
    code = code_of("sparse")
    call = graph([[2, 1, 60, 64], [1, 0, 6, 64]], code)  # half of the calls is not most
    for _ in range(3 * adaptation.WINDOW):
        call()
    assert adaptation.demoted(code) == {}
    assert recompiled == []


def test_windows_start_from_zero() -> None:
    code = code_of("window")
    call = graph([[1, 0, 6, 64], [1, 0, 6, 64]], code)
    for _ in range(adaptation.WINDOW):
        counters = call()
    assert counters == [[1, 0, 6, 64], [1, 0, 6, 64]]


def test_two_code_objects_do_not_share_counters() -> None:
    codes = [code_of("first"), code_of("second")]
    calls = [graph([[1, 1, 60, 64], [1, 0, 6, 64]], code) for code in codes]
    for _ in range(adaptation.WINDOW):
        calls[0]()
    calls[1]()
    assert adaptation.demoted(codes[0])
    assert not adaptation.demoted(codes[1])


def test_a_demotion_is_carried_out_when_the_call_fails() -> None:
    code = code_of("failing")

    def compiled() -> None:
        for site in SITES:
            COUNTERS(torch.zeros(1), site).add_(torch.tensor([1, 1, 60, 64]))
        raise ZeroDivisionError

    call = adaptation.observed(compiled, code)
    for _ in range(adaptation.WINDOW):
        with pytest.raises(ZeroDivisionError):
            call()
    assert adaptation.demoted(code) == dict.fromkeys(SITES, 0)


def test_without_a_code_object_nothing_is_wrapped() -> None:
    assert adaptation.observed(code_of, None) is code_of
    assert adaptation.demoted(None) is None


def test_reset_forgets() -> None:
    code = code_of("reset")
    call = graph([[1, 1, 60, 64], [1, 1, 60, 64]], code)
    for _ in range(adaptation.WINDOW):
        call()
    adaptation.reset()
    assert adaptation.demoted(code) == {}
