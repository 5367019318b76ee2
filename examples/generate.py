"""Generate text with the dense and with the sparse backend, on a CPU or a GPU.

``python examples/generate.py`` takes the model of this folder, ``--config`` random
weights in the shapes of a ``transformers`` family: one of a few names, or the folder or
JSON file of a configuration; ``--model facebook/opt-125m`` a pretrained one, or a
folder with one.  Exits with 1 if no site was found, or if an exact sparse model writes
another text than the dense one.  A GPU needs wider models than ``tiny`` to gain: there
the table of sites says ``not-profitable``.
"""

from __future__ import annotations

import argparse
import sys

import torch
from generation import (
    TINY,
    WARMUP,
    BadConfigError,
    Generator,
    TooLongError,
    load,
)

from inductor_sparse.bench.arguments import positive
from inductor_sparse.bench.display import print_table

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def at_least_two(text: str) -> int:
    """Read a number of new tokens: the prompt gives one, and decoding the others."""
    if (count := positive(text)) < 2:
        raise argparse.ArgumentTypeError("2 or more: the first is of the prefill")
    return count


def parser() -> argparse.ArgumentParser:
    """What reads the command line."""
    made = argparse.ArgumentParser(description=__doc__)
    which, add = made.add_mutually_exclusive_group(), made.add_argument
    which.add_argument("--model", help="a pretrained model of transformers")
    which.add_argument(
        "--config",
        metavar="NAME|PATH",
        help=f"random weights instead: {', '.join(TINY)}, or a configuration's file",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--prompt", type=positive, default=256, help="tokens of the prompt")
    add("--new", type=at_least_two, default=64, help="tokens to generate, 2 or more")
    add("--repeats", type=positive, default=5, help="timed generations")
    add("--exact", action="store_true", help="never the 2:4 format")
    return made


def print_speed(dense: Generator, sparse: Generator) -> None:
    """Tokens per second of both in each phase, and the gain."""
    rates = dense.tokens_per_second(), sparse.tokens_per_second()
    rows = [
        [phase, f"{rates[0][phase]:,.0f}", f"{rates[1][phase]:,.0f}", f"{gain:.2f}x"]
        for phase, gain in ((p, rates[1][p] / rates[0][p]) for p in rates[0])
    ]
    print_table(["tokens/s", "dense", "sparse", "gain"], rows)


def main(*arguments: str) -> int:
    """Generate, print what happened, and return the exit code."""
    given = parser().parse_args(arguments)
    sizes = given.prompt, given.new
    try:
        lm = load(given.model, given.config, *sizes, given.device, DTYPES[given.dtype])
    except (BadConfigError, TooLongError) as error:
        parser().error(str(error))
    graphs = {"triton.cudagraphs": given.device == "cuda"}
    own = {"sparse.activation_format": "exact" if given.exact else "auto"}
    dense = Generator(lm, "inductor", given.new, graphs)
    sparse = Generator(lm, "sparse", given.new, graphs | own)
    for _ in range(WARMUP + given.repeats):  # in turns: noise hits both alike
        texts = dense(), sparse()
    print(
        f"{lm.name}, {given.dtype}, {given.device}, prompt of {given.prompt} tokens\n"
    )
    print_speed(dense, sparse)
    phases, found = ["prefill", "decode"], sparse.table()
    rows = [[site, *(row.get(p, "-") for p in phases)] for site, row in found.items()]
    print()
    print_table(["site", *phases], rows)
    pairs = enumerate(zip(*texts, strict=True))
    place = next((i for i, (a, b) in pairs if a != b), None)
    print(f"\ngreedy text: {'the same' if place is None else f'DIFFERENT at {place}'}")
    approximate = given.device == "cuda" and not given.exact
    return 0 if found and (place is None or approximate) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
