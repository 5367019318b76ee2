"""The functions of the decode kernels in plain kernels: interpreted, or compiled.

The text of each kernel's functions goes into a module of its own, with a kernel around
them that stores what Inductor's template would hand to the epilogue.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import interpreter_mends
import jinja2
import torch
from torch import Tensor

from inductor_sparse import ops
from inductor_sparse.lowerings import activation_spmm_cuda, glu_spmm_cuda

_SPMM = """
@triton.jit
def spmm(
    Z, W, SCALE, COUNTERS, PARTIALS, LIST, M, K, N, stride_zm, stride_zk,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr, SPLITS: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    m = tl.program_id(2) * {{TOKENS}}
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    lists = SPLITS * {{TOKENS + 1}} * share_of_list(K, SPLITS, LOCAL)
    LIST += tl.program_id(2) * lists
    sums = sums_of_share(
        Z, W, {% if SCALED is defined %}SCALE, {% endif %}
        {% if COUNTED is defined %}COUNTERS, {% endif %}LIST, split,
        m, n, M, N, K, stride_zm, stride_zk, N,
        ACTIVATION, SPLITS, LOCAL, BN, ROWS, DOT_DTYPE,
    )
    row = (m + tl.arange(0, {{TOKENS}}))[:, None]
    place = PARTIALS + (split * M + row) * N + n[None, :]
    tl.store(place, sums, mask=(row < M) & (n < N)[None, :])


@triton.jit
def total(
    PARTIALS, Y, M, N, SPLITS: tl.constexpr, BN: tl.constexpr, AT_ONCE: tl.constexpr
):
    row = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    y = sum_of_splits(PARTIALS, row, n, M, N, SPLITS, BN, AT_ONCE)
    tl.store(Y + row * N + n, y, mask=n < N)
"""

_UP = """
@triton.jit
def up(
    GATE, X, W, H, M, F, D,
    ACTIVATION: tl.constexpr, DOT_DTYPE: tl.constexpr, BM: tl.constexpr,
    LOCAL: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    f = tl.program_id(0) * LOCAL + tl.arange(0, LOCAL)
    hidden = hidden_of_share(
        GATE, X, W, tl.program_id(1) * BM, f, M, F, D, F, 1, D, 1, D, 1,
        ACTIVATION, BM, LOCAL, BD, ROWS, PARTS, STAGES, DOT_DTYPE,
    )
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (m < M)[:, None] & (f < F)[None, :]
    tl.store(H + m[:, None] * F + f[None, :], hidden, mask=inside)
"""


@functools.cache
def kernels(
    folder: Path, tokens: int, dot: bool = False, *defined: str
) -> types.ModuleType:
    """The kernels as a module; interpreted if TRITON_INTERPRET is set by now."""
    head = "import triton\nimport triton.language as tl\n\n\n"
    texts = (glu_spmm_cuda.helper_text() + _UP, activation_spmm_cuda.helper_text())
    options: dict[str, Any] = {"TOKENS": tokens, "BM": tokens, "DOT": dot}
    options |= dict.fromkeys(defined, True)
    text = jinja2.Template("\n\n".join(texts) + _SPMM).render(options)
    name = "_".join(map(str, ("decode_kernels", os.getpid(), tokens, dot, *defined)))
    path = folder / f"{name}.py"
    path.write_text(head + text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def run_spmm(
    folder: Path,
    z: Tensor,
    w: Tensor,
    activation: str,
    w_scale: Tensor | None = None,
    counters: Tensor | None = None,
    # Numpy multiplies no bfloat16; products of them are exact in float32.
    dot_dtype: str = "float32",
    **tile: int,
) -> Tensor:
    """``act(z) @ w`` in float32; ``counters`` are of this process, and added to."""
    import triton.language as tl

    (M, K), N = z.shape, w.shape[1]
    made = activation_spmm_cuda.Tile(**{**_SMALL, **tile})
    blocks, columns = -(-M // made.TOKENS), -(-N // made.BN)
    optional = {"SCALED": w_scale, "COUNTED": counters}
    defined = [name for name, value in optional.items() if value is not None]
    module = kernels(folder, made.TOKENS, made.DOT, *defined)
    share = -(-K // (made.SPLITS * made.LOCAL)) * made.LOCAL + made.LOCAL
    listed = torch.full((blocks, made.SPLITS, 1 + made.TOKENS, share), -1)
    partials = torch.full((made.SPLITS, M, N), torch.nan)
    y = torch.full((M, N), torch.nan)
    module.spmm[(columns, made.SPLITS, blocks)](
        *(z, w, w_scale, counters, partials, listed.int(), M, K, N, *z.stride()),
        ACTIVATION=activation,
        DOT_DTYPE=getattr(tl, dot_dtype),
        **{k: v for k, v in vars(made).items() if k not in _TAKEN},
    )
    module.total[(columns, M, 1)](
        partials, y, M, N, SPLITS=made.SPLITS, BN=made.BN, AT_ONCE=2
    )
    return y


def run_up(
    folder: Path, gate: Tensor, x: Tensor, w: Tensor, activation: str, **tile: int
) -> Tensor:
    """The hidden values ``act(gate) * (x @ w.T)``."""
    import triton.language as tl

    (M, F), D = gate.shape, x.shape[1]
    made = glu_spmm_cuda.UpTile(**{**_SMALL_UP, **tile})
    hidden = torch.full((M, F), torch.nan, dtype=gate.dtype)
    module = kernels(folder, made.BM, made.DOT)
    module.up[(-(-F // made.LOCAL), -(-M // made.BM))](
        *(gate, x, w, hidden, M, F, D),
        ACTIVATION=activation,
        DOT_DTYPE=tl.float32,
        **{k: v for k, v in vars(made).items() if k not in _TAKEN},
    )
    return hidden


_TAKEN = ("TOKENS", "DOT", "num_warps")
_SMALL = {
    "TOKENS": 1,
    "BN": 32,
    "SPLITS": 3,
    "LOCAL": 32,
    "ROWS": 16,
    "DOT": False,
    "num_warps": 1,
}
_SMALL_UP = {
    "BM": 1,
    "LOCAL": 32,
    "ROWS": 4,
    "BD": 32,
    "PARTS": 1,
    "STAGES": 1,
    "DOT": False,
    "num_warps": 1,
}


def count(folder: Path, z: Tensor, w: Tensor, calls: int, **how: Any) -> list[int]:
    """The counters after some calls; the product is that of a kernel without them."""
    counters = torch.zeros(len(ops.COUNTERS), dtype=torch.int64)
    expected = run_spmm(folder, z, w, "relu", **how)
    for _ in range(calls):
        y = run_spmm(folder, z, w, "relu", counters=counters, **how)
        assert torch.equal(y, expected)
    return counters.tolist()


class Interpreter:
    """A process in which Triton interprets: it has to know before it is imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        context = multiprocessing.get_context("spawn")
        with patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            self.pool = ProcessPoolExecutor(
                1, context, initializer=interpreter_mends.mend
            )
            self.pool.submit(os.getpid).result()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(folder, *args, **kwargs)`` as that process sees it."""
        return self.pool.submit(function, self.folder, *args, **kwargs).result()


@contextmanager
def interpreter(folder: Path) -> Iterator[Interpreter]:
    """An :class:`Interpreter`, ended afterwards."""
    made = Interpreter(folder)
    with made.pool:
        yield made


def compile_for_amd(
    folder: Path, arch: str, tokens: int, dtype: torch.dtype, names: Iterable[str]
) -> dict[str, str]:
    """The assembly of the named kernels for a GPU of AMD such as gfx942."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    pointers = {"PARTIALS": "*fp32", "LIST": "*i32"}
    pointers |= dict.fromkeys(("Z", "W", "Y", "GATE", "X", "H"), _POINTERS[dtype])
    made = {}
    for kernel_name in names:
        tile, given = _amd_constants(kernel_name, tokens, dtype)
        kernel = getattr(kernels(folder, tokens, tile.DOT), kernel_name)
        signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
        signature |= dict.fromkeys(given, "constexpr")
        source = ASTSource(kernel, signature, given)
        options = {"num_warps": tile.num_warps}
        compiled = triton.compile(source, target=target, options=options)
        made[kernel_name] = compiled.asm["amdgcn"]
    return made


_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def _amd_constants(
    kernel: str, tokens: int, dtype: torch.dtype
) -> tuple[activation_spmm_cuda.Tile | glu_spmm_cuda.UpTile, dict[str, Any]]:
    """The tile of a kernel, and all of its constants."""
    import triton.language as tl

    dot_dtype = getattr(tl, activation_spmm_cuda.DOT_DTYPES[dtype].removeprefix("tl."))
    of_all = {"ACTIVATION": "relu", "DOT_DTYPE": dot_dtype}
    up = glu_spmm_cuda.choose_up_tile(tokens, 4096, dtype, amd=True)
    spmm = activation_spmm_cuda.choose_tile(tokens, 16384, 4096, dtype, 304)
    if kernel == "total":
        return spmm, {"SPLITS": spmm.SPLITS, "BN": 32, "AT_ONCE": 128}
    tile = up if kernel == "up" else spmm
    return tile, {k: v for k, v in vars(tile).items() if k not in _TAKEN} | of_all
