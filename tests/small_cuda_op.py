"""An op with the smallest CUDA C++ kernel there is: for tests of what is fused into it.

``small_cuda_op::mm(a, b)`` is ``a @ b`` in float32, rounded to the dtype of ``a``;
``mm_and_sums(a, b)`` is that and the float32 products.
:func:`on_cpu` compiles a generated kernel for the CPU and runs it there.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fake_cuda import Generated, cuda_sources
from host_code import host_library
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import permute
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.virtualized import V

from inductor_sparse import templates
from inductor_sparse.lowerings import common
from inductor_sparse.lowerings.cuda_epilogue import PrintedEpilogue
from inductor_sparse.lowerings.cuda_epilogue_ops import MEMORY_TYPES
from inductor_sparse.lowerings.cuda_template import (
    CudaLaunch,
    CudaTemplateBuffer,
    allocate,
    wrapper_can_launch,
)
from inductor_sparse.lowerings.result_order import is_read_transposed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda y: F.relu(y).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
}
"""What follows a product in the models there are."""

_library = torch.library.Library("small_cuda_op", "DEF")
_library.define("mm(Tensor a, Tensor b) -> Tensor")
_library.define("mm_and_sums(Tensor a, Tensor b) -> (Tensor, Tensor)")


def _meta(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _eager(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype)


def _meta_and_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return _meta(a, b), _meta(a, b).new_empty(a.shape[0], b.shape[1]).float()


torch.library.register_fake("small_cuda_op::mm", _meta, lib=_library)
torch.library.register_fake("small_cuda_op::mm_and_sums", _meta_and_sums, lib=_library)
_library.impl("mm", _eager, "CPU")
_library.impl("mm", _eager, "CUDA")
mm = torch.ops.small_cuda_op.mm.default
mm_and_sums = torch.ops.small_cuda_op.mm_and_sums.default

_SOURCE = """{code}
extern "C" __global__ void small_mm(
    const {dtype}* a, const {dtype}* b, const long long M, const long long N,
    const long long K{sums_param}{primary_param}{params}) {{
  const long long pairs = M * ((N + 1) / 2);
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < pairs;
       at += step) {{
    const long long m = at / ((N + 1) / 2), n = at % ((N + 1) / 2) * 2;
    [[maybe_unused]] const bool ok0 = true;
    [[maybe_unused]] const bool ok1 = n + 1 < N;
    float acc0 = 0.0f, acc1 = 0.0f;
    for (long long k = 0; k < K; k++) {{
      const float left = epilogue::decode(a[m * K + k]);
      acc0 += left * epilogue::decode(b[k * N + n]);
      if (ok1) acc1 += left * epilogue::decode(b[k * N + n + 1]);
    }}
    {sums_store}
    {body}
    {primary_store}
  }}
}}
"""
_STORE_SUMS = "sums[m * N + n] = acc0; if (ok1) sums[m * N + n + 1] = acc1;"


def _render(
    a: ir.IRNode,
    b: ir.IRNode,
    sums: ir.IRNode | None,
    epilogue: PrintedEpilogue,
    transposed: bool,
) -> CudaLaunch:
    primary_param = primary_store = ""
    arguments = [a, b, a.get_size()[0], b.get_size()[1], b.get_size()[0]]
    signature = ["pointer", "pointer", "int64", "int64", "int64"]
    if sums is not None:
        arguments.append(sums)
        signature.append("pointer")
    if epilogue.primary_buffer is not None:
        kind = MEMORY_TYPES[epilogue.out_dtype]
        primary_param = f", {kind}* primary"
        values = f"(float){epilogue.primary0}", f"(float){epilogue.primary1}"
        primary_store = (
            f"epilogue::store2(primary, m * N + n, {', '.join(values)}, ok1);"
        )
        if transposed:
            primary_store = (
                f"epilogue::store(primary, n * M + m, {values[0]}, ok0);\n    "
                f"epilogue::store(primary, (n + 1) * M + m, {values[1]}, ok1);"
            )
        arguments.append(epilogue.primary_buffer)
        signature.append("pointer")
    source = _SOURCE.format(
        code=epilogue.code or templates.load("cuda/epilogue.cuh"),
        dtype=MEMORY_TYPES[a.get_dtype()],
        params="".join(f", {param}" for param in epilogue.params),
        body=epilogue.body.replace("\n", "\n    "),
        sums_param="" if sums is None else ", float* sums",
        sums_store="" if sums is None else _STORE_SUMS,
        primary_param=primary_param,
        primary_store=primary_store,
    )
    return CudaLaunch(
        "small_mm", source, tuple(signature), tuple(arguments), threads=128, grid=64
    )


def _product(
    a: ir.TensorBox, b: ir.TensorBox, sums: ir.IRNode | None = None
) -> ir.TensorBox:
    a, b = (common.require_contiguous(tensor) for tensor in realize_inputs(a, b))
    size = [a.get_size()[0], b.get_size()[1]]
    transposed = sums is None and is_read_transposed(V.graph.current_node)
    size = size[::-1] if transposed else size
    layout = ir.FixedLayout(a.get_device(), a.get_dtype(), size)
    written = [] if sums is None else [sums]
    buffer = CudaTemplateBuffer(
        layout,
        [a, b, *written],
        lambda text: _render(a, b, sums, text, transposed),
        written,
        transposed=transposed,
    )
    made = ir.TensorBox.create(buffer)
    return permute(made, [1, 0]) if transposed else made


def _lowering(a: ir.TensorBox, b: ir.TensorBox) -> ir.TensorBox:
    if not wrapper_can_launch() or a.get_device().type != "cuda":
        return common.fallback(mm)(a, b)
    return _product(a, b)


def _lowering_and_sums(a: ir.TensorBox, b: ir.TensorBox) -> tuple[ir.TensorBox, ...]:
    size = [a.get_size()[0], b.get_size()[1]]
    sums = allocate(a.get_device(), torch.float32, size)
    return _product(a, b, sums), sums


def register() -> None:
    """Register the lowerings with Inductor; calling it again changes nothing."""
    common.register(mm, _lowering)
    common.register(mm_and_sums, _lowering_and_sums)


_HOST = """
#define __global__
struct Three { long long x, y, z; };
static Three blockIdx = {0, 0, 0}, threadIdx = {0, 0, 0}, blockDim = {1, 1, 1},
             gridDim = {1, 1, 1};
