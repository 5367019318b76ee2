"""Input that no kernel was made for, end to end on a GPU: a reason, right numbers.

2:4 is asked for whether it pays or not, so that small shapes take it.  What is computed
from an activation that is given can be told exactly: the packing does not round.

Shape legend: ``M`` tokens, ``K`` neurons, ``N`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_sparse import config, decisions, formats, ops
from inductor_sparse.decisions import DecisionLog, Reason, Status
from inductor_sparse.lowerings import sparse24_gemm
from inductor_sparse.runtime import cubin_cache

pytestmark = [
    # Torch's own: its graph trees begin with one, and it advises against full float32.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

M, K, N = 200, 512, 256
BF16 = torch.bfloat16
FORCED = {"sparse.activation_format": "2:4"}


@pytest.fixture(autouse=True)
def _decoding_is_not_left_to_the_launches() -> Iterator[None]:
    with config.patch(cuda_graphs=True):
        yield


Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def log() -> Iterator[DecisionLog]:
    with decisions.collect() as found, torch.no_grad():
        yield found


class Down(nn.Module):
    """The second half of a ReLU² FFN."""

    def __init__(self, features: int = N, neurons: int = K, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(neurons, features, bias=bias)
        self.to(device="cuda", dtype=BF16)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(F.relu(z) ** 2)


def compiled(module: Function, **options: Any) -> Function:
    return torch.compile(module, backend="sparse", options=FORCED, **options)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def packed(z: Tensor) -> Tensor:
    """The activation of ``z`` as 2:4 keeps it, in float64."""
    z_MK = z.reshape(-1, z.shape[-1]).contiguous()
    kept = formats.unpack(*ops.sparsify24(z_MK, "relu2", "largest"), z.shape[-1])
    return kept.double().view(z.shape)


def expected(module: Down, z: Tensor) -> Tensor:
    """What the compiled module computes but for the rounding of its result."""
    bias = module.linear.bias
    product = packed(z) @ module.linear.weight.double().t()
    return product if bias is None else product + bias.double()


def close(result: Tensor, wanted: Tensor) -> None:
    assert (result.dtype, result.shape) == (BF16, wanted.shape)
    torch.testing.assert_close(
        result.double(), wanted, rtol=8e-3, atol=8e-3, equal_nan=True
    )


def outcomes(log: DecisionLog) -> list[str]:
    """The op of each site, or why it is dense."""
    return [d.op if d.reason is None else d.reason.value for d in log.decisions]


@pytest.mark.parametrize(
    "make",
    [
        lambda: tokens(M, K),
        lambda: tokens(1, K),
        lambda: tokens(3, 67, K),
        lambda: tokens(K, M).t(),
        lambda: tokens(M, 2 * K)[:, 1 : K + 1],
        lambda: tokens(M * K + 1)[1:].view(M, K),
        lambda: tokens(1, K).expand(M, K),
    ],
    ids=["plain", "one", "3-D", "transposed", "window", "unaligned", "expanded"],
)
def test_any_layout_of_the_activation(
    make: Callable[[], Tensor], log: DecisionLog
) -> None:
    module, z = Down(bias=True), make()
    close(compiled(module)(z), expected(module, z))
    assert outcomes(log) == ["sparse24_mm"]


def test_unaligned_after_aligned(log: DecisionLog) -> None:
    module = Down()
    run, memory = compiled(module), tokens(M * K + 8)
    for offset in (0, 1, 4, 8):
        z = memory[offset : offset + M * K].view(M, K)
        close(run(z), expected(module, z))
    assert set(outcomes(log)) == {"sparse24_mm"}


@pytest.mark.parametrize(
    ("neurons", "features", "found"),
    [
        (520, 200, "sparse24_mm"),
        (72, 8, "sparse24_mm"),
        (K, 100, "unsupported-shape"),
        (K, 97, "unsupported-shape"),
        (500, N, "unsupported-shape"),
    ],
)
def test_sizes_that_fill_no_tile(
    neurons: int, features: int, found: str, log: DecisionLog
) -> None:
    module, z = Down(features, neurons), tokens(M + 1, neurons)
    result = compiled(module)(z)
    if found == "sparse24_mm":
        close(result, expected(module, z))
    else:
        torch.testing.assert_close(result, module(z), rtol=0.02, atol=0.02)
    assert outcomes(log) == [found]


def test_nan_and_inf_stay_in_their_rows(log: DecisionLog) -> None:
    module, z = Down(), tokens(M, K)
    z[3, 5], z[70, 8], z[70, 11], z[130, 0], z[131, 0] = torch.tensor(
        [float("nan"), float("inf"), float("nan"), float("inf"), -float("inf")]
    )
    result = compiled(module)(z)
    close(result, expected(module, z))
    finite = result.isfinite().all(1)
    assert finite.logical_not().nonzero().flatten().tolist() == [3, 70, 130]
    assert outcomes(log) == ["sparse24_mm"]


class FFN(nn.Module):
    """Both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(N, K), Down()
        self.to(device="cuda", dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_rows_of_any_magnitude_in_8_bits(quantize: str, log: DecisionLog) -> None:
    """Beyond the range of e4m3 above and below; a row that is not finite stays one."""
    module = FFN().eval()
    module.up.bias.zero_()
    x = tokens(M, N) * torch.logspace(-8, 6, M, device="cuda", dtype=BF16)[:, None]
    x[7] = 0
    options = {**FORCED, "sparse.quantize": quantize}
    run = torch.compile(module, backend="sparse", options=options)
    for scale in (1.0, -0.5):
        module.down.linear.weight.mul_(scale)
        result = run(x).double()
        wanted = packed(module.up(x)) @ module.down.linear.weight.double().t()
        size = wanted.norm(dim=1).clamp(min=1e-30)
        relative = (result - wanted).norm(dim=1) / size
        # Rounding to 8 bits makes or breaks ties: a few values are other ones.
        assert relative.mean() < 0.1
        assert relative.max() < 0.3
    x[9, 0] = float("nan")
    result = run(x)
    assert result[9].isnan().all()
    assert result[torch.arange(M, device="cuda") != 9].isfinite().all()
    assert outcomes(log) == ["sparse24_mm"]
    assert "not quantized" not in log.decisions[0].detail


def test_a_mutated_input(log: DecisionLog) -> None:
    """The residual is updated in place, and the activation overwritten afterwards."""
    module = Down()

    def step(z: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual.add_(module(z))
        z.mul_(2)
        return residual, z.view(-1)

    z, residual = tokens(M, K), tokens(M, N)
    wanted = residual.double() + expected(module, z)
    doubled = 2 * z
    result, flat = compiled(step)(z, residual)
    close(residual, wanted)
    assert result.data_ptr() == residual.data_ptr()
    assert flat.data_ptr() == z.data_ptr()
    assert torch.equal(z, doubled)
    assert outcomes(log) == ["sparse24_mm"]


def test_inputs_that_share_memory(log: DecisionLog) -> None:
    """One matrix is the activation, the residual, and updated in place."""
    module = Down(K)

    def step(z: Tensor, same: Tensor) -> Tensor:
        return same.add_(module(z))

    z = tokens(M, K)
    wanted = z.double() + expected(module, z)
    close(compiled(step)(z, z), wanted)
    close(z, wanted)
    assert outcomes(log) == ["sparse24_mm"]


def test_several_users_of_the_activation(log: DecisionLog) -> None:
    first, second = Down(), Down(2 * N)

    def both(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = F.relu(z) ** 2
        return first.linear(a), F.gelu(second.linear(a)), a.sum(-1)

    z = tokens(M, K)
    one, two, total = compiled(both)(z)
    close(one, expected(first, z))
    close(two, F.gelu(expected(second, z)))
    torch.testing.assert_close(total, (F.relu(z) ** 2).sum(-1), rtol=0.02, atol=0.02)
    assert outcomes(log) == ["sparse24_mm"] * 2


def test_autocast(log: DecisionLog) -> None:
    module, z = Down(bias=True).float(), tokens(M, K).float()
    with torch.autocast("cuda", BF16):
        result = compiled(module)(z)
    assert result.dtype == BF16
    dense = (z.relu() ** 2).double() @ module.linear.weight.double().t()
    error = (result - module.linear.bias).double() - dense
    allowed = 0.02 if log.decisions[0].status is Status.DENSE else 0.3
    assert error.norm() < allowed * dense.norm()
    assert len(outcomes(log)) == 1


def test_tokens_of_any_number_with_few_graphs(log: DecisionLog) -> None:
    module = Down()
    run = compiled(module, dynamic=True)
    for rows in (300, 17, 1, 0, 1000, 64, 2, 65):
        z = tokens(rows, K)
        close(run(z), expected(module, z))
    assert len(log.graphs) <= 3
    assert set(outcomes(log)) == {"sparse24_mm", "unsupported-shape"}


def test_the_limits_of_the_regimes_are_crossed_with_few_graphs(
    log: DecisionLog,
) -> None:
    module = Down(4096, 16384)
    run = torch.compile(module, backend="sparse", dynamic=True)
    for rows in (8192, 3, 700, 1, 8191, 5000, 2, 9, 16):
        z = tokens(rows, 16384) - 1.28
        wanted = module(z)
        assert (run(z) - wanted).norm() < 0.05 * wanted.norm(), rows
    assert {"sparse24_mm", "activation_spmm", "not-profitable"} <= set(outcomes(log))
    assert len(log.graphs) <= 6


def test_a_size_that_depends_on_data_is_dense(log: DecisionLog) -> None:
    module, z = Down(), tokens(M, K)
    torch._dynamo.decorators.mark_unbacked(z, 0)
    torch.testing.assert_close(compiled(module)(z), module(z), rtol=0.02, atol=0.02)
    (decision,) = log.decisions
    assert decision.reason is Reason.UNSUPPORTED_SHAPE


def test_training_is_dense_with_a_reason() -> None:
    module, z = Down(), tokens(M, K).requires_grad_()
    with decisions.collect() as log:
        compiled(module)(z).float().square().sum().backward()
    gradient, weight = z.grad, module.linear.weight.grad
    z.grad = module.linear.weight.grad = None
    module(z).float().square().sum().backward()
    for ours, theirs in ((gradient, z.grad), (weight, module.linear.weight.grad)):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
    assert outcomes(log) == ["training-graph"]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_weights_changed_between_calls(mode: str | None, log: DecisionLog) -> None:
    module = Down()
    options = {**FORCED, "triton.cudagraphs": mode is not None}
    run = torch.compile(module, backend="sparse", options=options)
    weight = module.linear.weight
    other = Down()
    changes: list[Callable[[], Any]] = [
        lambda: weight.mul_(-1.5),
        lambda: setattr(weight, "data", torch.randn_like(weight) / 16),
        lambda: module.load_state_dict(other.state_dict()),
        lambda: None,
    ]
    for change in changes:
        for _ in range(3):
            z = tokens(M, K)
            torch.compiler.cudagraph_mark_step_begin()
            close(run(z).clone(), expected(module, z))
        change()
    assert set(outcomes(log)) == {"sparse24_mm"}


def test_a_damaged_cache_and_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(cubin_cache.VARIABLE, str(tmp_path))
    z = tokens(M, K)
    values, metadata = ops.sparsify24(z, "relu2", "largest")
    weight = tokens(N, K) / 16
    results = []
    for damage in (b"", b"no cubin", b""):
        for entry in tmp_path.glob("*.cubin"):
            whole = entry.read_bytes()
            entry.write_bytes(damage or whole[:-1])
        sparse24_gemm.plain_kernel.cache_clear()
        results.append(
            torch.ops.inductor_sparse.sparse24_mm(values, metadata, weight.t())
        )
        assert len(list(tmp_path.iterdir())) == 1
    (entry,) = tmp_path.iterdir()
    monkeypatch.setenv(cubin_cache.VARIABLE, str(entry / "below a file"))
    sparse24_gemm.plain_kernel.cache_clear()
    results.append(torch.ops.inductor_sparse.sparse24_mm(values, metadata, weight.t()))
    assert cubin_cache.VARIABLE in caplog.text
    close(results[0], packed(z) @ weight.double().t())
    for result in results[1:]:
        assert torch.equal(results[0], result)
