"""Sites of a GPU whose tokens need too many neurons: found without waiting for it."""

from __future__ import annotations

import functools
import logging
import threading
import types
from collections.abc import Callable, Iterator

import pytest
import torch

from inductor_sparse import _compat, ops
from inductor_sparse.runtime import adaptation, density_gate, device_sums
from inductor_sparse.runtime.density_gate import FIRST_LOOK, MOST_CALLS, Finding, Gate
from inductor_sparse.runtime.device_sums import Sums

DOWN, UP = "layers.0.down:64x16", "layers.1.down:64x16"
ANCHOR = torch.zeros(1)
TWO_LOOKS = 2 * FIRST_LOOK + 1
"""Calls after which a site is known to be too dense that was so in all of them."""

Found = dict[str, Finding]


class Device:
    """A device whose copies arrive when they are told to."""

    def __init__(self) -> None:
        self.copies = 0
        self.arrived = self.capturing = False

    def query(self) -> bool:
        return self.arrived


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made, start = Device(), device_sums.start_copies

    def start_late(sums: list[Sums]) -> device_sums.Copies:
        made.copies += 1
        return device_sums.Copies(start(sums).values, made)

    monkeypatch.setattr(device_sums, "start_copies", start_late)
    monkeypatch.setattr(device_sums, "is_capturing", lambda device: made.capturing)
    return made


@pytest.fixture(autouse=True)
def recompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[types.CodeType]]:
    """The code objects that were given back to Dynamo."""
    codes: list[types.CodeType] = []
    monkeypatch.setattr(_compat, "recompile_on_next_call", codes.append)
    adaptation.reset()
    yield codes
    adaptation.reset()


def kernel(gate: Gate, kept: int, site: str = DOWN, tokens: int = 4) -> None:
    """What a kernel of a site with 100 neurons does; more than 60 of them are many."""
    values = gate.counters(ANCHOR, site, 0.6, tokens)
    values += torch.tensor([0, 0, kept, 100])


def run(gate: Gate, calls: int, step: Callable[[], None]) -> list[Found]:
    found = []
    for _ in range(calls):
        step()
        found.append(gate.look())
    return found


def test_a_dense_site_is_found_when_its_copy_arrives(device: Device) -> None:
    gate = Gate()

    def step() -> None:
        kernel(gate, 80)
        kernel(gate, 60, UP)

    assert run(gate, FIRST_LOOK + 5, step) == [{}] * (FIRST_LOOK + 5)
    assert device.copies == 1
    device.arrived = True
    assert not any(run(gate, FIRST_LOOK - 5, step))
    device.arrived = False
    assert not any(run(gate, FIRST_LOOK, step))
    assert device.copies == 2
    device.arrived = True
    assert run(gate, 2, step) == [{DOWN: Finding(0.8, 4)}, {}]


def test_one_dense_look_is_not_enough(device: Device) -> None:
    gate, device.arrived = Gate(), True
    for calls, kept in ((8, 99), (8, 20), (16, 99), (9, 20)):  # one look each
        assert not any(run(gate, calls, functools.partial(kernel, gate, kept)))
    assert device.copies == 4
    assert any(run(gate, 8 * FIRST_LOOK, lambda: kernel(gate, 99)))


def test_after_a_dense_look_the_next_one_is_soon(device: Device) -> None:
    gate, device.arrived = Gate(), True
    run(gate, 4 * MOST_CALLS, lambda: kernel(gate, 0))
    copies, calls, found = device.copies, [], {}
    while not found:
        kernel(gate, 99)
        found = gate.look()
        calls.append(device.copies - copies)
    # Each look is judged in the call after it.
    assert len(calls) - calls.index(calls[-1] - 1) == FIRST_LOOK + 3


def test_a_replayed_graph_asks_for_no_counters(device: Device) -> None:
    gate, device.arrived = Gate(), True
    values = gate.counters(ANCHOR, DOWN, 0.6, 4)
    added = torch.tensor([0, 0, 9, 10])
    found = run(gate, TWO_LOOKS, lambda: values.add_(added))
    assert found[-1] == {DOWN: Finding(0.9, 4)}


