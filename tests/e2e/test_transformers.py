"""FFNs of models from transformers: found in the whole model, right when compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from e2e.checks import compare, compile_and_compare, outcomes
from torch import Tensor, nn

import inductor_sparse
from inductor_sparse.decisions import collect

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

# Loading a model class meets the deprecations of its own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY, WIDTH, HIDDEN, LAYERS = 128, 64, 256, 2
TOKENS = (2, 8)

_USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "ffn_dim": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_ff": HIDDEN,
    "d_kv": 16,
    "num_layers": LAYERS,
    "num_heads": 4,
    "feed_forward_proj": "relu",
}

# Model class, its configuration, the modules of its down projections, the rule.
MODELS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "Nemotron": (
        "NemotronForCausalLM",
        _USUAL | {"num_key_value_heads": 2, "head_dim": 16},
        "model.layers.{}.mlp.down_proj",
        "relu_squared_matmul",
    ),
    "BitNet": (
        "BitNetForCausalLM",
        _USUAL | {"num_key_value_heads": 2},
        "model.layers.{}.mlp.down_proj",
        "gated_matmul",
    ),
    "Persimmon": (
        "PersimmonForCausalLM",
        _USUAL,
        "model.layers.{}.mlp.dense_4h_to_h",
        "relu_squared_matmul",
    ),
    "Arcee": (
        "ArceeForCausalLM",
        _USUAL | {"num_key_value_heads": 2},
        "model.layers.{}.mlp.down_proj",
        "relu_squared_matmul",
    ),
    "OPT": ("OPTForCausalLM", _OPT, "model.decoder.layers.{}.fc2", "relu_matmul"),
    "T5Encoder": (
        "T5EncoderModel",
        _T5,
        "encoder.block.{}.layer.1.DenseReluDense.wo",
        "relu_matmul",
    ),
}


def build(model_class: str, config: dict[str, Any]) -> nn.Module:
    """A model with random weights, ready for inference."""
    kind = getattr(transformers, model_class)
    return kind(kind.config_class(**config)).eval()


def token_ids() -> Tensor:
    return torch.randint(3, VOCABULARY, TOKENS)


@pytest.mark.parametrize("name", MODELS)
def test_every_down_projection_is_applied(name: str) -> None:
    model_class, config, path, rule = MODELS[name]
    explanation = inductor_sparse.explain(build(model_class, config), token_ids())
    sites = explanation.to_dict()["sites"]
    assert [(s["module"], s["rule"], s["status"]) for s in sites] == [
        (path.format(layer), rule, "applied") for layer in range(LAYERS)
    ]
    tokens = TOKENS[0] * TOKENS[1]
    assert sites[0]["shapes"] == {"M": tokens, "K": HIDDEN, "N": WIDTH}
    assert 0.3 < sites[0]["density"] < 0.7


def test_encoder_and_decoder() -> None:
    model = build("T5ForConditionalGeneration", _T5 | {"num_layers": 1})
    ids = token_ids()
    explanation = inductor_sparse.explain(model, ids, decoder_input_ids=ids)
    ended = [(s["module"], s["status"]) for s in explanation.to_dict()["sites"]]
    assert ended == [
        ("encoder.block.0.layer.1.DenseReluDense.wo", "applied"),
        ("decoder.block.0.layer.2.DenseReluDense.wo", "applied"),
    ]


def nemotron_mlp() -> nn.Module:
    return build(*MODELS["Nemotron"][:2]).model.layers[0].mlp


def nemotron_h_mlp() -> nn.Module:
    from transformers.models.nemotron_h import modeling_nemotron_h

    # The whole model needs the kernels of Mamba; its dense FFN is an ordinary module.
    config = transformers.NemotronHConfig(hidden_size=WIDTH, intermediate_size=HIDDEN)
    return modeling_nemotron_h.NemotronHMLP(config)


def bitnet_mlp() -> nn.Module:
    return build(*MODELS["BitNet"][:2]).model.layers[0].mlp


def persimmon_mlp() -> nn.Module:
    return build(*MODELS["Persimmon"][:2]).model.layers[0].mlp


def arcee_mlp() -> nn.Module:
    return build(*MODELS["Arcee"][:2]).model.layers[0].mlp


def t5_mlp() -> nn.Module:
    return build(*MODELS["T5Encoder"][:2]).encoder.block[0].layer[1]


BLOCKS = (nemotron_mlp, nemotron_h_mlp, bitnet_mlp, persimmon_mlp, arcee_mlp, t5_mlp)


@pytest.mark.parametrize("block", BLOCKS)
def test_compiled_ffn_is_right(block: Callable[[], nn.Module]) -> None:
    _, decisions = compile_and_compare(block().eval(), torch.randn(*TOKENS, WIDTH))
    assert outcomes(decisions) == ["applied"]


def test_nemotron_mlp_in_bfloat16() -> None:
    x = torch.randn(1, WIDTH, dtype=torch.bfloat16)
    _, decisions = compile_and_compare(nemotron_mlp().bfloat16(), x)
    assert outcomes(decisions) == ["applied"]
    assert decisions[0].dtype == "bfloat16"


class Logits(nn.Module):
    """A language model as a function of its tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def test_rwkv_is_applied_once_its_weights_are_rescaled() -> None:
    """The first call of RWKV divides weights in place, the later ones only use them."""
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "context_length": 16,
        "rescale_every": 1,
    }
    model = build("RwkvForCausalLM", config)
    first = inductor_sparse.explain(model, token_ids())
    later = inductor_sparse.explain(model, token_ids())

    def feed_forward(explanation: inductor_sparse.report.Explanation) -> list[str]:
        sites = explanation.to_dict()["sites"]
        return [
            s["reason"] or s["status"] for s in sites if "feed_forward" in s["module"]
        ]

    assert feed_forward(first) == ["weight-not-static"] * LAYERS
    assert feed_forward(later) == ["applied"] * LAYERS


@pytest.mark.slow
def test_whole_models_compile_and_are_right() -> None:
    ids = token_ids()
    with collect() as log, torch.no_grad():
        for name in ("Nemotron", "OPT"):
            model = Logits(build(*MODELS[name][:2]))
            compare(torch.compile(model, backend="sparse"), model, ids)
    assert outcomes(log.decisions) == ["applied"] * 2 * LAYERS
