"""Activations and weights like those of a trained model, at any size.

The source is the byte-level language model of ``examples/``: what its FFNs saw and
computed on text it was not trained on.  Neurons that fire together, rows that are
denser than others and magnitudes far from normal are thereby kept; the size is reached
by tiling.  The asked density is reached by one threshold for all neurons.

Shape legend: ``T`` tokens of the source, ``L`` layers, ``d`` its features, ``f`` its
hidden features; ``M`` tokens, ``D`` features, ``F`` hidden features of the result.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from inductor_sparse.errors import SparseOptionError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WINDOWS, LENGTH = 8, 512
QUANTILE_SAMPLE = 2**20


@dataclasses.dataclass(frozen=True)
class Source:
    """What a model's FFNs saw: inputs ``[L, T, d]``, and weights ``[L, f, d]``."""

    inputs_LTd: Tensor
    up_Lfd: Tensor

    @functools.cached_property
    def pre_activations_LTf(self) -> Tensor:
        """Input of the activation, of unit variance in every layer."""
        z_LTf = self.inputs_LTd @ self.up_Lfd.mT
        return z_LTf / z_LTf.std(dim=(1, 2), keepdim=True)


@functools.cache
def source(device: str) -> Source:
    """Run the shipped model on held-out text, once per process.

    Raises:
        SparseOptionError: this is no checkout: the examples are not there.
    """
    if not (EXAMPLES / "relu2_lm.py").exists():
        raise SparseOptionError(
            f"trained data comes from the examples of a checkout; {EXAMPLES} has none"
        )
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    model = importlib.import_module("relu2_lm").load_model().to(device)
    text = importlib.import_module("stdlib_text").heldout_bytes()
    seen: list[Tensor] = []
    for block in model.blocks:
        block.ffn.up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    windows = torch.tensor(list(text[: WINDOWS * LENGTH]), device=device)
    with torch.no_grad():
        model(windows.view(WINDOWS, LENGTH))
    up_Lfd = torch.stack([block.ffn.up.weight for block in model.blocks])
    return Source(torch.stack([x.flatten(0, 1) for x in seen]), up_Lfd.detach())


def threshold(z: Tensor, density: float) -> float:
    """The value that the fraction ``density`` of ``z`` (any shape) exceeds."""
    sample = z.flatten()
    sample = sample[:: max(1, sample.numel() // QUANTILE_SAMPLE)]
    rank = round((1.0 - density) * (sample.numel() - 1))
    return sample.sort().values[rank].item()


def pre_activation(
    source: Source, tokens: int, hidden: int, density: float, seed: int
) -> Tensor:
    """``[M, F]`` float32 of which the fraction ``density`` is positive.

    Every block of ``f`` columns comes from one layer, and in each repetition of the
    layers from other tokens, so that no two blocks of a row are alike.
    """
    z_LTf = source.pre_activations_LTf
    L, T, f = z_LTf.shape
    blocks = []
    for index in range(-(-hidden // f)):
        start = (seed * 131 + index * 997) % T
        rows_M = (torch.arange(tokens, device=z_LTf.device) + start) % T
        blocks.append(z_LTf[index % L, rows_M])
    z_MF = torch.cat(blocks, dim=1)[:, :hidden]
    return z_MF - threshold(z_MF, density)


def ffn_input(
    source: Source, tokens: int, features: int, hidden: int, density: float, seed: int
) -> Tensor:
    """``[M, D]`` float32 for the weight ``[F, D]`` of :func:`gate_weight`.

    Feature 0 is the threshold; the others repeat the inputs of all layers.
    """
    x_TS = _joined_inputs(source, features)
    T, S = x_TS.shape
    rows_M = (torch.arange(tokens, device=x_TS.device) + seed * 131) % T
    columns = torch.arange(features - 1, device=x_TS.device) % S
    z_LTf = source.pre_activations_LTf[: S // source.inputs_LTd.shape[2]]
    L, _, f = z_LTf.shape
    blocks = [z_LTf[i % L, :, : hidden - i * f] for i in range(-(-hidden // f))]
    # Strided first: the blocks of a wide model are many times the source.
    limit = threshold(torch.cat([z[:: len(blocks)] for z in blocks], dim=1), density)
    first_M1 = x_TS.new_full((tokens, 1), limit)
    return torch.cat((first_M1, x_TS[rows_M][:, columns]), dim=1)


def gate_weight(source: Source, features: int, hidden: int, seed: int = 0) -> Tensor:
    """``[F, D]`` float32: the trained weights, spread over all columns.

    A block of ``f`` rows computes one layer from the columns that hold its inputs.  The
    input has several copies of each feature, so random numbers that cancel over the
    copies are added: the weight is as full of random bits as any other.
    """
    x_TS = _joined_inputs(source, features)
    _, f, d = source.up_Lfd.shape
    S = x_TS.shape[1]
    scale_L = (source.inputs_LTd @ source.up_Lfd.mT).std(dim=(1, 2))
    columns = torch.arange(features - 1, device=x_TS.device) % S
    copies_S = torch.bincount(columns, minlength=S)
    generator = torch.Generator(x_TS.device).manual_seed(seed)
    weight_FD = torch.randn(
        hidden, features, generator=generator, device=x_TS.device
    ).mul_(features**-0.5)
    noise = weight_FD[:, 1:]
    mean_FS = noise.new_zeros(hidden, S).index_add_(1, columns, noise) / copies_S
    noise -= mean_FS[:, columns]
    for index in range(-(-hidden // f)):
        layer = index % (S // d)
        rows = slice(index * f, min(hidden, (index + 1) * f))
        up_fS = x_TS.new_zeros(f, S)
        up_fS[:, layer * d : (layer + 1) * d] = source.up_Lfd[layer] / scale_L[layer]
        noise[rows] += (up_fS / copies_S)[: rows.stop - rows.start, columns]
    weight_FD[:, 0] = -1.0
    return weight_FD


def _joined_inputs(source: Source, features: int) -> Tensor:
    """``[T, S]``: the inputs of as many layers as fit beside the threshold.

    Raises:
        SparseOptionError: not even one does.
    """
    L, _, d = source.inputs_LTd.shape
    layers = min(L, (features - 1) // d)
    if layers < 1:
        raise SparseOptionError(f"trained data needs more than {d} features")
    return torch.cat(list(source.inputs_LTd[:layers]), dim=1)
