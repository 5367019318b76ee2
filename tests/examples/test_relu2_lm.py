"""The example language model: its cache, its checkpoint files and its training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from relu2_lm import (
    DEFAULT_CHECKPOINT,
    LMConfig,
    ReLU2LM,
    generate,
    load_checkpoint,
    load_model,
    save_model,
    tokens,
)
from stdlib_text import corpus, heldout_bytes
from torch import Tensor, nn
from train_relu2_lm import (
    Training,
    effective_density,
    evaluate,
    heldout_batch,
    parse_args,
    watch_hidden,
)

from inductor_sparse.errors import CheckpointError

TINY = LMConfig(d_model=32, layers=2, heads=2, hidden=64, context=24)


@pytest.fixture
def model() -> ReLU2LM:
    """Return a tiny model with every matrix random, none of them zero."""
    torch.manual_seed(0)
    model = ReLU2LM(TINY)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def text_BT() -> Tensor:
    """Return two different texts that fill the tiny context."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (2, TINY.context), generator=generator)


def test_logits_are_finite_and_one_row_a_token(model: ReLU2LM, text_BT: Tensor) -> None:
    logits_BTV = model(text_BT)
    assert logits_BTV.shape == (2, TINY.context, 256)
    assert logits_BTV.isfinite().all()
    assert not torch.equal(logits_BTV[0], logits_BTV[1])


def test_a_later_byte_never_changes_an_earlier_logit(
    model: ReLU2LM, text_BT: Tensor
) -> None:
    changed_BT = text_BT.clone()
    changed_BT[:, 12] = (changed_BT[:, 12] + 1) % 256
    before, after = model(text_BT), model(changed_BT)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("split", [1, 7, 23])
def test_prefill_then_decode_equals_one_pass(
    model: ReLU2LM, text_BT: Tensor, split: int
) -> None:
    cache = model.new_cache(batch=2)
    parts = [model(text_BT[:, :split], cache, torch.tensor(0))]
    for position in range(split, TINY.context):
        token_B1 = text_BT[:, position : position + 1]
        parts.append(model(token_B1, cache, torch.tensor(position)))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text_BT))


