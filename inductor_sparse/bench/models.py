"""Models and inputs whose activation density is known.

Shape legend: ``M`` tokens, ``D`` features of the residual stream, ``F`` hidden
features. Weights are stored ``[out, in]`` as ``nn.Linear`` stores them.  With
``random`` data they are random normal, and so are the inputs; with ``trained`` data the
pre-activations are those of a trained model (:mod:`inductor_sparse.bench.trained`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inductor_sparse import reference
from inductor_sparse.bench import trained

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
OPS = ("down", "ffn")
ACTIVATIONS = ("relu2", "relu")
DATA = ("random", "trained")
ROWS_CHECKED = 256
"""Rows of a result that are compared with float64, and of an activation whose 2:4 loss
is measured: 2**20 numbers and more, at little of the cost of the whole."""


def activate(z: Tensor, activation: str) -> Tensor:
    """``relu(z)`` or ``relu(z) ** 2``, any shape, in the dtype of ``z``."""
    rectified = torch.relu(z)
    return rectified.square() if activation == "relu2" else rectified


class Down(nn.Module):
    """The second half of an FFN: pre-activation ``[M, F]`` -> ``[M, D]``, no bias."""

    def __init__(self, features: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(hidden, features, bias=False)

    def pre_activation(self, z_MF: Tensor) -> Tensor:
        """The input itself."""
        return z_MF

    def hidden(self, z_MF: Tensor) -> Tensor:
        """``act(z)``, ``[M, F]``."""
        return activate(z_MF, self.activation)

    def forward(self, z_MF: Tensor) -> Tensor:
        """``act(z) @ W_down^T``."""
        return self.down(self.hidden(z_MF))


class FeedForward(nn.Module):
    """A whole FFN, ``[M, D]`` -> ``[M, D]``, multiplied by an up projection if gated.

    Feature 0 of the input is constant and the first column of the first weight is -1:
    the constant is a threshold, so it alone decides which fraction of hidden features
    is positive (see :func:`make_input`), without touching the weights.
    """

    def __init__(
        self, features: int, hidden: int, activation: str, gated: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(features, hidden, bias=False)
        self.up = nn.Linear(features, hidden, bias=False) if gated else None
        self.down = nn.Linear(hidden, features, bias=False)

    def pre_activation(self, x_MD: Tensor) -> Tensor:
        """What the activation is applied to, ``[M, F]``."""
        return self.gate(x_MD)

    def hidden(self, x_MD: Tensor) -> Tensor:
        """``act(x @ W_gate^T) [* (x @ W_up^T)]``, ``[M, F]``."""
        hidden_MF = activate(self.gate(x_MD), self.activation)
        return hidden_MF if self.up is None else hidden_MF * self.up(x_MD)

    def forward(self, x_MD: Tensor) -> Tensor:
        """``hidden(x) @ W_down^T``."""
        return self.down(self.hidden(x_MD))


Model = Down | FeedForward
Input = Tensor | tuple[Tensor, ...]
"""What a compiled variant takes: the input of a model, or one for each of a stack."""


def parts(x: Input) -> tuple[Tensor, ...]:
    """The inputs of the single models."""
    return (x,) if isinstance(x, Tensor) else x


class Stack(nn.Module):
    """Models of one size run one after another, each on its own input.

    As in a network of many layers, no model finds its weights in the cache, and the
    start of one kernel overlaps with the end of the one before.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results of all models."""
        pairs = zip(self.models, inputs, strict=True)
        return tuple(model(x) for model, x in pairs)


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """What fixes a model and its data.

    ``op`` is of :data:`OPS`, ``dtype`` of :data:`DTYPES`, ``data`` of :data:`DATA`;
    ``quantize`` is a value of ``sparse.quantize``; a ``calibrated`` case is compiled
    with a plan of its own inputs.  The sparse side of a ``quantized_model`` is given
    the model that the dense side has, its matmuls in 8 bits already.
    """

    op: str
    gated: bool
    activation: str
    dtype: str
    features: int
    hidden: int
    device: str = "cpu"
    data: str = "random"
    quantize: str = "none"
    calibrated: bool = False
    quantized_model: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights of the model."""
        itemsize = 1 if self.quantize != "none" else DTYPES[self.dtype].itemsize
        return self.matrices * self.features * self.hidden * itemsize

    @property
    def matrices(self) -> int:
        """Number of weight matrices."""
        return 1 if self.op == "down" else 2 + self.gated

    def build(self, seed: int = 0) -> Model:
        """The model in eval mode, on its device, with unit-variance pre-activations."""
        with torch.device("meta"):
            model = self._skeleton()
        model = model.to(DTYPES[self.dtype]).to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
            if isinstance(model, FeedForward) and self.data == "trained":
                source = trained.source(self.device)
                weight_FD = trained.gate_weight(source, self.features, self.hidden)
                model.gate.weight.copy_(weight_FD)
            elif isinstance(model, FeedForward):
                model.gate.weight[:, 0] = -1.0
        return model.eval()

    def _skeleton(self) -> Model:
        """The module without storage."""
        if self.op == "down":
            return Down(self.features, self.hidden, self.activation)
        return FeedForward(self.features, self.hidden, self.activation, self.gated)

    def make_input(self, tokens: int, density: float, seed: int) -> Tensor:
        """One input whose activation has the fraction ``density`` of non-zeros.

        ``down``: ``[M, F]`` with independent signs, positive with probability
        ``density``.  ``ffn``: ``[M, D]``, random directions of length ``sqrt(D)``
        behind a constant first feature, the normal quantile at which that fraction of
        the unit-variance pre-activations lies above it.  Trained pre-activations come
        with their own distribution, and the threshold is its quantile.
        """
        width = self.hidden if self.op == "down" else self.features
        if self.data == "trained":
            return self._trained_input(tokens, density, seed).to(DTYPES[self.dtype])
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(tokens, width, generator=generator, device=self.device)
        if self.op == "down":
            positive = torch.rand(x.shape, generator=generator, device=self.device)
            x = torch.where(positive < density, x.abs(), -x.abs())
        else:
            x[:, 0] = 0.0
            x = x * (math.sqrt(width) / x.norm(dim=1, keepdim=True))
            x[:, 0] = statistics.NormalDist().inv_cdf(1.0 - density)
        return x.to(DTYPES[self.dtype])

    def _trained_input(self, tokens: int, density: float, seed: int) -> Tensor:
        """The same from the trained source, float32."""
        source = trained.source(self.device)
        if self.op == "down":
            return trained.pre_activation(source, tokens, self.hidden, density, seed)
        sizes = (tokens, self.features, self.hidden)
        return trained.ffn_input(source, *sizes, density, seed)


