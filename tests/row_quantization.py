"""Activations in e4m3 with a scale for each row, as libraries write it."""

from __future__ import annotations

import torch
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
