"""Random weights that leave as few activations as training would, for ``generate.py``.

Shape legend: ``B`` sequences, ``T`` tokens, ``D`` features, ``F`` hidden features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATIONS = ("ReLU", "ReLUSquaredActivation")
"""Classes of activations that have exact zeros, torch's and those of transformers."""
QUANTILE = 0.9
SAMPLES = 100_000


@torch.no_grad()
def make_sparse(model: nn.Module, prompt_BT: Tensor) -> None:
    """Shift what enters each ReLU so that a tenth of the activations is positive.

    Random weights alone leave a half.  A layer with a bias is shifted by it.  Most
    families have none: there every embedding gets one direction in common, which the
    residual stream carries to all layers, and the layer's weight reads the shift off
    what its inputs have in common.
    """
    embedding_VD: Tensor = model.get_input_embeddings().weight
    common_D = torch.randn_like(embedding_VD[0])
    # Half as long as an embedding: tokens still differ by more than they share.
    embedding_VD += common_D * (embedding_VD.std() / 2)
    last: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def remember(layer: nn.Linear, given: tuple[Tensor, ...], z: Tensor) -> None:
        last[:] = [(layer, given[0], z)]

    def shift(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        layer, x, z = last[0]
        # Something in between, as a norm would be, has the last word on the density.
        return (shifted(layer, x, z),) if z is given[0] else given

    hooks = [
        module.register_forward_hook(remember)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ] + [
        module.register_forward_pre_hook(shift)
        for module in model.modules()
        if type(module).__name__ in ACTIVATIONS
    ]
    model(prompt_BT)
    for hook in hooks:
        hook.remove()


def shifted(layer: nn.Linear, x_BTD: Tensor, z_BTF: Tensor) -> Tensor:
    """Change ``layer`` so that a tenth of what it makes of ``x`` is positive.

    Args:
        layer: changed in place.
        x_BTD: what it was given.
        z_BTF: what it made of it.

    Returns:
        What it makes of it now.
    """
    sample = z_BTF.flatten()[:: max(1, z_BTF.numel() // SAMPLES)]
    surplus = sample.quantile(QUANTILE)
    if layer.bias is not None:
        layer.bias -= surplus
        return z_BTF - surplus
    mean_D = x_BTD.flatten(0, -2).mean(dim=0)
    reader_D = mean_D / mean_D.dot(mean_D)  # 1 on the mean, about 1 on each token
    layer.weight -= surplus * reader_D
    return z_BTF - surplus * (x_BTD @ reader_D)[..., None]
