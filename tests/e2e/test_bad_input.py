"""Input that no rewrite was made for: a recorded reason or an error, right numbers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e.checks import Down, compare, compile_and_compare, outcomes
from report_models import FEATURES, FFN, HIDDEN, Stack, relu2, tokens
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch import config as functorch_config

import inductor_sparse
from inductor_sparse import reference
from inductor_sparse.decisions import collect
from inductor_sparse.errors import SparsePlanError


class ReluMatmul(nn.Module):
    """``relu(x) @ weight.T`` in the dtype of the weight, whatever that is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).to(self.weight.dtype) @ self.weight.t()


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation")
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int64, torch.int32, torch.complex64]
)
def test_other_dtypes_stay_dense(dtype: torch.dtype) -> None:
    integer = not (dtype.is_floating_point or dtype.is_complex)
    x = torch.randint(-9, 9, (4, 8))
    x = x.to(dtype) if integer else x.to(dtype.to_real())
    model = ReluMatmul(torch.randint(-9, 9, (6, 8)).to(dtype))
    with collect() as log, torch.no_grad():
        actual = torch.compile(model, backend="sparse")(x)
    # Small integers: every sum is exact in each of these dtypes.
    assert torch.equal(actual, model(x))
    (decision,) = log.decisions
    assert outcomes([decision]) == ["unsupported-dtype"]
    name = str(dtype).removeprefix("torch.")
    assert decision.detail == f"{name}; supported are bfloat16, float16, float32"


@pytest.mark.parametrize(
    ("K", "N", "detail"),
    [
        (0, FEATURES, "K is 0"),
        (HIDDEN, 0, "N is 0"),
        (HIDDEN, 1, "N is 1"),
        # Inductor turns a product over one element into a multiplication before us.
        (1, FEATURES, None),
    ],
)
def test_degenerate_weight(K: int, N: int, detail: str | None) -> None:
    model = Down(torch.randn(N, K))
    _, decisions = compile_and_compare(model, torch.randn(5, K))
    found = [(outcomes([d]), d.detail) for d in decisions]
    assert found == ([] if detail is None else [(["unsupported-shape"], detail)])


@pytest.mark.parametrize("rows", [0, (2, 0)])
def test_batch_of_zero(rows: int | tuple[int, int]) -> None:
    x = tokens(*([rows] if isinstance(rows, int) else rows))
    _, decisions = compile_and_compare(FFN(), x)
    assert outcomes(decisions) == ["unsupported-shape"]
    assert decisions[0].detail == "M is 0"


def test_symbolic_rows_become_zero_and_one_by_recompiling() -> None:
    model = Down()
    with collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse", dynamic=True)
        for rows in (5, 7, 1, 0):
            compare(compiled, model, torch.randn(rows, HIDDEN))
    # One graph for 5 and 7; torch compiles sizes of 0 and 1 on their own.
    assert outcomes(log.decisions) == ["applied", "applied", "unsupported-shape"]


@pytest.mark.parametrize("per_row", [(), (3,)])
def test_symbolic_rows_become_zero_and_one_in_the_same_graph(
    per_row: tuple[int, ...],
) -> None:
    model = Down()
    with collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse")
        for rows in (5, 1, 0, 300):
            z = torch.randn(rows, *per_row, HIDDEN)
            torch._dynamo.decorators.mark_unbacked(z, 0)
            compare(compiled, model, z)
    assert outcomes(log.decisions) == ["applied"]


