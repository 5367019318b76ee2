"""The example language model compiled dense and sparse, and the speed of each."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from relu2_lm import KVCache, ReLU2LM, Step, tokens
from torch import Tensor
from torch._inductor import config as inductor_config

from inductor_sparse.bench.display import progress
from inductor_sparse.bench.timing import interleave
from inductor_sparse.bench.variants import (
    HARMLESS_WARNING,
    SETTINGS,
    SILENCE,
    Setting,
)

PROMPT, DECODED = 256, 8
DEFAULT, FREEZING, _, AUTOTUNED = SETTINGS
# On a CPU only frozen weights are autotuned, so max-autotune alone is the default.  For
# a whole prompt it was measured to tie with freezing at best, and is slow to compile.
DENSE = {"prefill": [DEFAULT, FREEZING], "decode": [DEFAULT, FREEZING, AUTOTUNED]}
Round = list[tuple[Tensor, Tensor]]
"""Calls that are timed together: the tokens of each, and where in the text they are."""


class CompiledStep:
    """The model compiled for the calls of ``rounds``, which have one shape."""

    def __init__(
        self, model: ReLU2LM, backend: str, setting: Setting, rounds: list[Round]
    ) -> None:
        self.backend, self.setting, self.rounds = backend, setting, rounds
        self.cache = model.new_cache()

        def step(tokens_BT: Tensor, cache: KVCache, position: Tensor) -> Tensor:
            return model(tokens_BT, cache, position)

        # Dynamo keeps its graphs per code object, and does not tell frozen from not.
        step.__code__ = step.__code__.replace(co_name=f"{backend}_{setting.name}")
        options = {**SILENCE, "max_autotune": setting.max_autotune}
        self.step = torch.compile(step, backend=backend, dynamic=False, options=options)
        # Freezing is no option of a compilation but a global that Dynamo reads.
        frozen = inductor_config.patch(freezing=setting.freezing)
        with frozen, warnings.catch_warnings():
            warnings.filterwarnings("ignore", HARMLESS_WARNING)
            self(0)

    def __call__(self, index: int) -> list[Tensor]:
        """Run one round and return the logits of its calls."""
        calls = self.rounds[index % len(self.rounds)]
        return [self.step(text, self.cache, position) for text, position in calls]

    def loss(self) -> float:
        """Nats per byte over all rounds, predicting each byte but a call's first."""
        losses = []
        for index, calls in enumerate(self.rounds):
            for (text_BT, _), logits_BTV in zip(calls, self(index), strict=True):
                logits_BVT = logits_BTV[:, :-1].double().mT
                losses.append(F.cross_entropy(logits_BVT, text_BT[:, 1:]))
        return torch.stack(losses).mean().item()


def joined(prefill: CompiledStep, decode: CompiledStep) -> Step:
    """One step for any text: prompts go to the first, single bytes to the second."""

    def step(tokens_BT: Tensor, cache: KVCache, position: Tensor) -> Tensor:
        phase = decode if tokens_BT.shape[1] == 1 else prefill
        return phase.step(tokens_BT, cache, position)

    return step


def rounds_of(text: bytes, context: int) -> tuple[list[Round], list[Round]]:
    """Rounds of prefill, one prompt each, and of decoding what follows the first one.

    A prompt has ``PROMPT`` bytes; a round of decoding has ``DECODED`` calls, or what is
    left of the context.
    """
    starts = range(0, len(text) - PROMPT + 1, PROMPT)
    prompts = [[(tokens(text[i : i + PROMPT]), torch.tensor(0))] for i in starts]
    ends = range(PROMPT, context)
    calls = [(tokens(text[i : i + 1]), torch.tensor(i)) for i in ends]
    return prompts, [calls[i : i + DECODED] for i in range(0, len(calls), DECODED)]


def compile_phases(
    model: ReLU2LM, text: bytes, *, quick: bool
) -> dict[str, list[CompiledStep]]:
    """Each phase under each dense setting and, last, sparse under the last of them."""
    rounds = dict(zip(DENSE, rounds_of(text, model.config.context), strict=True))
    dense = {phase: DENSE[phase][: 1 if quick else None] for phase in DENSE}
    phases: dict[str, list[CompiledStep]] = {"prefill": [], "decode": []}
    with progress(2 + sum(map(len, dense.values())), "compiled") as update:
        for phase, settings in dense.items():
            todo = [("inductor", s) for s in settings] + [("sparse", settings[-1])]
            for backend, setting in todo:
                done = sum(map(len, phases.values()))
                update(f"compiling {phase}, {backend}, {setting.name}", done)
                step = CompiledStep(model, backend, setting, rounds[phase])
                phases[phase].append(step)
                update(f"{phase}, {backend}, {setting.name}", done + 1)
    return phases


def tokens_per_second(
    variants: list[CompiledStep], seconds: float
) -> list[list[float]]:
    """The rates of each variant, one a round.

    The variants take turns, so that whatever else the machine does hits all of them.
    """
    count = sum(text.numel() for text, _ in variants[0].rounds[0])
    calls = {str(number): variant for number, variant in enumerate(variants)}
    times = interleave(calls, seconds=seconds, min_rounds=5)
    return [[count / us * 1e6 for us in samples] for samples in times.values()]
