from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from inductor_sparse import formats
from inductor_sparse.bench import ceilings, gemm, rivals, tables
from inductor_sparse.bench.gemm import GemmCase
from inductor_sparse.bench.rivals import (
    Builder,
    Product,
    Rival,
    RivalUnavailableError,
)

CASE = GemmCase(64, 128, 32, "bfloat16", "random", 1.0)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ceilings of toys, and no compiled graph left behind."""
    low = ceilings.Ceilings(copy_gb_per_s=10.0, matmul_tflop_per_s=0.1)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: low)
    yield
    torch.compiler.reset()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our side without compilation."""

    def eager(operands: gemm.Operands, autotune: bool) -> Rival:
        op = torch.ops.inductor_sparse.sparse24_mm

        def bind(o: gemm.Operands) -> Product:
            given = (o.values, o.metadata, o.weight_NK.t(), *o.scales)
            return lambda _: op(*given)

        return Rival(bind, sparse=True, note="eager")

    monkeypatch.setattr(gemm, "ours", eager)


@pytest.mark.slow
def test_a_row_is_consistent() -> None:
    (row,) = gemm.run([CASE], seconds=0.02)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert set(row["variants"]) == {"sparse24_mm", "torch.mm", "torch.compile"}
    assert row["unavailable"]["cuSPARSELt"] == "needs a CUDA device"
    best = row["variants"][row["baseline"]]
    assert (best["us"], best["ratio"]) == (row["dense_us"], row["ratio"])
    ours = row["variants"]["sparse24_mm"]
    assert ours["tflop_per_s"] == pytest.approx(CASE.flop / row["sparse_us"] / 1e6)
    assert ours["of_ceiling"] == pytest.approx(ours["tflop_per_s"] / 0.1)
    assert ours["max_rel_err"] < 0.01
    (cells,) = tables.cells(tables.GEMM, [row])
    assert len(cells) == len(tables.headers(tables.GEMM))


@pytest.mark.usefixtures("no_compiler")
def test_quick_leaves_out_what_compiles() -> None:
    (row,) = gemm.run([CASE], seconds=0.01, quick=True)
    assert row["unavailable"]["torch.compile"] == "left out by --quick"
    assert row["baseline"] == "torch.mm"


@pytest.mark.usefixtures("no_compiler")
def test_a_wrong_result_is_never_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(operands: gemm.Operands) -> Rival:
        wrong = torch.ones(CASE.tokens, CASE.features)
        return Rival(lambda _: lambda i: wrong, sparse=True)

    monkeypatch.setitem(gemm.RIVALS, "wrong", Builder(build))
    (row,) = gemm.run([CASE], seconds=0.01, quick=True)
    assert "wrong" not in row["variants"]
    assert row["unavailable"]["wrong"].startswith("computes something else")


@pytest.mark.usefixtures("no_compiler")
def test_a_product_without_a_dense_side_is_refused() -> None:
    case = dataclasses.replace(CASE, dtype="float8_e4m3fn")
    with pytest.raises(RivalUnavailableError, match="no dense side runs here"):
        list(gemm.run([case], seconds=0.01, quick=True))