def special_values(rows: int, dtype: torch.dtype) -> Tensor:
    z = torch.randn(rows, HIDDEN)
    z[0, 3], z[-1, 5], z[-1, 6], z[0, 7] = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), -0.0]
    )
    return z.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_activations(dtype: torch.dtype) -> None:
    """4 rows are streamed, 5 and 70 use panels, dense ones torch's own product."""
    model = Down().to(dtype)
    with collect() as log, torch.no_grad():
        compiled = torch.compile(model, backend="sparse", dynamic=True)
        for rows in (4, 5, 70):
            z = special_values(rows, dtype)
            compare(compiled, model, z)
            compare(compiled, model, z.abs())
    assert outcomes(log.decisions) == ["applied"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_never_meets_an_infinite_weight(dtype: torch.dtype) -> None:
    """Whether the call skips or not: 0 * Inf is nothing, not NaN."""
    model = Down().to(dtype)
    with collect() as log, torch.no_grad():
        model.weight[1, 3], model.weight[2, 3] = float("inf"), float("nan")
        compiled = torch.compile(model, backend="sparse", dynamic=True)
        for rows in (2, 5, 70):
            sparse = torch.randn(rows, HIDDEN, dtype=dtype)
            for z in (sparse, sparse.abs()):
                z[:, 3] = -1
                z[-1, 3] = 1  # the one token that does meet them
                actual = compiled(z)
                expected = reference.activation_spmm(z, model.weight.t(), "relu2")
                assert actual[:-1].isfinite().all()
                torch.testing.assert_close(actual, expected, equal_nan=True)
    assert outcomes(log.decisions) == ["applied"]


class Inside(nn.Module):
    """An FFN called by something that traces its argument."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.ffn = FFN()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.ffn, x)


def test_ffn_under_cond() -> None:
    def either(ffn: nn.Module, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, ffn, torch.zeros_like, (x,))

    model, x = Inside(either), tokens(5)
    compiled, decisions = compile_and_compare(model, x)
    assert outcomes(decisions) == ["higher-order-op"]
    assert decisions[0].detail == "inside the body of cond, which is not rewritten"
    with torch.no_grad():
        compare(compiled, model, -x)


def test_ffn_under_vmap() -> None:
    _, decisions = compile_and_compare(
        Inside(lambda ffn, x: torch.func.vmap(ffn)(x)), tokens(3, 5)
    )
    assert outcomes(decisions) == ["applied"]
    assert decisions[0].shapes == {"M": 15, "K": HIDDEN, "N": FEATURES}


def test_ffn_under_checkpoint() -> None:
    def recomputed(ffn: nn.Module, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(ffn, x, use_reentrant=False)

    model, x = Inside(recomputed), tokens(64)
    weight = model.ffn.down.weight
    with collect() as log:
        compare(torch.compile(model, backend="sparse"), model, x).sum().backward()
    assert outcomes(log.decisions) == ["applied"]
    gradient, weight.grad = weight.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(gradient, weight.grad)


class BrokenInside(nn.Module):
    """An FFN with a graph break before or after its activation."""

    def __init__(self, after_activation: bool) -> None:
        super().__init__()
        self.ffn = FFN()
        self.after_activation = after_activation

    def forward(self, x: Tensor) -> Tensor:
        z = self.ffn.up(x)
        if not self.after_activation:
            torch._dynamo.graph_break()
        z = relu2(z)
        if self.after_activation:
            torch._dynamo.graph_break()
        return self.ffn.down(z)


def test_graph_break_before_the_activation() -> None:
    _, decisions = compile_and_compare(BrokenInside(False), tokens(5))
    assert outcomes(decisions) == ["applied"]


def test_graph_break_after_the_activation_hides_it() -> None:
    with collect() as log:
        _, decisions = compile_and_compare(BrokenInside(True), tokens(5))
    assert decisions == []
    assert [graph.other_matmuls for graph in log.graphs] == [1, 1]


def test_several_threads_compile_at_once() -> None:
    failures: list[BaseException] = []
    compiled: list[str] = []
    options = {"fx_graph_cache": False}
    # Two threads at once may not load a backend's entry point: torch allows one only.
    torch._dynamo.lookup_backend("sparse")

    def work(layers: int) -> None:
        model = Stack(*[relu2] * layers)
        x = tokens(3 + layers)
        # What a fixture turned off is still on in other threads.
        no_cache = functorch_config.patch(enable_autograd_cache=False)
        try:
            with torch.no_grad(), no_cache:
                mine = torch.compile(model, backend="sparse", options=options)
                for _ in range(3):
                    compare(mine, model, x)
            compiled.append(f"{layers} layers")
        except BaseException as error:
            failures.append(error)

    with collect() as log:
        threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert sorted(compiled) == ["1 layers", "2 layers", "3 layers"]
    assert set(outcomes(log.decisions)) == {"applied"}
    assert len(log.decisions) == 1 + 2 + 3


def test_dump_folder_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "dump"
    with caplog.at_level(logging.WARNING, logger="inductor_sparse"):
        options = {"sparse.dump_dir": str(folder)}
        _, decisions = compile_and_compare(
            Down(), torch.randn(5, HIDDEN), options=options
        )
    assert outcomes(decisions) == ["applied"]
    (message,) = [r.getMessage() for r in caplog.records if "dump" in r.name]
    assert message.startswith(f"cannot write to the dump folder {folder} (Not a dir")


def test_missing_dump_folder_is_created(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    options = {"sparse.dump_dir": str(folder)}
    compile_and_compare(Down(), torch.randn(5, HIDDEN), options=options)
    assert (folder / "index.md").is_file()
    (decisions,) = folder.glob("*/decisions.json")
    assert '"applied"' in decisions.read_text()
    (kernels,) = folder.glob("*/*forward.py")
    assert "row_major_weight" in kernels.read_text()


def test_plan_of_another_model(tmp_path: Path) -> None:
    plan = str(tmp_path / "plan.json")
    inductor_sparse.calibrate(Stack(relu2), [tokens(5)]).save(plan)
    with pytest.raises(BackendCompilerFailed) as failure:
        compile_and_compare(FFN(), tokens(5), options={"sparse.plan": plan})
    error = failure.value.inner_exception
    assert isinstance(error, SparsePlanError)
    assert str(error) == (
        "the plan was made for another model: it knows layers.0.down:64x16, this graph "
        "has down:64x16; calibrate this model, or drop the sparse.plan option"
    )
