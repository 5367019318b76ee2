"""A byte-level decoder language model whose feed-forward layers use squared ReLU.

Shape legend: ``B`` sequences, ``T`` tokens of this call, ``S`` cache length (the
context), ``D`` model width, ``F`` hidden width, ``H`` heads, ``E`` width of one head,
``V`` vocabulary (256 bytes).
"""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_sparse.errors import CheckpointError

DEFAULT_CHECKPOINT = Path(__file__).with_name("relu2_lm.pt")
FORMAT = "inductor_sparse example relu2_lm"
VERSION = 1
# For each layer its keys and its values, both (B, 1, S, E).
KVCache = tuple[tuple[Tensor, Tensor], ...]
Step = Callable[[Tensor, KVCache, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Sizes of the model; ``hidden`` is the width that ReLU² makes sparse."""

    d_model: int = 320
    layers: int = 4
    heads: int = 5
    hidden: int = 2560
    context: int = 512
    vocab: int = 256

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.d_model % (2 * self.heads):
            raise ValueError(
                f"d_model ({self.d_model}) must be an even multiple of "
                f"heads ({self.heads})"
            )


class ReLU2FFN(nn.Module):
    """``down(relu(up(x))²)``, as in Primer (So et al., 2021, arXiv:2109.08668)."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``; most of the ``F`` hidden values are 0."""
        return self.down(F.relu(self.up(x_BTD)).square())


def _rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021, arXiv:2104.09864), halves convention."""
    low, high = x_BHTE.chunk(2, dim=-1)
    return torch.cat(
        (low * cos_TE - high * sin_TE, high * cos_TE + low * sin_TE), dim=-1
    )


class Attention(nn.Module):
    """Causal multi-query attention: all heads share one key and value head."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.heads, self.width = config.heads, config.d_model // config.heads
        self.q = nn.Linear(config.d_model, config.d_model, bias=False)
        self.kv = nn.Linear(config.d_model, 2 * self.width, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer_cache: tuple[Tensor, Tensor] | None,
        positions_T: Tensor,
    ) -> Tensor:
        """Attend to this call's tokens or, with a cache, to all tokens so far."""
        q_BHTE = self.q(x_BTD).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        k_B1TE, v_B1TE = self.kv(x_BTD).unsqueeze(1).chunk(2, dim=-1)
        q_BHTE = _rotate(F.rms_norm(q_BHTE, (self.width,)), *rotary)
        k_B1TE = _rotate(F.rms_norm(k_B1TE, (self.width,)), *rotary)
        mask_TS = None
        if layer_cache is not None:
            keys, values = layer_cache
            k_B1TE = keys.index_copy_(2, positions_T, k_B1TE.to(keys.dtype))
            v_B1TE = values.index_copy_(2, positions_T, v_B1TE.to(values.dtype))
            slots_S = torch.arange(keys.shape[2], device=keys.device)
            mask_TS = slots_S <= positions_T[:, None]
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            k_B1TE.expand(-1, self.heads, -1, -1).to(q_BHTE.dtype),
            v_B1TE.expand(-1, self.heads, -1, -1).to(q_BHTE.dtype),
            attn_mask=mask_TS,
            is_causal=mask_TS is None,
        )
        return self.out(y_BHTE.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm ReLU² feed-forward layer."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.ffn = ReLU2FFN(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer_cache: tuple[Tensor, Tensor] | None,
        positions_T: Tensor,
    ) -> Tensor:
        """Return the residual stream ``(B, T, D)`` after this layer."""
        x_BTD = x_BTD + self.attention(
            self.attention_norm(x_BTD), rotary, layer_cache, positions_T
        )
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class ReLU2LM(nn.Module):
    """The language model; ``model(tokens)`` for text, plus a cache for decoding."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.head = nn.Linear(config.d_model, config.vocab, bias=False)
        width = config.d_model // config.heads
        rate_E = 10000.0 ** (-torch.arange(0, width, 2) / width)
        angle_SE = torch.arange(config.context)[:, None] * rate_E
        self.register_buffer("cos_SE", angle_SE.cos(), persistent=False)
        self.register_buffer("sin_SE", angle_SE.sin(), persistent=False)
        for block in self.blocks:  # every block starts as the identity
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.ffn.down.weight)
        nn.init.zeros_(self.head.weight)

    def new_cache(self, batch: int = 1) -> KVCache:
        """Return an empty cache of fixed size for ``batch`` sequences."""
        width = self.config.d_model // self.config.heads
        shape = (batch, 1, self.config.context, width)
        make = self.embed.weight.new_zeros
        return tuple((make(shape), make(shape)) for _ in self.blocks)

    def forward(
        self,
        tokens_BT: Tensor,
        cache: KVCache | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Return the next-byte logits ``(B, T, V)``.

        Args:
            tokens_BT: Integer bytes, ``T`` at most the context.
            cache: From :meth:`new_cache`; updated in place.  Without it the tokens
                are a whole text of their own.
            position: 0-d ``int64``: where in the cached text ``tokens_BT`` starts
                (default 0).  A tensor, so that decoding compiles once.
        """
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        if position is not None:
            positions_T = positions_T + position
        rotary = (self.cos_SE[positions_T], self.sin_SE[positions_T])
        x_BTD = self.embed(tokens_BT)
        for index, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[index]
            x_BTD = block(x_BTD, rotary, layer_cache, positions_T)
        return self.head(self.norm(x_BTD))


