"""Generation dense and sparse: the text, the speeds, the sites of each phase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import generate
import generation
import pytest
import torch
from generation import Generator
from relu2_lm import LMConfig, ReLU2LM
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

TINY = LMConfig(d_model=32, layers=1, heads=2, hidden=128, context=64)
QUICK = ("--device", "cpu", "--prompt", "24", "--new", "4", "--repeats", "1")


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> ReLU2LM:
    """A model of random weights in the place of the shipped one."""
    torch.manual_seed(0)
    model = ReLU2LM(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    monkeypatch.setattr(generation, "load_model", lambda dtype: model.to(dtype))
    return model


@pytest.fixture
def _graph_caches() -> Iterator[None]:
    """As in a program, where what another process compiled is found in files."""
    with (
        inductor_config.patch(fx_graph_cache=True),
        functorch_config.patch(enable_autograd_cache=True),
    ):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_model", "_graph_caches")
def test_our_model_writes_the_same_dense_and_sparse_run_after_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        torch.compiler.reset()
        assert generate.main(*QUICK) == 0
        printed = capsys.readouterr().out
        assert "greedy text: the same" in printed
        row = "blocks.0.ffn.down  activation_spmm  activation_spmm"
        assert row in printed
        assert [line.split()[0] for line in printed.splitlines()[3:5]] == [
            "prefill",
            "decode",
        ]
    assert inductor_config.fx_graph_cache, "a setting was left changed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the dependencies of transformers
def test_models_of_transformers_by_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    assert generate.main("--config", "nemotron-tiny", *QUICK) == 0
    printed = capsys.readouterr().out
    assert "nemotron-tiny, float32, cpu, prompt of 24 tokens" in printed
    assert "model.layers.1.mlp.down_proj" in printed
    assert "greedy text: the same" in printed


class FakeGenerator:
    """Stands for a generator that writes a given text."""

    texts: ClassVar[dict[str, list[int]]] = {}
    sites: ClassVar[list[str]] = ["ffn.down"]

    def __init__(self, lm: Any, backend: str, new: int, options: Any) -> None:
        self.text = self.texts[backend]

    def __call__(self) -> list[int]:
        return self.text

    def tokens_per_second(self) -> dict[str, float]:
        return {"prefill": 10.0, "decode": 5.0}

    def table(self) -> dict[str, dict[str, str]]:
        return {site: {"prefill": "sparse24_mm"} for site in self.sites}


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize(
    ("sparse", "sites", "code"),
    [
        ([1, 2, 3], ["ffn.down"], 0),
        ([1, 5, 3], ["ffn.down"], 1),
        ([1, 2, 3], [], 1),
    ],
    ids=["same", "other text", "no site"],
)
def test_exit_code(
    sparse: list[int],
    sites: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        FakeGenerator, "texts", {"inductor": [1, 2, 3], "sparse": sparse}
    )
    monkeypatch.setattr(FakeGenerator, "sites", sites)
    monkeypatch.setattr(generate, "Generator", FakeGenerator)
    assert generate.main(*QUICK) == code
    printed = capsys.readouterr().out
    assert ("DIFFERENT at 1" in printed) == (sparse[1] == 5)
    assert ("ffn.down  sparse24_mm  -" in printed) == bool(sites)


@pytest.mark.usefixtures("tiny_model")
def test_eager_generation_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = generation.load(None, None, 8, 4, "cpu", torch.float32)
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    generator = Generator(lm, "eager", 4, {})
    first, again = generator(), generator()
    text = lm.prompt_BT[0].tolist()
    with torch.no_grad():
        for _ in range(4):
            text.append(int(lm.step(torch.tensor([text]))[0, -1].argmax()))
    assert first == again == text[8:]
    assert [len(times) for times in generator.seconds.values()] == [2, 2]


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--new", "1"), "argument --new: 2 or more: the first is of the prefill"),
        (("--new", "0"), "argument --new: '0' is not a whole number above 0"),
        (("--repeats", "0"), "argument --repeats: '0' is not a whole number above 0"),
        (("--prompt", "0"), "argument --prompt: '0' is not a whole number above 0"),
        (
            ("--prompt", "61", "--new", "4"),
            "61 tokens of the prompt and 4 new ones are more than the 64 positions "
            "of the model",
        ),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_what_cannot_be_generated_is_an_error(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        generate.main("--device", "cpu", *arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_text_may_fill_the_model(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"inductor": [1], "sparse": [1]}
    monkeypatch.setattr(FakeGenerator, "texts", texts)
    monkeypatch.setattr(generate, "Generator", FakeGenerator)
    argv = ("--device", "cpu", "--prompt", "60", "--new", "4", "--dtype", dtype)
    assert generate.main(*argv) == 0
    assert f"relu2_lm, {dtype}, cpu, prompt of 60 tokens" in capsys.readouterr().out
