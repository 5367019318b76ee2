"""Rows of ``docs/models.md``, read off the page and checked against ``explain``."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import inductor_sparse
from inductor_sparse.decisions import Reason, Status

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

# Loading a model class meets the deprecations of its own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \| (\d+) of (\d+) \|", re.MULTILINE)
ROWS = {name: row for name, *row in ROW.findall(PAGE.read_text())}
"""Class -> activation, FFNs that are applied, all FFNs."""

VOCABULARY, WIDTH, HIDDEN = 128, 64, 256

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BOTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_inner": HIDDEN,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
GEMMA3N: dict[str, Any] = DECODER | {
    "head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.95, 0.0],
    "altup_num_inputs": 2,
}
# The class, its configuration, the last part of the paths of its down projections.
CHECKED: dict[str, tuple[dict[str, Any], str]] = {
    "BitNetForCausalLM": (DECODER, "down_proj"),
    "Gemma3nForCausalLM": (GEMMA3N, "down_proj"),
    "LlamaForCausalLM": (DECODER | {"hidden_act": "relu"}, "down_proj"),
    "GPT2LMHeadModel": (GPT2 | {"activation_function": "relu"}, "c_proj"),
    "M2M100ForConditionalGeneration": (BOTH, "fc2"),
}
DENSE = {
    "LlamaForCausalLM": (DECODER, "down_proj"),
}


def down_projections(
    name: str, config: dict[str, Any], path: str
) -> list[inductor_sparse.decisions.Decision]:
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    model = kind(kind.config_class(**config)).eval()
    ids = torch.randint(3, VOCABULARY, (2, 8))
    second = {"decoder_input_ids": ids} if config.keys() >= BOTH.keys() else {}
    explanation = inductor_sparse.explain(model, ids, **second)
    return [site for site in explanation.sites if site.module.endswith(path)]


@pytest.mark.parametrize("name", CHECKED)
def test_row(name: str) -> None:
    activation, applied, ffns = ROWS[name]
    sites = down_projections(name, *CHECKED[name])
    assert len(sites) == int(ffns)
    runs_sparse = [site for site in sites if site.status is Status.APPLIED]
    assert len(runs_sparse) == int(applied)
    assert {"gated" in activation} == {s.rule == "gated_matmul" for s in runs_sparse}
    named = {s.activation.removesuffix("*up") for s in runs_sparse}
    words = activation.partition("`")[0].strip(" ,")
    assert named == {SPELLED[words.replace("gated", "").strip(" ,")]}


SPELLED = {"ReLU²": "relu2", "ReLU": "relu", "GELU of ReLU": "gelu(relu)"}
"""Activations of the page -> as decisions name them."""


@pytest.mark.parametrize("name", DENSE)
def test_nothing_to_gain(name: str) -> None:
    assert f"`{name}`" in PAGE.read_text().partition("## Nothing to gain")[2]
    sites = down_projections(name, *DENSE[name])
    assert {site.reason for site in sites} == {Reason.ACTIVATION_NOT_SPARSE}
    assert len(sites) == int(ROWS[name][2])


def test_the_page_is_read_whole() -> None:
    classes = re.findall(r"^\| `", PAGE.read_text(), re.MULTILINE)
    assert len(ROWS) == len(classes) > 50
