"""FFNs inside the op of ``nn.TransformerEncoderLayer`` do not go unmentioned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import inductor_sparse
from inductor_sparse import decisions
from inductor_sparse.decisions import Decision, Reason
from inductor_sparse.errors import NothingAppliedError

X = torch.randn(2, 10, 64)


def layer(activation: str = "relu") -> nn.Module:
    return nn.TransformerEncoderLayer(
        64, 4, 256, batch_first=True, activation=activation
    ).eval()


def compiled(model: nn.Module, *inputs: Tensor, **options: object) -> list[Decision]:
    torch._dynamo.reset()
    fn = torch.compile(model, backend="sparse", options=options or None)
    with torch.no_grad(), decisions.collect() as log:
        torch.testing.assert_close(fn(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    return log.decisions


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def test_it_is_recorded() -> None:
    (decision,) = compiled(layer(), X)
    assert decision.reason is Reason.NO_KERNEL_YET
    assert "torch.backends.mha.set_fastpath_enabled(False)" in decision.detail
    assert decision.shapes == {"M": 10, "K": 256, "N": 64, "B": 2}
    assert decision.rule == "relu_matmul"


def test_gelu_has_nothing_to_record() -> None:
    assert compiled(layer("gelu"), X) == []


def test_nothing_applied_is_an_error_if_asked_for() -> None:
    with pytest.raises(Exception, match="no-kernel-yet") as raised:
        compiled(layer(), X, **{"sparse.strict": True})
    assert isinstance(raised.value.__cause__, NothingAppliedError) or isinstance(
        getattr(raised.value, "inner_exception", None), NothingAppliedError
    )


def test_the_remedy_works(no_fast_path: None) -> None:
    (decision,) = compiled(layer(), X)
    assert decision.op == "activation_spmm"


def test_explain_lists_it_without_a_density() -> None:
    (site,) = inductor_sparse.explain(layer(), X).sites
    assert site.reason is Reason.NO_KERNEL_YET
    assert site.density is None
