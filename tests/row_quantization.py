"""Activations in e4m3 with a scale for each row, and their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
LIMIT = torch.finfo(FP8).max

Quantized = tuple[Tensor, Tensor]


def by_division(h: Tensor) -> Quantized:
    """scale = amax / 448, as quantized inference writes it."""
    scale = (h.abs().amax(dim=-1, keepdim=True) / LIMIT).float().clamp(min=1e-12)
    return (h.float() / scale).clamp(-LIMIT, LIMIT).to(FP8), scale


def by_product(h: Tensor) -> Quantized:
    """scale = 448 / amax, as quantized training writes it."""
    amax = h.abs().amax(dim=-1, keepdim=True).double()
    scale = (LIMIT / amax.clamp(min=1e-12)).float()
    return (h.float() * scale).clamp(-LIMIT, LIMIT).to(FP8), scale.reciprocal()


def by_max(h: Tensor) -> Quantized:
    """scale = max / 448: the activation is never negative."""
    scale = h.max(dim=-1, keepdim=True)[0].float() / LIMIT
    return (h / scale).to(FP8), scale


def by_torchao(h: Tensor) -> Quantized:
    """As torchao 0.18 writes it: the scale is of bfloat16, and seen as blocks."""
    scale = (h.abs().amax(dim=[-1], keepdim=True) / LIMIT).float()
    q = (h.float() / scale).clamp(min=-LIMIT).clamp(max=LIMIT).to(FP8)
    return q, scale.unsqueeze(-1).view(scale.shape)


WAYS = [by_division, by_product, by_max, by_torchao]


def relu2(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


def product(q: Tensor, s: Tensor, w: Tensor, t: Tensor, **options: Any) -> Tensor:
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True, **options}
    rows = s.flatten(0, -2) if s.ndim else s
    out = torch._scaled_mm(q.flatten(0, -2), w.t(), rows, t, **options)
    return out.unflatten(0, q.shape[:-1])


def layer(
    quantize: Callable[[Tensor], Quantized], act: Callable[[Tensor], Tensor] = relu2
) -> Callable[..., Tensor]:
    def fn(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return product(*quantize(act(x)), w, t)

    return fn
