"""The ``sparse.*`` options: type, default, help, and the environment variable if any.

``torch.compile(model, backend="sparse", options={"sparse.strict": True})`` sets one for
one compilation; ``inductor_sparse.config.strict = True`` sets the default of the
process.  The module is an ordinary torch config module, so ``config.patch`` works, and
every value is part of Inductor's cache keys.
"""

import sys
import typing
from typing import Any

from torch.utils._config_module import Config, install_config_module

activation_format: str = "auto"
strict: bool = Config(default=False, env_name_default="INDUCTOR_SPARSE_STRICT")
dump_dir: str = Config(default="", env_name_default="INDUCTOR_SPARSE_DUMP_DIR")
plan: str = Config(default="", env_name_default="INDUCTOR_SPARSE_PLAN")
disabled_rules: str = Config(
    default="", env_name_default="INDUCTOR_SPARSE_DISABLED_RULES"
)
weight_copies: bool = True
max_density: float = 0.6
max_dropped_energy: float = 0.01
quantize: str = "none"
quantize_scales: str = "exact"
allow_unverified: bool = False
cuda_graphs: bool = False
adaptive: bool = True

# Whatever stands above this line becomes an option (postponed annotations would too,
# and would turn the types into text); whatever stands below is ordinary module data.
install_config_module(sys.modules[__name__])

if typing.TYPE_CHECKING:
    from torch.utils._config_typing import *  # noqa: F403

HELP: dict[str, str] = {
    "activation_format": (
        'Which rewrites of a sparse activation are allowed. "exact": only zeros are '
        'skipped. "2:4": the approximate 2:4 format is used wherever the device has '
        'kernels for it, even where it is slower. "auto": whichever is predicted to '
        "be fastest for the device and the number of tokens."
    ),
    "strict": (
        "Raise NothingAppliedError (inside Dynamo's BackendCompilerFailed) if a "
        "compiled graph contains matmuls but no applied site; turns compile caches off."
    ),
    "dump_dir": (
        "Folder (created if missing) to which the graphs before and after each pass, "
        "their diffs, the decisions and the generated code are written; turns compile "
        "caches off. Empty: no dump."
    ),
    "plan": "Path of a plan file made by inductor_sparse.calibrate(); empty: no plan.",
    "disabled_rules": "Comma-separated names of rules that must not fire.",
    "weight_copies": (
        "Allow copies of weights: a row-contiguous one of a weight that is stored "
        "[out, in], and quantized ones. If False, sites that skip zeros stay dense "
        "unless the weight was prepared or frozen, and nothing is quantized."
    ),
    "max_density": (
        "A site whose density in the plan (fraction of non-zeros) is above this stays "
        "dense. Without a plan it has no effect."
    ),
    "max_dropped_energy": (
        "The largest 2:4 loss allowed: the fraction of the activation's sum of squares "
        "that is dropped. With a plan, a site above it is not rewritten to 2:4. "
        "Without a plan, it is rewritten, and a warning names it when it drops more. "
        "The square root of the loss is about the relative error of the product."
    ),
    "quantize": (
        "Run all matmuls of a ReLU² or ReLU FFN, gated or not, in 8 bits wherever the "
        "last one is packed 2:4, the device has kernels for it, and launching them "
        "takes no longer than they save. Scales are per token for activations and per "
        "output feature for weights; weights are quantized once. Where a few tokens "
        "skip zeros, the rows of the second weight are read in 8 bits, each with a "
        "scale. No effect on a CPU."
    ),
    "quantize_scales": (
        "How an 8-bit FFN scales the rows of the activation between its matmuls. "
        '"exact": by their largest value. "predicted": by an upper bound derived from '
        "norms, so that the first matmul can pack its own output; fp8 only, slightly "
        "less precise."
    ),
    "allow_unverified": (
        "Use kernels that have never run on the GPU architecture at hand. If False, "
        "sites that need one stay dense with the reason kernel-unverified."
    ),
    "cuda_graphs": (
        "Tells the backend that the caller captures the compiled code in CUDA graphs, "
        "so that kernel launches cost nothing. Inductor's own CUDA graphs "
        '(mode="reduce-overhead") are detected without this option.'
    ),
    "adaptive": (
        "Observe sites at run time. A site that skips zeros and turns out too dense to "
        "gain is recompiled as dense. On a GPU, count what 2:4 drops."
    ),
}
"""One line of help for each option; ``docs/options.md`` is generated from it."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "activation_format": ("auto", "exact", "2:4"),
    "quantize": ("none", "fp8", "int8"),
    "quantize_scales": ("exact", "predicted"),
}
"""Options that accept only these values."""