@pytest.mark.usefixtures("no_compiler")
def test_data_of_one_shape_share_what_was_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[tuple[int, ...]] = []
    bound: list[Tensor] = []

    def build(operands: gemm.Operands) -> Rival:
        built.append(tuple(operands.activation_MK.shape))

        def bind(o: gemm.Operands) -> Product:
            bound.append(o.activation_MK)
            return lambda _: torch.mm(o.activation_MK, o.weight_NK.t())

        return Rival(bind, sparse=False)

    monkeypatch.setitem(gemm.RIVALS, "counted", Builder(build))
    data = ("trained", 0.05), ("random", 1.0)
    todo = [
        dataclasses.replace(CASE, tokens=tokens, data=kind, density=density)
        for tokens in (64, 32)
        for kind, density in data
    ]
    rows = list(gemm.run(todo, seconds=0.01, quick=True))
    assert built == [(64, 128), (32, 128)]
    assert [gemm.row_key(row) for row in rows] == [case.key for case in todo]
    # Every row multiplies operands of its own, and is checked against them.
    found = [(x != 0).float().mean().item() for x in bound]
    assert found == pytest.approx([0.05, 1.0] * 2, rel=0.4)
    assert all(row["variants"]["counted"]["max_rel_err"] < 0.01 for row in rows)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    "problem", [RuntimeError("no luck\nat line 1"), ImportError("no luck")]
)
def test_a_side_that_fails_is_left_out(
    problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(operands: gemm.Operands) -> Rival:
        raise problem

    monkeypatch.setitem(gemm.RIVALS, "torchao", Builder(build))
    (row,) = gemm.run([CASE], seconds=0.01, quick=True)
    assert row["unavailable"]["torchao"] == "no luck"


class TorchaoOps:
    """The two ops of torchao's library, for a weight of which nothing is dropped."""

    def to_sparse_semi_structured_cutlass_sm9x_f8(
        self, pruned: Tensor
    ) -> tuple[Tensor, Tensor]:
        return pruned, pruned

    def rowwise_scaled_linear_sparse_cutlass_f8f8(
        self, x: Tensor, x_scale: Tensor, w: Tensor, meta: Tensor, w_scale: Tensor,
        out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        assert x_scale.shape == x.shape[:1]
        assert w_scale.shape == w.shape[:1]
        product = (x.float() * x_scale[:, None]) @ (w.float() * w_scale[:, None]).t()
        return product.to(out_dtype)


@pytest.mark.parametrize("works", [True, False])
def test_torchao_multiplies_with_the_activation_as_its_weight(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> object:
        warnings.warn("of the text of torchao", SyntaxWarning, stacklevel=1)
        return {"torchao.ops": TorchaoOps() if works else object()}[name]

    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(rivals.importlib, "import_module", import_module)
    monkeypatch.setattr(rivals, "_need_cuda", lambda operands: None)
    case = dataclasses.replace(CASE, dtype="float8_e4m3fn")
    operands = gemm.make_operands(case)
    if not works:
        with pytest.raises(RivalUnavailableError, match=r"torchao: .*attribute"):
            rivals.RIVALS["torchao"].build(operands)
        return
    side = rivals.RIVALS["torchao"].build(operands)
    calls = {"torchao": side.bind(operands)}
    found = gemm._errors(operands, {"torchao": side}, calls)
    assert side.sparse
    assert found["torchao"][0] < 0.01


@pytest.mark.parametrize("rows", [slice(0, 64), slice(448, 512)])
@pytest.mark.usefixtures("no_compiler")
def test_a_wrong_block_of_rows_is_found(
    rows: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(o: gemm.Operands) -> Product:
        wrong = torch.mm(o.activation_MK, o.weight_NK.t())
        wrong[rows] *= 2
        return lambda _: wrong

    wrong = Builder(lambda _: Rival(bind, sparse=False))
    monkeypatch.setitem(gemm.RIVALS, "wrong", wrong)
    case = dataclasses.replace(CASE, tokens=512)
    (row,) = gemm.run([case], seconds=0.01, quick=True)
    assert "wrong" in row["unavailable"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_operands_are_one_matrix_in_several_forms(dtype: str) -> None:
    operands = gemm.make_operands(dataclasses.replace(CASE, dtype=dtype))
    wide = operands.activation_MK.float().view(64, -1, 4)
    pruned = operands.pruned_MK.float().view(64, -1, 4)
    kept = pruned != 0
    assert kept.sum(-1).max() == 2
    assert torch.equal(pruned[kept], wide[kept])
    smallest_kept = pruned.abs().masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    dropped = wide.abs().masked_fill(kept, 0)
    assert (dropped <= smallest_kept).all()
    unpacked = formats.unpack(operands.values, operands.metadata, 128)
    assert torch.equal(unpacked.float(), operands.pruned_MK.float())
    assert (operands.row_scale_M is None) == (dtype == "bfloat16")


def test_packing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gemm.make_operands(dataclasses.replace(CASE, tokens=200))
    monkeypatch.setattr(gemm, "ROWS_PACKED", 64)
    pieces = gemm.make_operands(dataclasses.replace(CASE, tokens=200))
    for field in ("values", "metadata", "pruned_MK"):
        assert torch.equal(getattr(whole, field), getattr(pieces, field))


def test_random_data_have_one_density() -> None:
    todo = gemm.cases(
        tokens=[8, 16],
        sizes=[(32, 64)],
        dtypes=["bfloat16"],
        data=["random", "trained"],
        densities=[0.05, 0.1],
        device="cpu",
    )
    found = [(case.tokens, case.data, case.density) for case in todo]
    each = [("random", 1.0), ("trained", 0.05), ("trained", 0.1)]
    assert found == [(m, *kind) for m in (8, 16) for kind in each]
    assert (todo[0].hidden, todo[0].features) == (64, 32)


def test_kernels_are_read_from_generated_code() -> None:
    source = """
        sparse24_mm_0.run(buf0, buf1, arg3_1, buf2, stream=stream0)
        extern_kernels.mm(buf2, arg1_1, out=buf3)
        triton_poi_fused_0.run(buf3, 8, stream=stream0)
        torch.ops.aten._cslt_sparse_mm.default(buf0, arg3_1)
        triton_poi_fused_0.run(buf4, 8, stream=stream0)
    """
    assert rivals.kernels_of(source) == (
        "sparse24_mm_0, mm, triton_poi_fused_0, aten._cslt_sparse_mm.default"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("_scaled_mm", "for float8_e4m3fn only"),
        ("_int_mm", "for int8 only"),
        ("cuSPARSELt", "needs a CUDA device"),
        ("core CUTLASS", "needs a CUDA device"),
    ],
)
def test_a_side_that_cannot_run_says_why(name: str, reason: str) -> None:
    operands = gemm.make_operands(CASE)
    with pytest.raises(RivalUnavailableError, match=reason):
        rivals.RIVALS[name].build(operands)
