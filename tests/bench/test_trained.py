from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from inductor_sparse.bench import models, trained
from inductor_sparse.bench.models import ModelCase, dropped_energy, union_density
from inductor_sparse.errors import SparseOptionError

L, T, d, f = 2, 64, 8, 32
DOWN = ModelCase("down", False, "relu2", "float32", 64, 96, data="trained")
FFN = dataclasses.replace(DOWN, op="ffn")


@pytest.fixture(autouse=True)
def small_source(monkeypatch: pytest.MonkeyPatch) -> trained.Source:
    """A source whose layers see different inputs."""
    generator = torch.Generator().manual_seed(0)
    source = trained.Source(
        torch.randn(L, T, d, generator=generator),
        torch.randn(L, f, d, generator=generator),
    )
    monkeypatch.setattr(trained, "source", lambda device: source)
    return source


def positive(z: Tensor) -> float:
    """Fraction above zero."""
    return (z > 0).float().mean().item()


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5])
def test_density_is_as_asked(density: float, small_source: trained.Source) -> None:
    z_MF = trained.pre_activation(small_source, 256, 96, density, seed=1)
    assert z_MF.shape == (256, 96)
    assert positive(z_MF) == pytest.approx(density, abs=0.005)
    model = FFN.build()
    z_MF = model.pre_activation(FFN.make_input(256, density, seed=1))
    assert positive(z_MF) == pytest.approx(density, rel=0.25)


def test_blocks_of_a_row_differ(small_source: trained.Source) -> None:
    z_MF = trained.pre_activation(small_source, 4, 4 * f, 0.5, seed=1)
    blocks = z_MF.split(f, dim=1)
    assert not any(
        torch.equal(blocks[i], blocks[j]) for i in range(4) for j in range(i)
    )


def test_the_wide_weight_computes_the_trained_layer(
    small_source: trained.Source,
) -> None:
    weight_FD = trained.gate_weight(small_source, features=65, hidden=3 * f)
    x_MD = trained.ffn_input(small_source, 16, 65, 3 * f, density=0.1, seed=0)
    z_MF = x_MD @ weight_FD.t()
    expected = small_source.pre_activations_LTf[:, :16] - x_MD[:, :1]
    for block, layer in enumerate((0, 1, 0)):
        found = z_MF[:, block * f : (block + 1) * f]
        torch.testing.assert_close(found, expected[layer], rtol=1e-4, atol=1e-4)


def test_the_wide_weight_is_full(small_source: trained.Source) -> None:
    weight_FD = trained.gate_weight(small_source, features=129, hidden=2 * f)
    assert (weight_FD == 0).sum() == 0
    spread = weight_FD[:, 1:].std(dim=0)
    assert spread.min() > 0.3 * spread.max()


def test_too_few_features_are_refused(small_source: trained.Source) -> None:
    with pytest.raises(SparseOptionError, match="more than 8 features"):
        trained.gate_weight(small_source, features=8, hidden=f)


def test_a_wheel_has_no_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(trained, "EXAMPLES", tmp_path)
    with pytest.raises(SparseOptionError, match="examples of a checkout"):
        trained.source.__wrapped__("cpu")


def test_loss_of_2_4_grows_with_density() -> None:
    model = DOWN.build()
    losses = [dropped_energy(model, DOWN.make_input(64, d, 1)) for d in (0.05, 0.5)]
    assert 0 <= losses[0] < losses[1] < 0.5


def test_union_of_the_active_features() -> None:
    model = dataclasses.replace(DOWN, data="random", hidden=8).build()
    x = -torch.ones(2, 8)
    x[0, 0] = x[1, 1] = 1.0
    assert union_density(model, x) == 0.25


def test_errors_are_relative_to_the_largest_and_to_the_mean() -> None:
    expected = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    largest, rms = models.relative_errors(torch.tensor([[3.0, 4.5]]), expected)
    assert (largest, rms) == (pytest.approx(0.125), pytest.approx(0.1))