def test_decoding_is_one_graph_for_all_positions(
    model: ReLU2LM, text_BT: Tensor
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(model, backend=count, fullgraph=True)
    cache, eager_cache = model.new_cache(2), model.new_cache(2)
    for position in range(4):
        arguments = text_BT[:, position : position + 1], torch.tensor(position)
        logits = step(arguments[0], cache, arguments[1])
        expected = model(arguments[0], eager_cache, arguments[1])
        torch.testing.assert_close(logits, expected)
    assert len(graphs) == 1


def test_greedy_text_is_that_of_the_uncached_model(model: ReLU2LM) -> None:
    text = bytearray(b"import ")
    for _ in range(6):
        text.append(int(model(tokens(bytes(text)))[0, -1].argmax()))
    made = generate(model, b"import ", 6, model.new_cache())
    assert made == bytes(text[7:])


def test_sampled_text_depends_on_the_seed_alone(model: ReLU2LM) -> None:
    made = [
        generate(model, b"def", 12, model.new_cache(), greedy=False, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_a_saved_model_comes_back_in_half_precision(
    model: ReLU2LM, text_BT: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.pt"
    save_model(model, {"heldout_loss": 2.5}, path)
    loaded = load_model(path)
    assert loaded.config == TINY
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(text_BT), model(text_BT), rtol=0.02, atol=0.05)
    assert load_checkpoint(path)["metadata"] == {"heldout_loss": 2.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.pt"]


def test_rejects_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*gone\.pt: make one"):
        load_model(tmp_path / "gone.pt")


@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_rejects_truncated_checkpoint(
    model: ReLU2LM, tmp_path: Path, kept: int
) -> None:
    path = tmp_path / "cut.pt"
    save_model(model, {}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cut\.pt is corrupt or no checkpoint"):
        load_model(path)


@pytest.mark.parametrize("place", ["data.pkl", "data/0"])
def test_rejects_a_flipped_bit(model: ReLU2LM, tmp_path: Path, place: str) -> None:
    path = tmp_path / "flipped.pt"
    save_model(model, {}, path)
    content = bytearray(path.read_bytes())
    content[content.index(place.encode()) + 128] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="corrupt or no checkpoint"):
        load_model(path)


class _Stranger:
    """Something only an unsafe load would bring to life."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_Stranger(), "corrupt or no checkpoint"),
        ([1, 2, 3], "of another model"),
        ({"state_dict": {}}, "of another model"),
    ],
)
def test_rejects_foreign_checkpoint(
    content: object, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=reason):
        load_model(path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("version", 2, "has version 2, not 1"),
        ("config", {"d_model": 40}, "(?s)not describe this model: .*size mismatch"),
        ("config", {"width": 64}, "not describe this model: .*argument 'width'"),
        ("config", {"heads": 0}, "heads must be a positive integer, not 0"),
        ("config", {"heads": 3}, r"d_model \(320\) must be an even multiple"),
        ("state_dict", {}, "(?s)not describe this model: .*Missing key"),
        ("state_dict", None, "not describe this model: Expected state_dict"),
    ],
)
def test_rejects_checkpoint_with_wrong_part(
    model: ReLU2LM, tmp_path: Path, key: str, value: object, reason: str
) -> None:
    path = tmp_path / "odd.pt"
    save_model(model, {}, path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {key: value}, path)
    with pytest.raises(CheckpointError, match=reason):
        load_model(path)


def test_corpus_holds_out_whole_files() -> None:
    training, heldout = corpus()
    assert heldout == heldout_bytes()
    assert 0.01 < len(heldout) / len(training) < 0.1
    files = set(training.split(b"\0"))
    assert not [f for f in heldout.split(b"\0") if len(f) > 1000 and f in files]


@pytest.mark.parametrize("scale", [1.0, 37.0])
def test_effective_density_counts_equal_values_at_any_scale(scale: float) -> None:
    z_BTF = torch.full((1, 2, 8), -scale)
    z_BTF[0, 0, :2] = scale
    z_BTF[0, 1, :6] = scale
    assert effective_density(z_BTF).item() == pytest.approx(0.5)


def _training(tmp_path: Path, *options: str) -> Training:
    arguments = ["--out", str(tmp_path / "x.pt"), "--minutes", "5", "--no-compile"]
    arguments += ["--warmup", "2", "--heldout-windows", "4", *options]
    return Training(parse_args(arguments), TINY)


def test_a_few_steps_lower_the_loss(tmp_path: Path) -> None:
    training = _training(tmp_path, "--rate", "1e-2")
    losses = [training.train_step().item() for _ in range(12)]
    assert losses[0] == pytest.approx(5.545, abs=0.01)
    assert losses[-1] < losses[0] - 0.3


def test_training_steers_the_density_down(tmp_path: Path) -> None:
    steered = _training(tmp_path, "--density", "0.05")
    free = _training(tmp_path, "--max-sparsity-weight", "0")
    for _ in range(20):
        steered.train_step()
        free.train_step()
    assert steered.sparsity_weight_L.min() > 0.1
    steered_density = sum(steered.report(0.0)["density"])
    assert steered_density < sum(free.report(0.0)["density"])
    lines = (tmp_path / "x_training.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 20]


def test_shipped_checkpoint_is_small_and_as_good_as_it_says() -> None:
    assert DEFAULT_CHECKPOINT.stat().st_size < 16_000_000
    metadata = load_checkpoint()["metadata"]
    model = load_model()
    windows = heldout_batch(heldout_bytes(), 4, 256)
    loss, density = evaluate(model, watch_hidden(model), windows)
    # Another Python version has another held-out text, hence the room.
    assert loss == pytest.approx(metadata["heldout_loss"], abs=0.35)
    assert len(density) == model.config.layers
    assert max(density) < 0.15