def tokens(text: bytes) -> Tensor:
    """Return ``text`` as a ``(1, T)`` ``int64`` tensor, one token a byte."""
    return torch.tensor(list(text), dtype=torch.int64)[None]


@torch.no_grad()
def generate(
    step: Step,
    prompt: bytes,
    count: int,
    cache: KVCache,
    *,
    greedy: bool = True,
    seed: int = 0,
) -> bytes:
    """Continue ``prompt`` by ``count`` bytes and return the continuation.

    ``step`` is the model or a compiled model; ``cache`` comes from
    :meth:`ReLU2LM.new_cache` and ``len(prompt) + count`` must fit into the context.
    Without ``greedy``, bytes are drawn at temperature 0.8 from ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    logits_V = step(tokens(prompt), cache, torch.tensor(0))[0, -1]
    made = bytearray()
    while True:
        if greedy:
            made.append(int(logits_V.argmax()))
        else:
            chance_V = (logits_V.float() / 0.8).softmax(-1)
            made.append(int(torch.multinomial(chance_V, 1, generator=generator)))
        if len(made) >= count:
            return bytes(made)
        position = torch.tensor(len(prompt) + len(made) - 1)
        logits_V = step(tokens(bytes(made[-1:])), cache, position)[0, -1]


def save_model(
    model: ReLU2LM, metadata: dict[str, Any], path: str | Path = DEFAULT_CHECKPOINT
) -> None:
    """Write a half-precision checkpoint, whole or not at all."""
    path = Path(path)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": dataclasses.asdict(model.config),
        "state_dict": {name: t.half() for name, t in model.state_dict().items()},
        "metadata": metadata,
    }
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)  # atomic: a killed training leaves the previous checkpoint


def load_checkpoint(path: str | Path = DEFAULT_CHECKPOINT) -> dict[str, Any]:
    """Read a checkpoint without running any code stored in it.

    Raises:
        CheckpointError: The file is missing, truncated, corrupt or something else.
    """
    path = Path(path)
    remedy = "make one with examples/train_relu2_lm.py or restore the shipped file"
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load verifies no checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError,
        ValueError, LookupError, TypeError, AttributeError,
    ) as e:  # fmt: skip
        raise CheckpointError(f"{path} is corrupt or no checkpoint: {remedy}") from e
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a checkpoint of another model: {remedy}")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {content.get('version')!r}, not {VERSION}: {remedy}"
        )
    return content


def load_model(
    path: str | Path = DEFAULT_CHECKPOINT, dtype: torch.dtype = torch.float32
) -> ReLU2LM:
    """Return the model of a checkpoint in eval mode, without gradients, in ``dtype``.

    Raises:
        CheckpointError: See :func:`load_checkpoint`; or weights and sizes disagree.
    """
    content = load_checkpoint(path)
    try:
        model = ReLU2LM(LMConfig(**content["config"]))
        model.load_state_dict(content["state_dict"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise CheckpointError(f"{path} does not describe this model: {e}") from e
    return model.to(dtype).eval().requires_grad_(False)