"""


def on_cpu(generated: Generated, folder: Path, *inputs: Tensor) -> list[Tensor]:
    """What ``generated`` returns, computed on the CPU by its one kernel.

    ``inputs`` are CPU tensors for the graph's inputs, in order.
    """
    code = generated.code
    ((name, arguments),) = re.findall(r"(small_mm_\d+)\.run\((.*?), stream=", code)
    known: dict[str, object] = {"torch": torch, "reinterpret_tensor": torch.as_strided}
    known |= {f"arg{at}_1": tensor for at, tensor in enumerate(inputs)}
    sizes = r"(s\d+) = (arg\d+_1)(?:_size|\.size\(\))\[(\d)\]"
    for symbol, arg, at in re.findall(sizes, code):
        known[symbol] = known[arg].shape[int(at)]
    for buffer, size, stride, dtype in re.findall(
        r"(buf\d+) = empty_strided_cuda\((\(.*?\)), (\(.*?\)), (torch\.\w+)\)", code
    ):
        text = f"torch.empty_strided({size}, {stride}, dtype={dtype})"
        known[buffer] = eval(text, known)
    values = eval(f"[{arguments}]", known)
    _run(generated, name, folder, values)
    (returned,) = re.findall(r"^ +return (\(.*\))$", code, re.M)
    return list(eval(returned, known))


def _run(generated: Generated, name: str, folder: Path, values: list[object]) -> None:
    library = host_library(_HOST + cuda_sources(generated.code)[name], folder)
    arguments = [
        ctypes.c_void_p(value.data_ptr())
        if isinstance(value, Tensor)
        else ctypes.c_longlong(int(value))
        for value in values
    ]
    library.small_mm(*arguments)