def test_looks_become_rare_and_see_what_was_added_since(device: Device) -> None:
    gate, device.arrived = Gate(), True
    calls, kept = 8 * MOST_CALLS, 0

    def step() -> None:
        kernel(gate, kept)

    assert not any(run(gate, calls, step))
    doubled = (MOST_CALLS // FIRST_LOOK).bit_length()
    assert device.copies == doubled + 7
    kept = 61
    found = [finding for finding in run(gate, 2 * MOST_CALLS + 1, step) if finding]
    assert found[0][DOWN].density <= 0.61
    assert found[-1] == {DOWN: Finding(0.61, 4)}


def test_a_site_that_did_not_run_is_left_alone(device: Device) -> None:
    gate, device.arrived = Gate(), True
    gate.counters(ANCHOR, DOWN, 0.0, 4)
    assert not any(run(gate, 4 * FIRST_LOOK, lambda: None))


def test_nothing_is_copied_while_a_graph_is_captured(device: Device) -> None:
    gate, device.arrived = Gate(), True
    first = gate.counters(ANCHOR, DOWN, 0.6, 4)
    device.capturing = True
    assert gate.counters(ANCHOR, DOWN, 0.6, 4) is first
    fresh = gate.counters(ANCHOR, UP, 0.6, 4)
    assert fresh is not gate.counters(ANCHOR, UP, 0.6, 4)
    assert not any(run(gate, 4 * FIRST_LOOK, lambda: kernel(gate, 99)))
    assert device.copies == 0
    device.capturing = False
    assert not any(run(gate, 2, lambda: None))
    found = run(gate, FIRST_LOOK + 1, lambda: kernel(gate, 99))
    assert found[-1] == {DOWN: Finding(0.99, 4)}


def test_a_graph_without_counted_sites_is_not_looked_at(device: Device) -> None:
    assert not any(run(Gate(), 4 * FIRST_LOOK, lambda: None))
    assert device.copies == 0


def test_counters_outlive_the_model_of_a_captured_graph() -> None:
    gate = Gate()
    values = gate.counters(ANCHOR, DOWN, 0.6, 4)
    assert values.tolist() == [0] * len(ops.COUNTERS)
    assert any(kept is values for kept in density_gate._kept_forever)


def graph(code: types.CodeType, kept: int, tokens: int) -> Callable[[], None]:
    """A compiled graph of a GPU, of which only the kernels run from the second call."""
    values: list[torch.Tensor] = []

    def compiled() -> None:
        if not values:
            values.append(adaptation.gpu_site_counters(ANCHOR, DOWN, 0.6, tokens))
        values[0].add_(torch.tensor([0, 0, kept, 100]))

    return adaptation.observed(compiled, code)


def call(compiled: Callable[[], None], times: int = TWO_LOOKS) -> None:
    for _ in range(times):
        compiled()


def test_only_as_many_tokens_as_are_too_dense_are_demoted(
    recompiled: list[types.CodeType], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, adaptation.log.name)
    code = compile("pass", "decode", "exec")
    call(graph(code, kept=30, tokens=1))
    assert adaptation.demoted(code) == {}
    call(graph(code, kept=90, tokens=8))
    call(graph(code, kept=70, tokens=4))
    assert adaptation.demoted(code) == {DOWN: 4}
    call(graph(code, kept=99, tokens=8))
    assert adaptation.demoted(code) == {DOWN: 4}
    assert recompiled == [code, code]
    assert f"{DOWN}: 4 tokens together need 70 % of its neurons" in caplog.text
    call(graph(code, kept=61, tokens=1))
    assert f"{DOWN}: a token needs 61 % of its neurons; the next call" in caplog.text


def test_after_an_error_nothing_is_looked_at(device: Device) -> None:
    def fails() -> None:
        values = adaptation.gpu_site_counters(ANCHOR, DOWN, 0.6, 4)
        values += torch.tensor([0, 0, 99, 100])
        raise ValueError("out of memory")

    compiled = adaptation.observed(fails, compile("pass", "fails", "exec"))
    for _ in range(2 * FIRST_LOOK):
        with pytest.raises(ValueError, match="out of memory"):
            compiled()
    assert device.copies == 0


def test_outside_of_a_graph_counters_are_nobodys() -> None:
    first, second = (adaptation.gpu_site_counters(ANCHOR, DOWN) for _ in range(2))
    assert first is not second


def test_two_threads_count_in_the_graphs_that_they_run() -> None:
    both = threading.Barrier(2, timeout=20)
    found: dict[str, torch.Tensor] = {}

    def run_graph(name: str) -> None:
        def compiled() -> None:
            both.wait()
            found[name] = adaptation.gpu_site_counters(ANCHOR, DOWN, 0.6, 4)
            both.wait()

        adaptation.observed(compiled, compile("pass", name, "exec"))()

    other = threading.Thread(target=run_graph, args=("other",))
    other.start()
    run_graph("this")
    other.join()
    assert found["this"] is not found["other"]


def test_sites_that_others_add_are_not_looked_at_halfway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, locked = Gate(), []
    kernel(gate, 99)

    def is_capturing(device: torch.device) -> bool:
        locked.append(gate._lock.locked())
        return False

    monkeypatch.setattr(device_sums, "is_capturing", is_capturing)
    run(gate, FIRST_LOOK, lambda: None)
    assert locked == [True]


def test_a_thread_does_not_wait_for_another_ones_look(device: Device) -> None:
    gate, device.arrived = Gate(), True
    kernel(gate, 99)
    with gate._lock:
        assert not any(run(gate, 2 * FIRST_LOOK, lambda: None))
    assert device.copies == 0


def test_copies_lie_on_the_host_whatever_the_default_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Asked(Exception):
        pass

    def empty(*_: object, **how: object) -> None:
        raise Asked(how["device"], how["pin_memory"])

    monkeypatch.setattr(torch, "empty", empty)
    sums = types.SimpleNamespace(
        device=torch.device("cuda"), shape=(4,), dtype=torch.int64
    )
    with pytest.raises(Asked) as asked:
        device_sums.start_copies([Sums(sums)])  # type: ignore[arg-type]
    assert asked.value.args == ("cpu", True)


def test_counters_of_a_cpu_lie_there_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert adaptation.site_counters(ANCHOR, DOWN).device == ANCHOR.device


def test_each_device_is_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[list[torch.device]] = []
    sums = torch.tensor([0, 0, 9, 10])

    def start(sites: list[Sums]) -> device_sums.Copies:
        copied.append([each.values.device for each in sites])
        seen = (len(copied) + 1) // 2
        return device_sums.Copies((seen * sums).expand(len(sites), -1), None)

    monkeypatch.setattr(device_sums, "start_copies", start)
    gate, here, there = Gate(), torch.device("cpu"), torch.device("meta")
    for site in (DOWN, UP):
        for device in (here, there):
            anchor = torch.zeros(1, device=device)
            assert gate.counters(anchor, site, 0.6, 4).device == device
    found = run(gate, TWO_LOOKS, lambda: None)
    assert copied == 2 * [[here, here], [there, there]]
    assert found[-1] == dict.fromkeys((DOWN, UP), Finding(0.9, 4))
