from __future__ import annotations

import dataclasses

import pytest
import torch

from inductor_sparse import reference
from inductor_sparse.bench.models import (
    FeedForward,
    ModelCase,
    activate,
    dropped_energy,
    errors,
    measured_density,
    sample,
)

DOWN = ModelCase("down", False, "relu2", "float32", features=32, hidden=512)
FFN = dataclasses.replace(DOWN, op="ffn")
GATED = dataclasses.replace(FFN, gated=True)
CASES = [DOWN, FFN, GATED]


def test_what_2_to_4_drops_is_that_of_the_product() -> None:
    model = GATED.build()
    x = GATED.make_input(8, 0.5, seed=0)
    with torch.no_grad():
        assert model.up is not None
        product = activate(model.pre_activation(x), "relu2") * model.up(x)
    expected = reference.dropped_energy(product, "identity", "largest_abs")
    assert dropped_energy(model, x) == pytest.approx(expected, rel=1e-3)
    plain = FFN.build()
    z = plain.pre_activation(FFN.make_input(8, 0.5, seed=0))
    lost = reference.dropped_energy(z.detach(), "relu2", "largest")
    found = dropped_energy(plain, FFN.make_input(8, 0.5, seed=0))
    assert found == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=["down", "ffn", "gated"])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 0.9])
def test_density_is_as_asked(case: ModelCase, density: float, dtype: str) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    model = case.build()
    inputs = [case.make_input(64, density, seed) for seed in range(4)]
    assert measured_density(model, inputs) == pytest.approx(density, rel=0.2)


@pytest.mark.parametrize("case", CASES, ids=["down", "ffn", "gated"])
def test_tokens_do_not_share_their_active_features(case: ModelCase) -> None:
    model = case.build()
    z_MF = model.pre_activation(case.make_input(64, 0.1, seed=1))
    both = (z_MF[0] > 0) & (z_MF[1] > 0)
    # Independent tokens share 1 % of the features; the same choice would share 10 %.
    assert both.float().mean() < 0.05


def test_inputs_differ_by_seed_and_repeat_with_it() -> None:
    first, again, other = (DOWN.make_input(4, 0.1, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_density_is_controlled_by_the_input_alone() -> None:
    model = FFN.build()
    before = [weight.clone() for weight in model.parameters()]
    FFN.make_input(4, 0.05, seed=1)
    FFN.make_input(4, 0.50, seed=1)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("case", CASES, ids=["down", "ffn", "gated"])
def test_eager_float32_agrees_with_the_float64_reference(case: ModelCase) -> None:
    model = case.build()
    x = case.make_input(8, 0.1, seed=1)
    with torch.no_grad():
        right = model(x)
    (small, _), (largest, rms) = errors(model, x, right, right * 1.01)
    assert small < 1e-5
    assert (largest, rms) == (pytest.approx(0.01, rel=0.01),) * 2


def test_error_of_the_gated_model_sees_the_up_projection() -> None:
    model = GATED.build()
    assert isinstance(model, FeedForward)
    x = GATED.make_input(8, 0.1, seed=1)
    with torch.no_grad():
        ungated = model.down(activate(model.gate(x), "relu2"))
    ((largest, _),) = errors(model, x, ungated)
    assert largest > 0.1


def test_an_error_in_any_block_of_rows_is_seen() -> None:
    model, x = DOWN.build(), DOWN.make_input(5000, 0.1, seed=1)
    with torch.no_grad():
        right = model(x)
    for first in range(0, 5000, 500):
        wrong = right.clone()
        wrong[first : first + 64] = 0
        ((largest, _),) = errors(model, x, wrong)
        assert largest > 0.1


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 4000])
def test_a_sample_reaches_from_the_first_row_to_the_last(rows: int) -> None:
    found = sample(torch.arange(rows)).tolist()
    assert (found[0], found[-1]) == (0, rows - 1)
    assert found == sorted(set(found))
    assert len(found) == min(rows, 256)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_sample_of_8_bits_keeps_its_values(dtype: torch.dtype) -> None:
    x = torch.arange(-8, 8).to(dtype).repeat(64, 1)
    assert sample(x).dtype is dtype
    assert torch.equal(sample(x).float(), x.float())


def test_activations() -> None:
    z = torch.tensor([-2.0, 0.0, 3.0])
    assert activate(z, "relu").tolist() == [0.0, 0.0, 3.0]
    assert activate(z, "relu2").tolist() == [0.0, 0.0, 9.0]


@pytest.mark.parametrize(
    ("case", "matrices"), [(DOWN, 1), (FFN, 2), (GATED, 3)], ids=["d", "f", "g"]
)
def test_weight_bytes_are_those_of_the_parameters(
    case: ModelCase, matrices: int
) -> None:
    assert case.weight_bytes == matrices * 32 * 512 * 4
    assert case.weight_bytes == sum(p.nbytes for p in case.build().parameters())
