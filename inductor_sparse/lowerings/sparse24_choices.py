"""What Inductor's autotuning may choose for ``sparse24_mm``, each checked first.

A candidate computes its product once before it is timed; one whose result is wrong, or
that cannot be compiled, launched or given memory, takes infinitely long and says so in
the log.  The masked-dense product is always among them and never fails: whatever is
measured, the numbers are those of the op up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.codecache import code_hash
from torch._inductor.select_algorithm import ExternKernelCaller, ExternKernelChoice
from torch._inductor.virtualized import V

from inductor_sparse import formats
from inductor_sparse.lowerings import candidate_check, sparse24_gemm, vendor24
from inductor_sparse.lowerings.sparse24_kernel import TileConfig
from inductor_sparse.runtime.cuda_kernel import CudaKernel


class Oracle(candidate_check.Oracle):
    """The right product for the inputs of one autotuning, computed once.

    ``scales`` says whether there is a row scale and a column scale.
    """

    def __init__(self, scales: tuple[bool, bool]) -> None:
        super().__init__()
        self.scales = scales
        self._inputs: Sequence[Tensor] = ()
        self._rows = torch.empty(0, dtype=torch.int64)
        self._expected = torch.empty(0)

    def forget(self) -> None:
        """Let the inputs of the last autotuning go."""
        self._inputs, self._expected = (), torch.empty(0)

    def error(self, result: Tensor, inputs: Sequence[Tensor]) -> float:
        """The relative error of ``result``; see :mod:`.candidate_check`."""
        if [t.data_ptr() for t in inputs] != [t.data_ptr() for t in self._inputs]:
            self._rows = candidate_check.sample_rows(result.shape[0])
            self._expected = candidate_check.expected_rows(
                self._rows, *with_scales(inputs, self.scales)
            )
            self._inputs = tuple(inputs)  # now that the answer is theirs
        rows = result[self._rows.to(result.device)]
        return candidate_check.relative_error(rows, self._expected)


def with_scales(
    inputs: Sequence[Any], scales: tuple[bool, bool]
) -> tuple[Any, Any, Any, Any, Any]:
    """values, metadata, w and both scales, None for those that are not among them."""
    values, metadata, w, *given = inputs
    row_scale = given.pop(0) if scales[0] else None
    col_scale = given.pop(0) if scales[1] else None
    return values, metadata, w, row_scale, col_scale


class TileCaller(ir.ChoiceCaller):
    """The Hopper kernel with one tile; ``make`` builds its node of the graph."""

    def __init__(
        self,
        tile: TileConfig,
        inputs: list[Any],
        layout: ir.Layout,
        oracle: Oracle,
        make: Callable[[TileConfig], ir.TensorBox],
    ) -> None:
        super().__init__("sparse24_mm", inputs, layout, str(tile))
        self.tile = tile
        self.oracle = oracle
        self.make = make

    def __str__(self) -> str:
        return f"sparse24_mm({self.tile})"

    def to_callable(self) -> Callable[..., Tensor]:
        """The product into a new tensor, of the inputs that autotuning makes."""

        def multiply(*inputs: Tensor) -> Tensor:
            operands = with_scales(inputs, self.oracle.scales)
            M, N = operands[0].shape[0], operands[2].shape[1]
            out = inputs[0].new_empty(M, N, dtype=self.layout.dtype)
            sparse24_gemm.launch(self.tile, *operands, out)
            return out

        return multiply

    def benchmark(self, *args: Any, out: Tensor) -> float:
        """Milliseconds of one product; inf if it fails or is wrong."""
        compute = self.to_callable()
        return candidate_check.checked_time(str(self), self.oracle, compute, args)

    def call_name(self) -> str:
        """The name of the kernel without an epilogue."""
        return "sparse24_mm"

    def hash_key(self) -> str:
        """What times kept on disk are looked up by: the tile and the kernel's text."""
        key = f"{self.tile}-{code_hash(self._kernel().source)}"
        return self.oracle.kept_key(key, str(self))

    def precompile(self) -> None:
        """Compile the kernel, in whatever thread Inductor does it."""
        self._kernel().compile()

    def _kernel(self) -> CudaKernel:
        w = self.input_nodes[2]
        K, N = (int(size) for size in w.get_size())
        stride = [int(step) for step in w.get_stride()]
        has_row_scale, has_col_scale = self.oracle.scales
        return sparse24_gemm.plain_kernel(
            w.get_dtype(),
            self.layout.dtype,
            self.tile,
            sparse24_gemm.weight_order((K, N), stride, w.get_dtype().itemsize) or "k",
            tma_store=sparse24_gemm.stores_through_tma(self.layout.dtype, N),
            has_row_scale=has_row_scale,
            has_col_scale=has_col_scale,
        )

    def info_dict(self) -> dict[str, Any]:
        """For the log of autotuning."""
        return {"backend": "CUDA", "tile": str(self.tile)}

    def output_node(self) -> ir.TensorBox:
        """The product as a node of the graph that takes epilogues."""
        return self.make(self.tile)


class CheckedExtern(ExternKernelCaller):
    """A vendor's kernel; see :mod:`.vendor24`."""

    def __init__(
        self,
        choice: ExternKernelChoice,
        inputs: list[Any],
        layout: ir.Layout,
        oracle: Oracle,
    ) -> None:
        row, col = oracle.scales
        kwargs = {"row": row, "col": col, "out_dtype": layout.dtype}
        # As ExternKernelChoice.bind, which makes its own kind of caller, would.
        choice.ordered_kwargs_for_cpp_kernel = ()
        super().__init__(choice, inputs, layout, kwargs, has_out_variant=False)
        self.oracle = oracle

    def benchmark(self, *args: Any, out: Tensor) -> float:
        """Milliseconds of one product; inf if it fails or is wrong.

        The masked-dense product is what the others are checked against.
        """
        kernel = self.choice.to_callable()
        return candidate_check.checked_time(
            self.choice.name,
            self.oracle,
            lambda *inputs: kernel(*inputs, **self.kwargs),
            args,
            last_resort=self.choice is vendor24.MASKED_DENSE,
        )

    def hash_key(self) -> str:
        """What times kept on disk are looked up by."""
        return self.oracle.kept_key(super().hash_key(), self.choice.name)


def input_generators(K: int) -> dict[int, Callable[[Any], Tensor]]:
    """How autotuning makes values, metadata and ``w``: valid, the same each time."""

    def values(node: Any) -> Tensor:
        like = _example(node)
        draw = candidate_check.generator(like.device)
        rows = formats.values_shape(like.shape[0], K)
        return candidate_check.random_values(rows, K, like.dtype, like.device, draw)

    def metadata(node: Any) -> Tensor:
        like = _example(node)
        draw = candidate_check.generator(like.device)
        R, C, words = like.shape
        return candidate_check.random_metadata((R, C, words), like.device, draw)

    def weight(node: Any) -> Tensor:
        like = _example(node)
        return candidate_check.random_weight(
            like, candidate_check.generator(like.device)
        )

    return {0: values, 1: metadata, 2: weight}


def _example(node: Any) -> Tensor:
    """An empty tensor with the sizes, or their hints, and strides of a node."""
    hints = V.graph.sizevars.optimization_hints_with_override
    size, stride = (
        hints(what, hint_override=None) for what in (node.get_size(), node.get_stride())
    )
    return torch.empty_strided(
        size, stride, dtype=node.get_dtype(), device=node.get_device()
    )


@contextlib.contextmanager
def forgetting(oracle: Oracle) -> Iterator[None]:
    """Hold the inputs of autotuning no longer than it lasts."""
    try:
        yield
    finally:
        oracle.forget()
