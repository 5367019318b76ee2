"""See it work: a ReLU² language model, compiled dense and sparse (``make demo``).

Says which FFNs were found, generates the same text both ways, and compares tokens per
second with the fastest dense setting of ``torch.compile``.  Exits with 1 if the sparse
model has no sparse site, writes another text, or has another loss on held-out text.
``--quick`` compares only the default settings.
"""

from __future__ import annotations

import sys
import textwrap
import time

import torch
from lm_speed import PROMPT, CompiledStep, compile_phases, joined, tokens_per_second
from relu2_lm import generate, load_model, tokens
from stdlib_text import heldout_bytes

import inductor_sparse
from inductor_sparse.bench.display import print_report, print_table
from inductor_sparse.bench.intervals import median, paired_ratio

Phases = dict[str, list[CompiledStep]]


def same_results(phases: Phases, prompt: bytes) -> bool:
    """Print what dense and sparse write after ``prompt``, and their losses; compare."""
    texts, losses = [], []
    for prefill, decode in zip(
        phases["prefill"][-2:], phases["decode"][-2:], strict=True
    ):
        texts.append(generate(joined(prefill, decode), prompt, 80, prefill.cache))
        losses.append(prefill.loss())
    written = (prompt[-80:] + texts[1]).decode(errors="replace")
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in written)
    print("\n80 bytes of the prompt, then 80 that the sparse model wrote:\n")
    print(textwrap.indent(shown, "  | ", lambda line: True))
    print(f"\ngreedy text:   {'the same' if texts[0] == texts[1] else 'DIFFERENT'}")
    print("held-out loss: dense {:.6f}, sparse {:.6f} nats per byte".format(*losses))
    return texts[0] == texts[1] and abs(losses[0] - losses[1]) <= 1e-4


def compare_speed(phases: Phases, seconds: float) -> None:
    """Print tokens per second, and the speedups over the best dense variant."""
    rows = []
    for phase, variants in phases.items():
        print(f"timing {phase}, {seconds:g} seconds or more", file=sys.stderr)
        rates = tokens_per_second(variants, seconds)
        best = max(rates[:-1], key=median)
        for variant, rate in zip(variants, rates, strict=True):
            gain = paired_ratio(rate, best)
            ratio = f"{gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f})"
            last = [f"{median(rate):.0f}", "best dense" if rate is best else ratio]
            rows.append([phase, variant.backend, variant.setting.name, *last])
    print(
        f"\nfloat32, {torch.get_num_threads()} threads, prompts of {PROMPT} tokens:\n"
    )
    print_table(["phase", "backend", "setting", "tokens/s", "against best dense"], rows)


@torch.no_grad()
def main(*arguments: str) -> int:
    """Run the demonstration and return the exit code."""
    start, text, quick = time.perf_counter(), heldout_bytes(), "--quick" in arguments
    model = load_model()
    explanation = inductor_sparse.explain(model, tokens(text[: model.config.context]))
    print_report(explanation)
    phases = compile_phases(model, text[: 16 * PROMPT], quick=quick)
    prompt = text[: max(PROMPT, 4 + text.rfind(b"def "))][-PROMPT:]
    correct = same_results(phases, prompt)
    compare_speed(phases, seconds=0.2 if quick else 4.0)
    print(f"\n{time.perf_counter() - start:.0f} seconds, compilation included")
    return 0 if correct and explanation.applied else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
