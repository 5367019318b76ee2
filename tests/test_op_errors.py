"""What the ops refuse, eagerly and while tracing: the message names the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_sparse import formats, ops, reference
from inductor_sparse.errors import SparseShapeError

assert ops.SCHEMAS, "importing the module is what registers the ops"


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


VALUES, METADATA = formats.pack(zeros(4, 64))
F64, I64, I8 = torch.float64, torch.int64, torch.int8
VALID: dict[str, dict[str, Any]] = {
    "activation_spmm": {"z": zeros(2, 3), "w": zeros(3, 5), "activation": "relu"},
    "glu_spmm": {
        "gate": zeros(2, 3),
        "x": zeros(2, 4),
        "w_up": zeros(3, 4),
        "w_down": zeros(3, 5),
        "activation": "relu",
    },
    "row_major_weight": {
        "weight": zeros(100)[:6].view(2, 3),
        "size": [3, 2],
        "stride": [1, 3],
        "storage_offset": 0,
        "dtype": torch.float32,
    },
    "sparsify24": {"x": zeros(2, 4), "activation": "relu", "select": "largest"},
    "sparse24_mm": {"values": VALUES, "metadata": METADATA, "w": zeros(64, 2)},
}

SPMM, GLU, WINDOW, PACK, MM24 = VALID
MM24_OP = torch.ops.inductor_sparse.sparse24_mm
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (SPMM, {"w": zeros(4, 5)}, "w has shape (4, 5), expected [3, N]"),
    (SPMM, {"w": zeros(3)}, "w has shape (3,), expected [3, N]"),
    (SPMM, {"z": zeros(7, 2, 3)}, "w has shape (3, 5), expected [7, 3, N]"),
    (SPMM, {"z": zeros(7, 2, 3), "w": zeros(1, 3, 5)}, "expected [7, 3, N]"),
    (SPMM, {"z": zeros(3)}, "z has shape (3,), expected [M, K] or [B, M, K]"),
    (SPMM, {"z": zeros(1, 1, 2, 3)}, "leading axes, e.g. z.flatten(0, -2)"),
    (SPMM, {"activation": "gelu"}, "'gelu'; use one of identity, relu, relu2"),
    (SPMM, {"z": zeros(2, 3, dtype=I64)}, "z is torch.int64, supported are bfloat16"),
    (SPMM, {"z": zeros(2, 3, dtype=I64)}, "convert it, e.g. z.to(torch.float32)"),
    (SPMM, {"w": zeros(3, 5, dtype=torch.complex64)}, "no meaning for complex numbers"),
    (SPMM, {"w": zeros(3, 5, dtype=F64)}, "(z torch.float32, w torch.float64); cast"),
    (GLU, {"gate": zeros(1, 2, 3)}, "gate has shape (1, 2, 3), expected [M, F]"),
    (GLU, {"x": zeros(1, 4)}, "x has shape (1, 4), expected [2, D]"),
    (GLU, {"w_up": zeros(4, 3)}, "w_up has shape (4, 3), expected [3, 4]"),
    (GLU, {"w_down": zeros(5, 3)}, "w_down has shape (5, 3), expected [3, N]"),
    (GLU, {"activation": "silu"}, "glu_spmm: unknown activation 'silu'"),
    (GLU, {"w_up": zeros(3, 4, dtype=F64)}, "dtypes differ (gate torch.float32, x"),
    (WINDOW, {"size": [3]}, "size [3] and stride [1, 3] differ in length"),
    (WINDOW, {"size": [3, 3]}, "needs 9 elements, the weight spans 6"),
    (WINDOW, {"storage_offset": 1}, "needs 7 elements, the weight spans 6"),
    (WINDOW, {"storage_offset": -1}, "offset -1 must not be negative"),
    (PACK, {"x": zeros(2, 3, 4)}, "x has shape (2, 3, 4), expected [M, K]"),
    (PACK, {"x": zeros(2, 4, dtype=I8)}, "x is torch.int8, supported are"),
    (PACK, {"activation": "relu6"}, "sparsify24: unknown activation 'relu6'"),
    (PACK, {"select": "all"}, "unknown select 'all'; use one of largest, largest_abs"),
    (MM24, {"w": zeros(65, 2)}, "(4, 32), expected [M, 64] for 65 columns"),
    (MM24, {"w": zeros(64)}, "w has shape (64,), expected [K, N]"),
    (MM24, {"w": zeros(64, 2, dtype=F64)}, "dtypes differ (values torch.float32, w"),
    (MM24, {"values": zeros(4, 2, 16)}, "values has shape (4, 2, 16), expected [M, S]"),
    (MM24, {"row_scale": zeros(5)}, "row_scale has shape (5,), expected [4]"),
    (MM24, {"col_scale": zeros(4)}, "col_scale has shape (4,), expected [2]"),
    (MM24, {"col_scale": zeros(2, dtype=I64)}, "col_scale is torch.int64, supported"),
    (MM24, {"metadata": zeros(1, 1, 128)}, "metadata is torch.float32 (1, 1, 128)"),
    (MM24, {"metadata": METADATA[:, :, :64]}, "expected torch.int32 (1, 1, 128)"),
]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refused(name: str, change: dict[str, Any], message: str, traced: bool) -> None:
    arguments = VALID[name] | change
    if traced:
        mode = FakeTensorMode()
        arguments = {
            key: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for key, value in arguments.items()
        }
    with pytest.raises(SparseShapeError) as error:
        getattr(torch.ops.inductor_sparse, name)(**arguments)
    assert message in str(error.value)


def test_sums_of_int8_fit_int32() -> None:
    """The largest that is accepted is right, and one more block is refused."""
    K = reference.INT8_MAX_K // 64 * 64
    assert K // 2 * 128 * 128 < 2**31 <= (K // 2 + 64) * 128 * 128
    with FakeTensorMode():
        for more, refused in ((0, False), (64, True)):
            values = torch.empty(formats.values_shape(4, K + more), dtype=I8)
            words = formats.metadata_shape(4, K + more)
            metadata = torch.empty(words, dtype=torch.int32)
            w = torch.empty(K + more, 8, dtype=I8)
            if not refused:
                assert MM24_OP(values, metadata, w).shape == (4, 8)
                continue
            with pytest.raises(SparseShapeError, match="may overflow int32; split"):
                MM24_OP(values, metadata, w)
            e4m3 = torch.float8_e4m3fn
            assert MM24_OP(values.to(e4m3), metadata, w.to(e4m3)).shape == (4, 8)


@pytest.mark.parametrize("name", VALID)
def test_the_unchanged_arguments_are_accepted(name: str) -> None:
    result = getattr(torch.ops.inductor_sparse, name)(**VALID[name])
    tensors = result if isinstance(result, tuple) else (result,)
    assert not any(tensor.isnan().any() for tensor in tensors)