def measured_density(model: Model, inputs: list[Tensor]) -> float:
    """Fraction of non-zeros of the activation over ``inputs``."""
    nonzero = total = 0
    with torch.no_grad():
        for x in inputs:
            hidden = activate(model.pre_activation(x), model.activation)
            nonzero += int(hidden.count_nonzero())
            total += hidden.numel()
    return nonzero / total


def union_density(model: Model, x: Tensor) -> float:
    """Fraction of hidden features that any token of ``x`` activates."""
    with torch.no_grad():
        hidden_MF = activate(model.pre_activation(x), model.activation)
        return (hidden_MF != 0).any(dim=0).float().mean().item()


def dropped_energy(model: Model, x: Tensor) -> float:
    """Fraction of the activation's sum of squares that the 2:4 format would drop."""
    with torch.no_grad():
        hidden_MF = model.hidden(sample(x))
    # Of values that are not negative the largest magnitudes are the largest values.
    return reference.dropped_energy(hidden_MF, "identity", "largest_abs")


def sample(x: Tensor) -> Tensor:
    """At most :data:`ROWS_CHECKED` rows, evenly spread from the first to the last."""
    count = min(len(x), ROWS_CHECKED)
    rows = torch.linspace(0, len(x) - 1, count, dtype=torch.float64).round().long()
    if x.itemsize > 1:
        return x[rows]
    # Not every device can index the 8-bit floating types.
    return x.view(torch.uint8)[rows].view(x.dtype)


def errors(model: Model, x: Tensor, *results: Tensor) -> list[tuple[float, float]]:
    """Largest and root-mean-square error of each of ``results`` against float64.

    The first is relative to the largest true magnitude, the second to the
    root-mean-square.  The reference uses the very same weights and inputs, widened to
    float64 one weight at a time, so the numbers hold the rounding of the whole chain,
    the intermediate included.  The rows of :func:`sample` count.
    """
    with torch.no_grad():
        wide = sample(x).double()
        if isinstance(model, FeedForward):
            hidden = activate(wide @ _wide(model.gate), model.activation)
            if model.up is not None:
                hidden = hidden * (wide @ _wide(model.up))
        else:
            hidden = activate(wide, model.activation)
        expected = hidden @ _wide(model.down)
        return [relative_errors(sample(result), expected) for result in results]


def relative_errors(result: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest error over largest magnitude, and the same of root mean squares."""
    error = result.double() - expected
    largest = error.abs().max() / expected.abs().max().clamp_min(1e-300)
    return largest.item(), (error.norm() / expected.norm().clamp_min(1e-300)).item()


def _wide(linear: nn.Linear) -> Tensor:
    """The weight of a linear layer, transposed for ``x @ w``, in float64."""
    return linear.weight.double().t()
