"""Language models behind one interface, for ``generate.py``: ours and transformers'.

Shape legend: ``B`` sequences (1), ``T`` tokens of this call, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
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
}
"""Random weights in the shapes of a family: architecture, and what is not default."""
WARMUP = 2
"""Calls before the timed ones: one compiles, one records CUDA graphs."""
SMALL = {
    "vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "word_embed_proj_dim": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "mlp_bias": True,
}  # fmt: skip


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


def shipped(prompt: int, device: str, dtype: torch.dtype) -> LM:
    """The model of this folder, on text it was not trained on."""
    model = load_model(dtype=dtype).to(device)

    def new_cache() -> Any:
        cache = model.new_cache()
        for tensor in (part for layer in cache for part in layer):
            torch._dynamo.mark_static_address(tensor)
        return cache

    prompt_BT = tokens(heldout_bytes()[:prompt]).to(device)
    return LM("relu2_lm", model, new_cache, prompt_BT)


def from_transformers(
    model: nn.Module, name: str, prompt_BT: Tensor, new: int, dtype: torch.dtype
) -> LM:
    """A causal model of ``transformers`` with a static cache."""
    from transformers import StaticCache

    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads

    def new_cache() -> Any:
        cache = StaticCache(config=config, max_cache_len=prompt_BT.shape[1] + new)
        cache.early_initialization(1, heads, width, dtype, prompt_BT.device)
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


@torch.no_grad()
def make_sparse(model: nn.Module, prompt_BT: Tensor) -> None:
    """Choose biases that leave a tenth of the activations positive, as training would.

    Random weights alone leave a half.
    """

    def shift(module: nn.Module, _: Any, z: Tensor) -> Tensor:
        surplus = z.flatten()[:: max(1, z.numel() // 100_000)].quantile(0.9)
        module.bias -= surplus
        return z - surplus

    hooks = [
        module.register_forward_hook(shift)
        for name, module in model.named_modules()
        if name.endswith(("up_proj", "fc1"))
    ]
    model(prompt_BT)
    for hook in hooks:
        hook.remove()


def load(
    name: str | None, config: str | None, prompt: int, new: int, device: str, dtype: Any
) -> LM:
    """The shipped model, one of :data:`TINY`, or a pretrained one by its name."""
    if name is None and config is None:
        return shipped(prompt, device, dtype)
    import transformers

    torch.manual_seed(0)
    if name is None:
        family, sizes = TINY[config or ""]
        given = {**SMALL, "max_position_embeddings": prompt + new, **sizes}
        made = getattr(transformers, f"{family}Config")(**given)
        model = transformers.AutoModelForCausalLM.from_config(made)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(name)
    model = model.to(device).eval().requires_grad_(False)
    prompt_BT = torch.randint(3, model.config.vocab_size, (1, prompt)).to(device)
    if name is None:
        make_sparse(model, prompt_BT)
    else:
        read = transformers.AutoTokenizer.from_pretrained(name)
        text = heldout_bytes()[: 8 * prompt].decode(errors="replace")
        prompt_BT = read(text, return_tensors="pt").input_ids[:, :prompt].to(device)
    model = model.to(dtype)
    return from_transformers(model, name or config or "", prompt_BT, new, dtype)


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
