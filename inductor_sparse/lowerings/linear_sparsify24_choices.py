"""What Inductor's autotuning may choose for ``linear_sparsify24``, each checked first.

A candidate packs once before it is timed.  Kernels sum in different orders, so where
two neurons nearly tie either may be kept: what is compared is how large the two kept of
each group are, and that each is where the metadata says.

Shape legend: ``M`` tokens, ``D`` features of the model, ``K`` neurons, ``G`` groups of
four, ``P`` rows looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.codecache import code_hash

from inductor_sparse import formats, ops, reference
from inductor_sparse.lowerings import candidate_check, linear_sparsify24_kernel
from inductor_sparse.lowerings.linear_sparsify24_kernel import TileConfig

_COLUMNS = 4096


class Oracle(candidate_check.Oracle):
    """Whether packed operands are those of an activation of a linear layer."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def error(self, result: tuple[Tensor, Tensor], inputs: Sequence[Tensor]) -> float:
        """The largest deviation, relative to the largest value; NaN if one is NaN."""
        values, metadata = result
        x, w1, *bias = inputs
        rows = candidate_check.sample_rows(x.shape[0]).to(x.device)
        a_PK = self._activations(x[rows], w1, bias[0] if bias else None)
        dense_PK = formats.unpack(values, metadata, w1.shape[0])[rows].double()
        misplaced = torch.where(dense_PK != 0, dense_PK - a_PK, 0.0).abs().amax()
        smaller = (_pairs(dense_PK) - _pairs(a_PK)).abs().amax()
        return float(torch.maximum(misplaced, smaller) / a_PK.amax())

    def _activations(self, x: Tensor, w1: Tensor, bias: Tensor | None) -> Tensor:
        """``[P, K]`` float64."""
        parts = [x.double() @ part.double().t() for part in w1.split(_COLUMNS)]
        z_PK = torch.cat(parts, dim=1)
        if bias is not None:
            z_PK += bias.double()
        return reference.ACTIVATIONS[self.activation](z_PK)


def _pairs(a_PK: Tensor) -> Tensor:
    """``[P, G, 2]``: the two largest of each group, without their places."""
    a_PK = torch.nn.functional.pad(a_PK, (0, -a_PK.shape[1] % reference.GROUP))
    return a_PK.unflatten(1, (-1, reference.GROUP)).topk(reference.KEPT).values


class Candidate(ir.ChoiceCaller):
    """The kernel with one tile, or for None the pair; ``make`` is called if it wins."""

    def __init__(
        self,
        tile: TileConfig | None,
        inputs: list[Any],
        layout: ir.Layout,
        oracle: Oracle,
        make: Callable[[], ir.TensorBox],
    ) -> None:
        name = "linear_sparsify24" if tile else "mm_sparsify24"
        super().__init__(name, inputs, layout, str(tile or "a product and a packing"))
        self.tile = tile
        self.oracle = oracle
        self.make = make

    def __str__(self) -> str:
        return f"{self.name}({self.description})"

    def _pack(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, w1, *given = inputs
        bias = given[0] if given else None
        activation = self.oracle.activation
        if self.tile is None:
            return ops.linear_sparsify24(x, w1, bias, activation, "largest")
        return linear_sparsify24_kernel.launch(
            self.tile, x, w1, bias, activation, energy=None
        )

    def to_callable(self) -> Callable[..., Tensor]:
        """The values, of the inputs that autotuning makes."""
        return lambda *inputs: self._pack(*inputs)[0]

    def benchmark(self, *args: Any, out: Tensor) -> float:
        """Milliseconds of one call; inf if it fails or is wrong.

        The pair is what the kernel replaces: it stays when nothing can be measured.
        """
        return candidate_check.checked_time(
            str(self), self.oracle, self._pack, args, last_resort=self.tile is None
        )

    def call_name(self) -> str:
        """The name of the kernel."""
        return self.name

    def hash_key(self) -> str:
        """What times kept on disk are looked up by: the tile and the kernel's text."""
        return self.oracle.kept_key(self._key(), str(self))

    def _key(self) -> str:
        """The part of it that is the same in every process."""
        if self.tile is None:
            return f"{self.name}-{self.oracle.activation}"
        source = linear_sparsify24_kernel.kernel_source(
            self.name,
            self.layout.dtype,
            self.tile,
            activation=self.oracle.activation,
            has_bias=len(self.input_nodes) == 3,
        )
        return f"{self.tile}-{code_hash(source)}"

    def info_dict(self) -> dict[str, Any]:
        """For the log of autotuning."""
        return {"backend": "CUDA", "tile": self.description}

    def output_node(self) -> ir.TensorBox:
        """What ``make`` returns."""
        return self.make()
