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
from inductor_sparse.bench import cuda_timing
from inductor_sparse.bench.intervals import median
from inductor_sparse.bench.timing import interleave
from inductor_sparse.bench.variants import SETTINGS, compiling
from inductor_sparse.errors import SparseError

if TYPE_CHECKING:
    from inductor_sparse.bench.gemm import Operands

_DEFAULT, _, _AUTOTUNED, _ = SETTINGS
FINALISTS, FINAL_ROUNDS = 6, 5
PROBE = 128
ALGORITHMS = 64
"""cuSPARSELt algorithms tried at most; their number is not told, the last one fails."""


class RivalUnavailableError(SparseError, RuntimeError):
    """A side cannot run on this device, dtype or installation."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """One side: ``call`` ignores its argument and returns ``[M, N]``.

    ``sparse`` tells whether it computes the product after 2:4, ``scaled`` whether its
    8-bit result has the scales in it; ``prepare_s`` is the time of compilation,
    autotuning or algorithm search, ``note`` what they chose.
    """

    call: Callable[[int], Tensor]
    sparse: bool
    scaled: bool = True
    prepare_s: float = 0.0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Builder:
    """How to build a side; ``autotunes`` if that compiles kernels to choose from."""

    build: Callable[[Operands], Rival]
    autotunes: bool = False


def ours(operands: Operands, autotune: bool) -> Rival:
    """``torch.ops.inductor_sparse.sparse24_mm``, compiled by the backend."""
    # The op is called by itself, so there is nothing for passes to find.
    lowerings.register_all()
    op = torch.ops.inductor_sparse.sparse24_mm

    def product(values: Tensor, metadata: Tensor, weight_NK: Tensor) -> Tensor:
        scales = (operands.row_scale_M, operands.col_scale_N)
        return op(values, metadata, weight_NK.t(), *scales)

    given = (operands.values, operands.metadata, operands.weight_NK)
    return _compiled(product, given, autotune=autotune, sparse=True)


def _compiled(
    function: Callable[..., Tensor],
    given: tuple[Tensor, ...],
    *,
    autotune: bool,
    sparse: bool,
) -> Rival:
    """A function compiled for the given tensors; the note names the kernels it runs."""
    from torch._inductor.utils import run_and_get_code

    setting = _AUTOTUNED if autotune else _DEFAULT
    options = setting.options(given[0].device.type)
    start = time.perf_counter()
    with torch.no_grad(), compiling(setting):
        torch.compiler.reset()
        compiled = torch.compile(function, dynamic=False, options=options)
        _, sources = run_and_get_code(compiled, *given)

    def call(_: int) -> Tensor:
        with torch.no_grad():
            return compiled(*given)

    seconds = time.perf_counter() - start
    note = kernels_of("\n".join(sources))
    return Rival(call, sparse, prepare_s=seconds, note=note)


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
    if operands.row_scale_M is not None:
        raise RivalUnavailableError("torch.mm has no scales")
    a_MK, b_KN = operands.activation_MK, operands.weight_NK.t()
    return Rival(lambda _: torch.mm(a_MK, b_KN), sparse=False)


def compiled_mm(operands: Operands) -> Rival:
    """``torch.compile`` with max-autotune: cuBLAS or Triton."""
    if operands.row_scale_M is not None:
        raise RivalUnavailableError("torch.mm has no scales")

    def product(a_MK: Tensor, w_NK: Tensor) -> Tensor:
        return torch.mm(a_MK, w_NK.t())

    given = (operands.activation_MK, operands.weight_NK)
    return _compiled(product, given, autotune=True, sparse=False)


def scaled_mm(operands: Operands) -> Rival:
    """``torch._scaled_mm`` with a scale per row and fast accumulation."""
    from inductor_sparse.bench import ceilings

    row_scale_M, col_scale_N = operands.row_scale_M, operands.col_scale_N
    fp8 = operands.activation_MK.dtype is torch.float8_e4m3fn
    if not fp8 or row_scale_M is None or col_scale_N is None:
        raise RivalUnavailableError("for float8_e4m3fn only")
    _need_cuda(operands)
    a_MK, w_NK = operands.activation_MK, operands.weight_NK
    return Rival(
        lambda _: ceilings.scaled_mm(a_MK, row_scale_M, w_NK, col_scale_N), sparse=False
    )


def int_mm(operands: Operands) -> Rival:
    """``torch._int_mm``, then the scales in one compiled kernel or its epilogue."""
    if operands.activation_MK.dtype is not torch.int8:
        raise RivalUnavailableError("for int8 only")
    row_scale_M, col_scale_N = operands.row_scale_M, operands.col_scale_N

    def product(a_MK: Tensor, w_NK: Tensor, rows_M: Tensor, cols_N: Tensor) -> Tensor:
        scaled = torch._int_mm(a_MK, w_NK.t()).float() * rows_M[:, None] * cols_N
        return scaled.to(torch.bfloat16)

    assert row_scale_M is not None and col_scale_N is not None, "int8 has scales"
    given = (operands.activation_MK, operands.weight_NK, row_scale_M, col_scale_N)
    return _compiled(product, given, autotune=False, sparse=False)


def cusparselt(operands: Operands) -> Rival:
    """``torch._cslt_sparse_mm`` with the fastest of its algorithms.

    It has no scale per row, so its 8-bit result comes without: in its favour.
    """
    _need_cuda(operands)
    if not torch.backends.cusparselt.is_available():
        raise RivalUnavailableError("this torch has no cuSPARSELt")
    out_dtype = torch.bfloat16 if operands.row_scale_M is not None else None
    start = time.perf_counter()
    try:
        packed = torch._cslt_compress(operands.pruned_MK)
    except RuntimeError as error:
        raise RivalUnavailableError(_first_line(error)) from error
    b_KN = operands.weight_NK.t()

    def call(_: int, algorithm: int = 0) -> Tensor:
        return torch._cslt_sparse_mm(
            packed, b_KN, out_dtype=out_dtype, alg_id=algorithm
        )

    best = _fastest_algorithm(call)
    note = f"algorithm {best}, version {torch.backends.cusparselt.version()}"
    seconds = time.perf_counter() - start
    return Rival(
        lambda i: call(i, best),
        sparse=True,
        scaled=out_dtype is None,
        prepare_s=seconds,
        note=note,
    )


def _fastest_algorithm(call: Callable[[int, int], Tensor]) -> int:
    """The number of the fastest algorithm that runs.

    Raises:
        RivalUnavailableError: not even the first one runs.
    """
    times: dict[int, float] = {}
    for algorithm in range(ALGORITHMS):
        try:
            times[algorithm] = cuda_timing.glance_us(lambda i, a=algorithm: call(i, a))
        except RuntimeError as error:
            if not times:
                raise RivalUnavailableError(_first_line(error)) from error
            break
    finalists = sorted(times, key=lambda algorithm: times[algorithm])[:FINALISTS]
    calls = {str(a): lambda i, a=a: call(i, a) for a in finalists}
    close = interleave(calls, seconds=0, device="cuda", min_rounds=FINAL_ROUNDS)
    return min(finalists, key=lambda algorithm: median(close[str(algorithm)]))


def core_cutlass(operands: Operands) -> Rival:
    """``torch._sparse_semi_structured_mm``, the CUTLASS kernel inside torch."""
    _need_cuda(operands)
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    def call_of(pruned_MK: Tensor, weight_NK: Tensor) -> Callable[[int], Tensor]:
        packed: Any = SparseSemiStructuredTensorCUTLASS.from_dense(pruned_MK)
        values, metadata, b_KN = packed.packed, packed.meta, weight_NK.t()
        return lambda _: torch._sparse_semi_structured_mm(values, metadata, b_KN)

    pruned_MK, weight_NK = operands.pruned_MK, operands.weight_NK
    small = (pruned_MK[:PROBE, :PROBE], weight_NK[:PROBE, :PROBE])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Packing a large operand takes time and memory, a refusal neither.
            call_of(*(side.contiguous() for side in small))(0)
            call = call_of(pruned_MK, weight_NK)
        call(0)
    except (RuntimeError, NotImplementedError) as error:
        raise RivalUnavailableError(_first_line(error)) from error
    return Rival(call, sparse=True)


def torchao(operands: Operands) -> Rival:
    """torchao's CUTLASS kernel for fp8, transposed: the sparse side is its weight."""
    if importlib.util.find_spec("torchao") is None:
        raise RivalUnavailableError("torchao is not installed")
    _need_cuda(operands)
    row_scale_M, col_scale_N = operands.row_scale_M, operands.col_scale_N
    if operands.pruned_MK.dtype is not torch.float8_e4m3fn:
        raise RivalUnavailableError("for float8_e4m3fn only")
    try:
        ops: Any = importlib.import_module("torchao.ops")
        values, metadata = ops.to_sparse_semi_structured_cutlass_sm9x_f8(
            operands.pruned_MK
        )
        given = (operands.weight_NK, col_scale_N, values, metadata, row_scale_M)

        def call(_: int) -> Tensor:
            linear = ops.rowwise_scaled_linear_sparse_cutlass_f8f8
            return linear(*given, out_dtype=torch.bfloat16).t()

        call(0)
    except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise RivalUnavailableError(_first_line(error)) from error
    return Rival(call, sparse=True)


def _need_cuda(operands: Operands) -> None:
    """Refuse a side that only GPUs have."""
    if operands.weight_NK.device.type != "cuda":
        raise RivalUnavailableError("needs a CUDA device")


def _first_line(error: BaseException) -> str:
    """What an error says, without the trace that torch appends."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


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
