"""The dense 8-bit FFN to beat: row-wise scales, torch's own 8-bit matmuls.

Written as eager torch and compiled like any other baseline, so that Inductor fuses the
quantization into what comes before it; and the same as torchao writes it.

Shape legend: ``M`` tokens, ``D`` features, ``F`` hidden features, ``K`` reduction,
``N`` outputs.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from inductor_sparse.bench.models import FeedForward, Model, activate

log = logging.getLogger(__name__)

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest finite value of each 8-bit type."""
_SMALLEST = 2.0**-100
"""What a row is taken to hold at least: one of zeros has a scale, too."""
QUANTIZED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""The 8-bit type that each value of ``sparse.quantize`` means."""


def quantize_rows(x_MK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric quantization by row: ``(values, scale)``, ``x ~ values * scale``.

    Args:
        x_MK: any floating dtype.
        dtype: of :data:`LARGEST`.

    Returns:
        ``[M, K]`` in ``dtype`` and ``[M]`` float32, above zero for a row of zeros.
    """
    largest = LARGEST[dtype]
    amax_M = x_MK.abs().amax(dim=1).float()
    scale_M = amax_M.clamp(min=_SMALLEST) / largest
    scaled = (x_MK.float() / scale_M[:, None]).clamp(-largest, largest)
    if dtype is torch.int8:
        scaled = scaled.round()
    return scaled.to(dtype), scale_M


class QuantizedLinear(nn.Module):
    """``x @ W^T`` in 8 bits, ``[M, K]`` -> ``[M, N]``, the weight quantized once."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        values_NK, scale_N = quantize_rows(linear.weight.detach(), dtype)
        self.register_buffer("values_NK", values_NK)
        self.register_buffer("scale_N", scale_N)
        self.out_dtype = linear.weight.dtype

    def forward(self, x_MK: Tensor) -> Tensor:
        """Quantize the rows of ``x`` and multiply."""
        values_MK, scale_M = quantize_rows(x_MK, self.values_NK.dtype)
        if values_MK.dtype is torch.int8:
            product = torch._int_mm(values_MK, self.values_NK.t()).float()
            scaled = product * scale_M[:, None] * self.scale_N[None, :]
            return scaled.to(self.out_dtype)
        return torch._scaled_mm(
            values_MK,
            self.values_NK.t(),
            scale_M[:, None],
            self.scale_N[None, :],
            out_dtype=self.out_dtype,
            use_fast_accum=True,
        )


class QuantizedFFN(nn.Module):
    """A model of :mod:`inductor_sparse.bench.models` with every matmul in 8 bits."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = model.activation
        self.gate = self.up = None
        if isinstance(model, FeedForward):
            self.gate = QuantizedLinear(model.gate, dtype)
            if model.up is not None:
                self.up = QuantizedLinear(model.up, dtype)
        self.down = QuantizedLinear(model.down, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """As the model it was made from, ``[M, F]`` or ``[M, D]`` -> ``[M, D]``."""
        hidden_MF = activate(x if self.gate is None else self.gate(x), self.activation)
        if self.up is not None:
            hidden_MF = hidden_MF * self.up(x)
        return self.down(hidden_MF)


def quantized(model: Model, quantize: str) -> Model | QuantizedFFN:
    """The dense model in the format that ``sparse.quantize`` names; ``none``: as is."""
    if quantize == "none":
        return model
    return QuantizedFFN(model, QUANTIZED[quantize]).eval()


def by_torchao(model: Model) -> nn.Module | None:
    """The model with torchao's dynamic fp8 linear layers, row-wise on both sides.

    ``None`` without torchao, or where that refuses, which is logged: it needs a GPU of
    sm_89 or later and weights in bfloat16.
    """
    if importlib.util.find_spec("torchao") is None:
        return None
    narrow = copy.deepcopy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            api: Any = importlib.import_module("torchao.quantization")
            # Left alone, it would change Inductor's settings for every later graph.
            config = api.Float8DynamicActivationFloat8WeightConfig(
                granularity=api.PerRow(), set_inductor_config=False
            )
            api.quantize_(narrow, config)
    except (ImportError, AttributeError, AssertionError, RuntimeError) as error:
        log.warning("torchao is left out: %s", str(error).partition("\n")[0])
        return None
    return narrow
