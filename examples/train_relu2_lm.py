"""Train the byte-level ReLU² language model on the standard library's source files.

It trains on a GPU if there is one: 45 seconds of an H200 get much further than 40
minutes of two busy cores, and twice as long overfits.  ``--minutes 0.2 --out
/tmp/x.pt`` is a smoke test.  The learning rate falls to zero at the time limit, so any
limit gives a finished model.
Shape legend: see ``relu2_lm.py``; ``N`` bytes of all the text, ``L`` layers.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from relu2_lm import DEFAULT_CHECKPOINT, LMConfig, ReLU2LM, load_model, save_model
from stdlib_text import corpus
from torch import Tensor, nn

from inductor_sparse.bench.display import progress


def batches(text: bytes, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Yield ``(batch, length + 1)`` windows that start at random places, for ever."""
    data_N = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
        yield data_N[starts + torch.arange(length + 1)].long()


def heldout_batch(text: bytes, count: int, length: int) -> Tensor:
    """Return ``count`` windows spread evenly over the text, the same every time."""
    data_N = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    starts = torch.linspace(0, len(text) - length - 1, count).long()[:, None]
    return data_N[starts + torch.arange(length + 1)].long()


def watch_hidden(model: ReLU2LM) -> list[Tensor]:
    """Return a list that every forward pass extends by each layer's ``up`` output."""
    seen: list[Tensor] = []
    for block in model.blocks:
        block.ffn.up.register_forward_hook(lambda _m, _i, out: seen.append(out))
    return seen


def effective_density(z_BTF: Tensor) -> Tensor:
    r"""Return ``(Σ h)² / (F Σ h²)`` with ``h = relu(z)``, averaged over tokens.

    For ``k`` equal values among ``F`` it is ``k / F``, so it is a density with a
    gradient; unlike a plain L1 norm, it cannot be lowered by shrinking ``up`` and
    growing ``down``.  Source: DeepHoyer, Yang et al., 2020, arXiv:1908.09979.
    """
    h_BTF = F.relu(z_BTF).float()
    square = h_BTF.square().sum(-1).clamp_min(1e-9)
    return (h_BTF.sum(-1).square() / square).mean() / z_BTF.shape[-1]


@torch.no_grad()
def evaluate(
    model: ReLU2LM, seen: list[Tensor], windows: Tensor
) -> tuple[float, list[float]]:
    """Return the loss in nats per byte and each layer's fraction of non-zeros."""
    losses: list[float] = []
    densities: list[Tensor] = []
    for window in windows.split(4):
        seen.clear()
        logits_BTV = model(window[:, :-1]).float()
        losses.append(F.cross_entropy(logits_BTV.mT, window[:, 1:]).item())
        densities.append(torch.stack([(z > 0).float().mean() for z in seen]))
    seen.clear()
    return sum(losses) / len(losses), torch.stack(densities).mean(0).tolist()


