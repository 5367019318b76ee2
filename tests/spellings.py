"""Ways to write ReLU and ReLU²."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def named_twice(x: Tensor) -> Tensor:
    r = F.relu(x)
    return r * r


def negatives_by_index(x: Tensor) -> Tensor:
    h = x.clone()
    h[h < 0] = 0
    return h**2


RELU: dict[str, Activation] = {
    "relu": F.relu,
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "hardtanh": lambda x: F.hardtanh(x, 0, float("inf")),
    "where": lambda x: torch.where(x < 0, 0, x),
    "in float32": lambda x: F.relu(x.float()).to(x.dtype),
}
"""Equal to relu(x) on every input, so the kernel can do it."""

RELU_KEPT: dict[str, Activation] = {
    "where(x > 0)": lambda x: torch.where(x > 0, x, 0),
    "x * (x > 0)": lambda x: x * (x > 0),
    "scale": lambda x: F.relu(x) * 2,
}
"""Differ from relu(x), some of them only where x is NaN, so their nodes stay."""

RELU2: dict[str, Activation] = {
    "torch.square": lambda x: torch.square(F.relu(x)),
    "method square": lambda x: x.relu().square(),
    "int power": lambda x: F.relu(x) ** 2,
    "float power": lambda x: F.relu(x) ** 2.0,
    "torch.pow": lambda x: torch.pow(torch.relu(x), 2),
    "in place": lambda x: (x + 0).relu_().pow_(2),
    "r * r": named_twice,
    "relu(x) * relu(x)": lambda x: F.relu(x) * F.relu(x),
    "clamp": lambda x: x.clamp(min=0) ** 2,
    "clamp to inf": lambda x: x.clamp(0, math.inf).square(),
    "clamp_min": lambda x: torch.clamp_min(x, 0).square(),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)) ** 2,
    "maximum, zero first": lambda x: torch.maximum(torch.zeros_like(x), x) ** 2,
    "threshold": lambda x: F.threshold(x, 0, 0) ** 2,
    "hardtanh": lambda x: F.hardtanh(x, 0, math.inf) ** 2,
    "where(x <= 0)": lambda x: torch.where(x <= 0, 0, x**2),
    "where(x < 0)": lambda x: torch.where(x < 0, 0, x * x),
    "by index": negatives_by_index,
    "in float32": lambda x: (F.relu(x.float()) ** 2).to(x.dtype),
    "square in float32": lambda x: F.relu(x).float().square().to(x.dtype),
}
"""Equal to relu(x) ** 2 on every input, so the kernel can do it."""

RELU2_KEPT: dict[str, Activation] = {
    "relu(x) * x": lambda x: F.relu(x) * x,
    "x * x * (x > 0)": lambda x: x * x * (x > 0),
    "x * (x > 0) * x": lambda x: x * (x > 0) * x,
    "where(x > 0)": lambda x: torch.where(x > 0, x * x, 0),
    "where(x > 0, zeros)": lambda x: torch.where(x > 0, x * x, torch.zeros_like(x)),
    "relu of where": lambda x: torch.where(x > 0, x, 0) ** 2,
}
"""Differ from relu(x) ** 2 where x is NaN or infinite, so their nodes stay."""
