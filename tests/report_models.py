"""Small models whose sites are known by construction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

FEATURES, HIDDEN = 16, 64
Activation = Callable[[Tensor], Tensor]


def relu2(z: Tensor) -> Tensor:
    return torch.relu(z) ** 2


class FFN(nn.Module):
    """``down(act(up(x)))``, spelled as in most language models."""

    def __init__(self, act: Activation = relu2) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, HIDDEN)
        self.down = nn.Linear(HIDDEN, FEATURES)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Stack(nn.Module):
    """FFNs with a residual, one for each activation."""

    def __init__(self, *acts: Activation) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FFN(act) for act in acts)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Broken(nn.Module):
    """Two FFNs with a graph break between them."""

    def __init__(self, first: Activation = relu2, second: Activation = relu2) -> None:
        super().__init__()
        self.first = FFN(first)
        self.second = FFN(second)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, FEATURES, generator=torch.Generator().manual_seed(0))
