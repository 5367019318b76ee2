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
