"""The sides of ``bench gemm``: ours, torch's dense products, and other sparse kernels.

A side that cannot run here says why; none is skipped in silence.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inductor_sparse import lowerings
from inductor_sparse.bench import ceilings, cuda_timing
from inductor_sparse.bench.intervals import median
from inductor_sparse.bench.timing import interleave
from inductor_sparse.bench.variants import SETTINGS, compiling, with_own_code
from inductor_sparse.errors import SparseError

if TYPE_CHECKING:
    from inductor_sparse.bench.gemm import Operands

_DEFAULT, _, _AUTOTUNED, _ = SETTINGS
FINALISTS, FINAL_ROUNDS = 6, 2
PROBE = 128
Product = Callable[[int], Tensor]
"""Multiplies, whatever the number of the round."""
ALGORITHMS = 64
"""cuSPARSELt algorithms tried at most; their number is not told, the last one fails."""


class RivalUnavailableError(SparseError, RuntimeError):
    """A side cannot run on this device, dtype or installation."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """One side: ``bind`` brings operands into its form.

    What a call then returns is ``[M, N]``.  ``sparse`` tells whether that is the
    product after 2:4, ``scaled`` whether in 8 bits it has the scales in it;
    ``prepare_s`` is the time of compilation, autotuning or algorithm search, ``note``
    what they chose.
    """

    bind: Callable[[Operands], Product]
    sparse: bool
    scaled: bool = True
    prepare_s: float = 0.0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Builder:
    """How to build a side for the shapes of operands, which it must not keep.

    It raises ``RuntimeError`` or ``ImportError`` where the side cannot run.
    ``autotunes`` if that compiles kernels to choose from.
    """

    build: Callable[[Operands], Rival]
    autotunes: bool = False


def ours(operands: Operands, autotune: bool) -> Rival:
    """``torch.ops.inductor_sparse.sparse24_mm``, compiled by the backend."""
    # The op is called by itself, so there is nothing for passes to find.
    lowerings.register_all()
    op = torch.ops.inductor_sparse.sparse24_mm

    def product(
        values: Tensor, metadata: Tensor, weight_NK: Tensor, *scales: Tensor
    ) -> Tensor:
        return op(values, metadata, weight_NK.t(), *scales)

    def given(o: Operands) -> tuple[Tensor, ...]:
        return (o.values, o.metadata, o.weight_NK, *o.scales)

    return _compiled(product, given, operands, autotune=autotune, sparse=True)


def _compiled(
    function: Callable[..., Tensor],
    given: Callable[[Operands], tuple[Tensor, ...]],
    operands: Operands,
    *,
    autotune: bool,
    sparse: bool,
) -> Rival:
    """A function compiled for the shapes of what it is ``given`` of the operands.

    The note names the kernels it runs.
    """
    from torch._inductor.utils import run_and_get_code

    setting = _AUTOTUNED if autotune else _DEFAULT
    options = setting.options(operands.weight_NK.device.type)
    # Dynamo counts how often one code object is compiled, and gives up on it.
    own = with_own_code(function, function.__name__)
    start = time.perf_counter()
    with torch.no_grad(), compiling(setting):
        compiled = torch.compile(own, dynamic=False, options=options)
        _, sources = run_and_get_code(compiled, *given(operands))
    seconds = time.perf_counter() - start

    def bind(o: Operands) -> Product:
        tensors = given(o)

        def call(_: int) -> Tensor:
            with torch.no_grad():
                return compiled(*tensors)

        return call

    note = kernels_of("\n".join(sources))
    return Rival(bind, sparse, prepare_s=seconds, note=note)


def kernels_of(source: str) -> str:
    """The kernels that generated code calls, in order, comma-separated."""
    pattern = (
        r"\b(\w+)\.run\(|\bextern_kernels\.(\w+)\(|\btorch\.ops\.([\w.]+)\("
        r"|\b(cpp_fused\w*)\("
    )
    found = ("".join(groups) for groups in re.findall(pattern, source))
    return ", ".join(dict.fromkeys(found))


def torch_mm(operands: Operands) -> Rival:
    """``torch.mm`` of the dense activation: cuBLAS on a GPU."""
    if operands.scales:
        raise RivalUnavailableError("torch.mm has no scales")

    def bind(o: Operands) -> Product:
        a_MK, b_KN = o.activation_MK, o.weight_NK.t()
        return lambda _: torch.mm(a_MK, b_KN)

    return Rival(bind, sparse=False)


def compiled_mm(operands: Operands) -> Rival:
    """``torch.compile`` with max-autotune: cuBLAS or Triton, in fp8 with scales."""
    if operands.scales:
        _need_dtype(operands, torch.float8_e4m3fn)
        _need_cuda(operands)
        return _compiled(
            ceilings.scaled_mm, _dense, operands, autotune=True, sparse=False
        )

    def product(a_MK: Tensor, w_NK: Tensor) -> Tensor:
        return torch.mm(a_MK, w_NK.t())

    return _compiled(product, _dense, operands, autotune=True, sparse=False)


def scaled_mm(operands: Operands) -> Rival:
    """``torch._scaled_mm`` with a scale per row and fast accumulation."""
    _need_dtype(operands, torch.float8_e4m3fn)
    _need_cuda(operands)

    def bind(o: Operands) -> Product:
        given = _dense(o)
        return lambda _: ceilings.scaled_mm(*given)

    return Rival(bind, sparse=False)


def int_mm(operands: Operands) -> Rival:
    """``torch._int_mm``, then the scales in one compiled kernel or its epilogue."""
    _need_dtype(operands, torch.int8)

    def product(a_MK: Tensor, w_NK: Tensor, rows_M: Tensor, cols_N: Tensor) -> Tensor:
        scaled = torch._int_mm(a_MK, w_NK.t()).float() * rows_M[:, None] * cols_N
        return scaled.to(torch.bfloat16)

    return _compiled(product, _dense, operands, autotune=False, sparse=False)


def _dense(operands: Operands) -> tuple[Tensor, ...]:
    """What a dense product is given: both operands, and both scales if there are."""
    return (operands.activation_MK, operands.weight_NK, *operands.scales)


def cusparselt(operands: Operands) -> Rival:
    """``torch._cslt_sparse_mm`` with the fastest of its algorithms.

    It has no scale per row, so its 8-bit result comes without: in its favour.
    """
    _need_cuda(operands)
    if not torch.backends.cusparselt.is_available():
        raise RivalUnavailableError("this torch has no cuSPARSELt")
    out_dtype = torch.bfloat16 if operands.scales else None

    def numbered(o: Operands) -> Callable[[int], Tensor]:
        packed, b_KN = torch._cslt_compress(o.pruned_MK), o.weight_NK.t()
        return lambda algorithm: torch._cslt_sparse_mm(
            packed, b_KN, out_dtype=out_dtype, alg_id=algorithm
        )

    start = time.perf_counter()
    best = _fastest_algorithm(numbered(operands))
    seconds = time.perf_counter() - start

    def bind(o: Operands) -> Product:
        product = numbered(o)
        return lambda _: product(best)

    note = f"algorithm {best}, version {torch.backends.cusparselt.version()}"
    scaled = out_dtype is None
    return Rival(bind, sparse=True, scaled=scaled, prepare_s=seconds, note=note)


def _fastest_algorithm(product: Callable[[int], Tensor]) -> int:
    """The number of the fastest algorithm that runs, by the time of the device.

    Raises:
        RuntimeError: not even the first one runs.
    """
    times: dict[int, float] = {}
    for algorithm in range(ALGORITHMS):
        try:
            times[algorithm] = cuda_timing.glance_us(lambda _, a=algorithm: product(a))
        except RuntimeError:
            if not times:
                raise
            break
    finalists = sorted(times, key=lambda algorithm: times[algorithm])[:FINALISTS]
    calls = {str(a): lambda _, a=a: product(a) for a in finalists}
    close = interleave(calls, seconds=0, device="cuda", min_rounds=FINAL_ROUNDS)
    return min(finalists, key=lambda algorithm: median(close[str(algorithm)]))


def core_cutlass(operands: Operands) -> Rival:
    """``torch._sparse_semi_structured_mm``, the CUTLASS kernel inside torch."""
    _need_cuda(operands)
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    def call_of(pruned_MK: Tensor, weight_NK: Tensor) -> Product:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed: Any = SparseSemiStructuredTensorCUTLASS.from_dense(pruned_MK)
        values, metadata, b_KN = packed.packed, packed.meta, weight_NK.t()
        return lambda _: torch._sparse_semi_structured_mm(values, metadata, b_KN)

    probe = [
        whole[:PROBE, :PROBE].contiguous()
        for whole in (operands.pruned_MK, operands.weight_NK)
    ]
    # Packing a large operand takes time and memory, a refusal neither.
    call_of(*probe)(0)
    return Rival(lambda o: call_of(o.pruned_MK, o.weight_NK), sparse=True)


def torchao(operands: Operands) -> Rival:
    """torchao's CUTLASS kernel for fp8, transposed: the sparse side is its weight.

    Its kernels for sparse activations have been removed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise RivalUnavailableError("torchao is not installed")
    _need_dtype(operands, torch.float8_e4m3fn)
    _need_cuda(operands)

    with warnings.catch_warnings():
        # Python warns of its text when that is compiled: of nothing that we can change.
        warnings.simplefilter("ignore")
        ops: Any = importlib.import_module("torchao.ops")

    def bind(o: Operands) -> Product:
        values, metadata = ops.to_sparse_semi_structured_cutlass_sm9x_f8(o.pruned_MK)
        row_scale_M, col_scale_N = o.scales
        given = (o.weight_NK, col_scale_N, values, metadata, row_scale_M)
        linear = ops.rowwise_scaled_linear_sparse_cutlass_f8f8
        return lambda _: linear(*given, out_dtype=torch.bfloat16).t()

    try:
        bind(operands)(0)
    except AttributeError as error:  # another version, or its library did not load
        raise RivalUnavailableError(f"torchao: {error}") from error
    return Rival(bind, sparse=True)


def _need_dtype(operands: Operands, dtype: torch.dtype) -> None:
    """Refuse operands of any other dtype."""
    if operands.activation_MK.dtype is not dtype:
        raise RivalUnavailableError(f"for {dtype} only".replace("torch.", ""))


def _need_cuda(operands: Operands) -> None:
    """Refuse a side that only GPUs have."""
    if operands.weight_NK.device.type != "cuda":
        raise RivalUnavailableError("needs a CUDA device")


RIVALS: dict[str, Builder] = {
    "torch.mm": Builder(torch_mm),
    "torch.compile": Builder(compiled_mm, autotunes=True),
    "_scaled_mm": Builder(scaled_mm),
    "_int_mm": Builder(int_mm),
    "cuSPARSELt": Builder(cusparselt),
    "core CUTLASS": Builder(core_cutlass),
    "torchao": Builder(torchao),
}
"""Every other side by the name it is reported under."""