def make_optimizers(model: ReLU2LM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else.

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
    """
    inner = [p for p in model.blocks.parameters() if p.ndim == 2]
    outer = [p for p in model.parameters() if all(p is not q for q in inner)]
    return [
        torch.optim.Muon(
            inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Training:
    """One run: the model, its optimizers, the clock and the log."""

    def __init__(self, args: argparse.Namespace, config: LMConfig) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.model = ReLU2LM(config).to(args.device)
        if args.start is not None:
            self.model.load_state_dict(load_model(args.start).state_dict())
        self.sparsity_weight_L = torch.full((config.layers,), 0.1, device=args.device)
        self.seen = watch_hidden(self.model)
        self.optimizers = make_optimizers(self.model, args.rate)
        train_text, heldout_text = corpus()
        length = config.context
        self.batches = batches(train_text, args.batch, length, args.seed)
        windows = heldout_batch(heldout_text, args.heldout_windows, length)
        self.heldout = windows.to(args.device)
        self.compiled_losses = torch.compile(self.losses, disable=args.no_compile)
        self.step, self.tokens, self.start = 0, 0, time.perf_counter()

    def losses(self, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cross entropy in nats per byte, then for each layer the
        effective density (with a gradient) and the true one."""
        self.seen.clear()
        with torch.autocast(window.device.type, torch.bfloat16):
            logits_BTV = self.model(window[:, :-1])
        loss = F.cross_entropy(logits_BTV.float().mT, window[:, 1:])
        effective_L = torch.stack([effective_density(z) for z in self.seen])
        true_L = torch.stack([(z > 0).float().mean() for z in self.seen])
        return loss, effective_L, true_L

    def steer_density(self, density_L: Tensor) -> None:
        """Raise the sparsity weight of layers that are too dense, lower the others'."""
        excess_L = (density_L.clamp_min(1e-4) / self.args.density).log().clamp(-1, 1)
        self.sparsity_weight_L *= (0.02 * excess_L).exp()
        self.sparsity_weight_L.clamp_(1e-4, self.args.max_sparsity_weight)

    def progress(self) -> float:
        """Return the fraction of the allowed time that has passed, at most 1."""
        return min(1.0, (time.perf_counter() - self.start) / (60 * self.args.minutes))

    def train_step(self) -> Tensor:
        """Take one step on one batch and return its cross entropy, 0-d."""
        window = next(self.batches).to(self.args.device, non_blocking=True)
        warmup = min(1.0, (self.step + 1) / self.args.warmup)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = (
                self.args.rate * warmup * (1 - self.progress())
            )
        loss, effective_L, density_L = self.compiled_losses(window)
        (loss + (self.sparsity_weight_L * effective_L).sum()).backward()
        self.steer_density(density_L.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += window[:, 1:].numel()
        return loss.detach()

    def report(self, train_loss: float) -> dict[str, Any]:
        """Measure the held-out text; append one line to the log and return it."""
        heldout_loss, density = evaluate(self.model, self.seen, self.heldout)
        record = {
            "step": self.step,
            "minutes": round((time.perf_counter() - self.start) / 60, 2),
            "tokens": self.tokens,
            "train_loss": round(train_loss, 4),
            "heldout_loss": round(heldout_loss, 4),
            "density": [round(value, 4) for value in density],
            "sparsity_weight": [round(w, 4) for w in self.sparsity_weight_L.tolist()],
        }
        with self.args.log.open("a") as log:
            log.write(json.dumps(record) + "\n")
        return record

    def save(self, record: dict[str, Any]) -> None:
        """Write the checkpoint with the latest measurements."""
        metadata = record | {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "heldout_windows": self.args.heldout_windows,
        }
        save_model(self.model, metadata, self.args.out)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train until the time is over and return the last line of the log."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.log.write_text("")
    training = Training(args, LMConfig())
    average = torch.tensor(math.log(256), device=args.device)
    with progress(None, "steps") as update:
        while training.progress() < 1:
            # Not read here: a GPU would wait for the CPU at every step.
            average += 0.05 * (training.train_step() - average)
            update(f"training, {training.progress():.0%}", training.step)
            if training.step % args.log_every == 0:
                record = training.report(average.item())
                training.save(record)
                print(json.dumps(record), flush=True)
    record = training.report(average.item())
    training.save(record)
    # The shipped numbers are those of the weights as stored, in half precision.
    stored = load_model(args.out)
    record["heldout_loss"], record["density"] = evaluate(
        stored, watch_hidden(stored), training.heldout.cpu()
    )
    training.save(record)
    return record


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; on a GPU the defaults make the shipped checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--minutes", type=float, default=0.75 if gpu else 40, help="wall-clock limit")
    add("--out", type=Path, default=DEFAULT_CHECKPOINT, help="checkpoint to write")
    add("--start", type=Path, help="checkpoint to go on from")
    add("--log", type=Path, help="JSON lines log, else beside --out")
    add("--batch", type=int, default=32 if gpu else 4, help="windows a step")
    add("--rate", type=float, default=4e-3, help="peak learning rate")
    add("--warmup", type=int, default=50, help="steps until the peak learning rate")
    add("--density", type=float, default=0.05, help="non-zeros to steer each FFN to")
    add("--max-sparsity-weight", type=float, default=1.0, help="0: do not steer")
    add("--log-every", type=int, default=500 if gpu else 50, help="steps a log line")
    add("--heldout-windows", type=int, default=16, help="held-out windows measured")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--no-compile", action="store_true", help="train without torch.compile")
    args = parser.parse_args(argv)
    if args.log is None:
        args.log = args.out.with_name(f"{args.out.stem}_training.jsonl")
    return args


if __name__ == "__main__":
    print(json.dumps(train(parse_args())))
