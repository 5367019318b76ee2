"""The quickstart: what it prints, and when it says that something is wrong."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import lm_speed
import pytest
import quickstart
import torch
from relu2_lm import LMConfig, ReLU2LM
from torch import Tensor, nn

from inductor_sparse.bench.variants import SETTINGS, Setting

TINY = LMConfig(d_model=32, layers=1, heads=2, hidden=64, context=512)


def tiny_model() -> ReLU2LM:
    torch.manual_seed(0)
    model = ReLU2LM(TINY)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@dataclasses.dataclass
class Fake:
    """Stands for a compiled step that always predicts ``byte``."""

    backend: str = "inductor"
    setting: Setting = SETTINGS[0]
    byte: int = ord("a")
    nats: float = 1.0
    cache: tuple[()] = ()

    def step(self, tokens_BT: Tensor, cache: Any, position: Tensor) -> Tensor:
        logits_BTV = torch.zeros(*tokens_BT.shape, 256)
        logits_BTV[..., self.byte] = 1
        return logits_BTV

    def loss(self) -> float:
        return self.nats


@pytest.mark.slow
def test_quick_run_is_correct_and_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "load_model", tiny_model)
    assert quickstart.main("--quick") == 0
    torch.compiler.reset()
    printed, progress = capsys.readouterr()
    assert "1 of 1 site" in printed
    assert "greedy text:   the same" in printed
    rows = [line.split() for line in printed.splitlines() if " default " in line]
    assert [row[:2] for row in rows] == [
        [phase, backend]
        for phase in ("prefill", "decode")
        for backend in ("inductor", "sparse")
    ]
    assert "4/4 compiled: decode, sparse, default" in progress


@pytest.mark.parametrize(
    ("sparse", "same"),
    [
        (Fake(), True),
        (Fake(nats=1.00009), True),
        (Fake(nats=1.00011), False),
        (Fake(byte=ord("b")), False),
    ],
)
def test_other_text_or_loss_is_noticed(
    sparse: Fake, same: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    phases: Any = {phase: [Fake(), sparse] for phase in ("prefill", "decode")}
    assert quickstart.same_results(phases, b"x" * 256) is same
    printed = capsys.readouterr().out
    assert ("DIFFERENT" in printed) is (sparse.byte == ord("b"))
    assert "x" * 80 + chr(sparse.byte) * 80 in printed


def test_what_a_terminal_would_obey_is_not_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    phases: Any = {phase: [Fake(byte=27)] * 2 for phase in ("prefill", "decode")}
    assert quickstart.same_results(phases, b"x" * 256)
    printed = capsys.readouterr().out
    assert "x?" in printed
    assert "\x1b" not in printed


def test_speed_is_compared_with_the_best_dense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = [[10.0, 11.0, 10.0], [20.0, 20.0, 21.0], [50.0, 50.0, 50.0]]
    monkeypatch.setattr(quickstart, "tokens_per_second", lambda variants, _: rates)
    variants: Any = [Fake(), Fake(setting=SETTINGS[1]), Fake("sparse", SETTINGS[1])]
    quickstart.compare_speed({"decode": variants}, seconds=0)
    printed = capsys.readouterr().out
    slow, best, sparse = (line for line in printed.splitlines() if "decode" in line)
    assert slow.split()[:5] == ["decode", "inductor", "default", "10", "0.50x"]
    assert best.split() == ["decode", "inductor", "freezing", "20", "best", "dense"]
    assert sparse.split()[:5] == ["decode", "sparse", "freezing", "50", "2.50x"]


def test_rounds_are_real_text_in_its_place() -> None:
    text = bytes(range(256)) * 3
    prompts, pieces = lm_speed.rounds_of(text, context=300)
    assert [len(calls) for calls in prompts] == [1, 1, 1]
    assert [len(calls) for calls in pieces] == [8, 8, 8, 8, 8, 4]
    in_order = [*prompts[0], *itertools.chain.from_iterable(pieces)]
    for tokens_BT, position in in_order:
        start = int(position)
        count = tokens_BT.shape[1]
        assert tokens_BT[0].tolist() == list(text[start : start + count])
