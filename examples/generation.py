"""Language models behind one interface, for ``generate.py``: ours and transformers'.

Shape legend: ``B`` sequences (1), ``T`` tokens of this call, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_weights import make_sparse
from relu2_lm import load_model, tokens
from stdlib_text import heldout_bytes
from torch import Tensor, nn

from inductor_sparse import decisions
from inductor_sparse.bench.intervals import median
from inductor_sparse.bench.variants import SETTINGS, compiling

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron-tiny": ("Nemotron", {"hidden_size": 128, "intermediate_size": 1024}),
    "nemotron-wide": (
        "Nemotron",
        {
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "opt-tiny": ("OPT", {"hidden_size": 128, "ffn_dim": 1024}),
    "llama-relu": (  # gated
        "Llama",
        {"hidden_size": 128, "intermediate_size": 1024, "hidden_act": "relu"},
    ),
}
"""Random weights in the shapes of a family: architecture, and what is not default."""
WARMUP = 2
"""Calls before the timed ones: one compiles, one records CUDA graphs."""
SMALL = {
    "vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "word_embed_proj_dim": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class BadConfigError(ValueError):
    """There is no such configuration."""


class TooLongError(ValueError):
    """A text has more tokens than a model has positions."""


@dataclasses.dataclass
class LM:
    """``step(tokens_BT, cache, position)`` returns logits ``[B, T, V]``.

    ``new_cache()`` makes a cache of fixed size at a fixed address, which CUDA graphs
    need; ``position`` is where ``tokens_BT`` starts, as a 0-d tensor.
    """

    name: str
    step: Callable[[Tensor, Any, Tensor], Tensor]
    new_cache: Callable[[], Any]
    prompt_BT: Tensor


def shipped(prompt: int, new: int, device: str, dtype: torch.dtype) -> LM:
    """The model of this folder, on text it was not trained on."""
    model = load_model(dtype=dtype).to(device)
    check_positions(model.config, prompt, new)

    def new_cache() -> Any:
        cache = model.new_cache()
        for tensor in (part for layer in cache for part in layer):
            torch._dynamo.mark_static_address(tensor)
        return cache

    prompt_BT = tokens(heldout_bytes()[:prompt]).to(device)
    return LM("relu2_lm", model, new_cache, prompt_BT)


def from_transformers(model: nn.Module, name: str, prompt_BT: Tensor, new: int) -> LM:
    """A causal model of ``transformers`` with a static cache."""
    from transformers import StaticCache

    @torch.no_grad()
    def new_cache() -> Any:
        cache = StaticCache(config=model.config, max_cache_len=prompt_BT.shape[1] + new)
        # The first call of each layer makes its part, in the sizes of that layer: the
        # configuration does not say them alike in all families.
        model(prompt_BT[:, :1], past_key_values=cache, use_cache=True)
        cache.reset()
        return cache

    def step(tokens_BT: Tensor, cache: Any, position: Tensor) -> Tensor:
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) + position
        return model(
            tokens_BT,
            past_key_values=cache,
            position_ids=places_T[None],
            cache_position=places_T,
            use_cache=True,
        ).logits

    return LM(name, step, new_cache, prompt_BT)


def load(
    name: str | None, config: str | None, prompt: int, new: int, device: str, dtype: Any
) -> LM:
    """The shipped model, random weights of a configuration, or a pretrained model.

    ``config`` is one of :data:`TINY`, or a folder or JSON file of ``transformers``;
    ``name`` is what ``from_pretrained`` takes.

    Raises:
        BadConfigError: there is no such configuration.
        TooLongError: the model has fewer positions than prompt and new tokens.
    """
    if name is None and config is None:
        return shipped(prompt, new, device, dtype)
    import transformers

    torch.manual_seed(0)
    if name is None:
        made = configuration(config or "", prompt + new)
        check_positions(made, prompt, new)
        model = transformers.AutoModelForCausalLM.from_config(made).float()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(name)
        check_positions(model.config, prompt, new)
    model = model.to(device).eval().requires_grad_(False)
    prompt_BT = torch.randint(3, model.config.vocab_size, (1, prompt)).to(device)
    if name is None:
        make_sparse(model, prompt_BT)
    else:
        read = transformers.AutoTokenizer.from_pretrained(name)
        text = heldout_bytes()[: 8 * prompt].decode(errors="replace")
        prompt_BT = read(text, return_tensors="pt").input_ids[:, :prompt].to(device)
    return from_transformers(model.to(dtype), name or config or "", prompt_BT, new)


def configuration(name: str, positions: int) -> Any:
    """One of :data:`TINY` for texts of ``positions`` tokens, or one out of a file.

    Raises:
        BadConfigError: it is neither.
    """
    import transformers

    if name in TINY:
        family, sizes = TINY[name]
        given = {**SMALL, "max_position_embeddings": positions, **sizes}
        return getattr(transformers, f"{family}Config")(**given)
    if not Path(name).exists():
        known = ", ".join(TINY)
        raise BadConfigError(f"{name!r} is none of {known}, and no folder or file")
    return transformers.AutoConfig.from_pretrained(name)


def check_positions(config: Any, prompt: int, new: int) -> None:
    """Raise :class:`TooLongError` unless a text of so many tokens fits into a model."""
    # Not every family has such a limit, and ours calls it by another name.
    names = ("max_position_embeddings", "context")
    limit = next((x for n in names if (x := getattr(config, n, None))), None)
    if limit is not None and prompt + new > limit:
        raise TooLongError(
            f"{prompt} tokens of the prompt and {new} new ones are more than the "
            f"{limit} positions of the model"
        )


class Generator:
    """A model compiled by one backend; each call writes the greedy text once.

    One compiled function serves both phases, from the same weights: the number of
    tokens decides which of its graphs runs.  ``seconds`` and ``sites`` are filled in by
    phase: the time of each call, and the decisions of what was compiled in it.
    """

    def __init__(self, lm: LM, backend: str, new: int, options: dict[str, Any]) -> None:
        self.lm, self.new, self.cache = lm, new, lm.new_cache()
        self.step = torch.compile(
            lm.step, backend=backend, dynamic=False, options=options
        )
        self.seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
        self.sites: dict[str, list[decisions.Decision]] = {"prefill": [], "decode": []}

    @torch.no_grad()
    # The decisions on a graph out of a cache stayed with the process that compiled it.
    @compiling(SETTINGS[0])
    def __call__(self) -> list[int]:
        """Return the tokens that follow the prompt."""
        if hasattr(self.cache, "reset"):
            self.cache.reset()
        text_BT, position, made = self.lm.prompt_BT, 0, []
        for phase, count in (("prefill", 1), ("decode", self.new - 1)):
            with decisions.collect() as log:
                start = time.perf_counter()
                for _ in range(count):
                    place = torch.tensor(position, device=text_BT.device)
                    logits_V = self.step(text_BT, self.cache, place)[0, -1]
                    position += text_BT.shape[1]
                    made.append(int(logits_V.argmax()))
                    text_BT = text_BT.new_tensor([[made[-1]]])
                self.seconds[phase].append(time.perf_counter() - start)
            for graph in log.graphs:
                self.sites[phase] += graph.decisions
        return made

    def tokens_per_second(self) -> dict[str, float]:
        """The median of each phase, without the calls that compile and record."""
        counts = {"prefill": self.lm.prompt_BT.shape[1], "decode": self.new - 1}
        return {
            phase: counts[phase] / median(times[WARMUP:])
            for phase, times in self.seconds.items()
        }

    def table(self) -> dict[str, dict[str, str]]:
        """For each site and phase the op that computes it, or why it is dense."""
        rows: dict[str, dict[str, str]] = {}
        for phase, found in self.sites.items():
            for one in found:
                reason = one.reason.value if one.reason else ""
                site = one.module or one.source
                rows.setdefault(site, {})[phase] = reason or one.op
        return rows
