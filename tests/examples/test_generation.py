"""Models of transformers for ``generate.py``: any of the family, without a network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import generate
import generation
import pytest
import torch
from generation import LM, Generator
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

# Loading a model class meets the deprecations of its own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT, NEW = 96, 4
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": PROMPT + NEW,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Nemotron": {},
    "Arcee": {},
    "BitNet": {},
    "Persimmon": {},
    "Llama": {"hidden_act": "relu"},
    "Gemma2": {"hidden_activation": "relu", "head_dim": 16},
    "OPT": {"ffn_dim": 256, "word_embed_proj_dim": 64},
    "Falcon": {
        "activation": "relu",
        "multi_query": True,
        "new_decoder_architecture": False,
    },
}


def config_of(family: str) -> Any:
    kind = getattr(transformers, f"{family}Config")
    return kind(**{**SIZES, **FAMILIES[family]})


def load(monkeypatch: pytest.MonkeyPatch, **of: Any) -> tuple[LM, nn.Module]:
    """What the example loads, and the module behind it."""
    seen: list[nn.Module] = []
    make = generation.from_transformers

    def spy(model: nn.Module, *args: Any) -> LM:
        seen.append(model)
        return make(model, *args)

    monkeypatch.setattr(generation, "from_transformers", spy)
    given = {"name": None, "config": None, **of}
    lm = generation.load(
        **given, prompt=PROMPT, new=NEW, device="cpu", dtype=torch.float32
    )
    return lm, seen[0]


def densities(model: nn.Module, tokens: torch.Tensor) -> list[float]:
    """The fraction of each ReLU's results that is not zero."""
    found: list[float] = []

    def look(_: nn.Module, __: Any, h: torch.Tensor) -> None:
        found.append(h.count_nonzero().item() / h.numel())

    for module in model.modules():
        if type(module).__name__ in ("ReLU", "ReLUSquaredActivation"):
            module.register_forward_hook(look)
    with torch.no_grad():
        model(tokens)
    return found


def uncached(model: nn.Module, prompt_BT: torch.Tensor) -> list[int]:
    """The greedy text, from the whole text so far for each token."""
    text_BT = prompt_BT
    with torch.no_grad():
        for _ in range(NEW):
            best_B = model(text_BT, use_cache=False).logits[:, -1].argmax(dim=-1)
            text_BT = torch.cat([text_BT, best_B[None]], dim=1)
    return text_BT[0, prompt_BT.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", ["", "config.json"])
def test_any_family_by_its_configuration(
    family: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of(family).save_pretrained(tmp_path)
    lm, model = load(monkeypatch, config=str(tmp_path / file))
    plain = transformers.AutoModelForCausalLM.from_config(config_of(family))
    assert list(model.state_dict()) == list(plain.state_dict())
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    generator = Generator(lm, "eager", NEW, {})
    assert generator() == generator() == uncached(model, lm.prompt_BT)
    for tokens in (lm.prompt_BT, torch.randint(3, 512, (1, PROMPT))):
        found = densities(model, tokens)
        assert len(found) == 2
        assert all(0.05 < density < 0.2 for density in found), found


@pytest.mark.parametrize("name", ["llama-relu", "opt-tiny"])
def test_families_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, model = load(monkeypatch, config=name)
    assert lm.name == name
    assert hasattr(model.model, "layers") == (name == "llama-relu")
    found = densities(model, lm.prompt_BT)
    assert all(0.05 < density < 0.2 for density in found), found


def tokenizer() -> Any:
    """One token a byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: n for n, letter in enumerate(letters)}, [])
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_pretrained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = transformers.AutoModelForCausalLM.from_config(config_of("Nemotron"))
    saved.save_pretrained(tmp_path)
    of_bytes = tokenizer()
    of_bytes.save_pretrained(tmp_path)
    lm, model = load(monkeypatch, name=str(tmp_path))
    mine, theirs = model.state_dict(), saved.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    text = generation.heldout_bytes()[:PROMPT].decode()
    assert lm.prompt_BT.tolist() == [of_bytes(text).input_ids]
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    assert Generator(lm, "eager", NEW, {})() == uncached(model, lm.prompt_BT)


@pytest.mark.parametrize("option", ["--config", "--model"])
def test_a_text_longer_than_the_model_is_an_error(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = transformers.AutoModelForCausalLM.from_config(config_of("OPT"))
    saved.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        generate.main(option, str(tmp_path), "--prompt", "99", "--new", "2")
    error = capsys.readouterr().err
    assert "99 tokens of the prompt and 2 new ones are more than the 100 pos" in error


def test_an_unknown_configuration_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        generate.main("--config", "nemotron-huge")
    error = capsys.readouterr().err
    assert "'nemotron-huge' is none of nemotron-tiny, nemotron-wide, " in error
