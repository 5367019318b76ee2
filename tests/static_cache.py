"""A model of transformers that generates with a key-value cache of fixed size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 512
DENSITY_SHIFT = 1.28
"""Standard deviations above which a tenth of a normal distribution lies."""


def nemotron(
    features: int, hidden: int, positions: int, layers: int, device: str = "cpu"
) -> Any:
    """Random weights; a tenth of the activations of each FFN is positive."""
    import transformers

    config = transformers.NemotronConfig(
        vocab_size=VOCABULARY,
        hidden_size=features,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        mlp_bias=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for layer in model.model.layers:
        up = layer.mlp.up_proj  # of what a norm has brought to unit variance
        deviation = up.weight.std().item() * features**0.5
        nn.init.constant_(up.bias, -DENSITY_SHIFT * deviation)
    return model.eval().to(device).requires_grad_(False)


class Chain:
    """Calls of a model that follow each other in one text.

    ``compile_options`` are of ``torch.compile``; without them the model runs as it is.
    """

    def __init__(
        self, model: nn.Module, positions: int, **compile_options: Any
    ) -> None:
        from transformers import StaticCache

        self.model, self.position = model, 0
        self.cache = StaticCache(config=model.config, max_cache_len=positions)
        # The first call of all makes the cache, which a graph must find in its place.
        model(self._tokens(1), past_key_values=self.cache, use_cache=True)
        self.cache.reset()
        self._step: Any = self._logits
        if compile_options:
            self._step = torch.compile(self._logits, **compile_options)

    def _tokens(self, count: int) -> Tensor:
        device = self.model.get_input_embeddings().weight.device
        return torch.zeros(1, count, dtype=torch.int64, device=device)

    def _logits(self, tokens_BT: Tensor, position: Tensor) -> Tensor:
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) + position
        return self.model(
            tokens_BT,
            past_key_values=self.cache,
            position_ids=places_T[None],
            cache_position=places_T,
            use_cache=True,
        ).logits

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of tokens that go on with the text."""
        position = torch.tensor(self.position, device=tokens_BT.device)
        self.position += tokens_BT.shape[1]
        return self._step(tokens_BT, position).clone()
