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
        'Which rewrites of a sparse activation are allowed: "exact" skips zeros only; '
        '"2:4" takes the approximate 2:4 format wherever a device has kernels for it, '
        'whether it pays or not; "auto" takes the best for the device and the number '
        "of tokens."
    ),
    "strict": "Raise NothingAppliedError if a compiled graph has no applied site.",
    "dump_dir": (
        "Write graphs before and after each pass, their diffs, the decisions and the "
        "generated kernels to this folder (created if missing); empty: no dump."
    ),
    "plan": "Path of a plan file made by inductor_sparse.calibrate(); empty: no plan.",
    "disabled_rules": "Comma-separated names of rules that must not fire.",
    "weight_copies": (
        "Allow one row-contiguous copy of a weight that is stored [out, in]; without "
        "it such sites stay dense unless the weight was prepared or frozen."
    ),
    "max_density": (
        "A site whose planned density (fraction of non-zeros) is above this stays "
        "dense."
    ),
    "max_dropped_energy": (
        "A site whose planned 2:4 loss (the part of the activation's sum of squares "
        "that is dropped) is above this is not rewritten to 2:4, and one without a "
        "plan is named in a warning when it drops more; the root of it is about the "
        "relative error of the product."
    ),
    "quantize": (
        "Run both matmuls of a ReLU² or ReLU FFN in 8 bits where the second one is "
        "packed 2:4 and the device has kernels for it, each row of weights and "
        "activations with its own scale; weights are quantized once."
    ),
    "quantize_scales": (
        "How an 8-bit FFN scales the rows between its matmuls: "
        '"exact" by their largest value; "predicted", fp8 only, by a bound from norms, '
        "so that the first matmul packs what it computes: a little less precise, and "
        "only with sparse.allow_unverified, because it was never timed on a GPU."
    ),
    "allow_unverified": (
        "Use kernels that never ran on this kind of device; without it such sites stay "
        "dense."
    ),
    "cuda_graphs": (
        "Whoever calls the compiled code captures it in CUDA graphs, so that launching "
        'kernels costs nothing; those of Inductor (mode="reduce-overhead") are seen '
        "without this."
    ),
    "adaptive": (
        "Let a site that is observed too dense to win at run time go back to dense; "
        "on a GPU, count what 2:4 drops."
    ),
}
"""One line of help for each option; ``docs/options.md`` is generated from it."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "activation_format": ("auto", "exact", "2:4"),
    "quantize": ("none", "fp8", "int8"),
    "quantize_scales": ("exact", "predicted"),
}
"""Options that accept only these values."""
