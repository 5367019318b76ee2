"""A rule of your own: an activation that this package does not know, with its zeros.

TEAL (Liu et al., 2024, "Training-Free Activation Sparsity in Large Language Models")
zeroes what is small, of either sign.  No rule of the package matches that: three lines
of matching do, and the rest is the package's.
Run it: ``python examples/write_a_rule.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import inductor_sparse
from inductor_sparse import passes
from inductor_sparse.passes.fx_utils import aten, is_call, is_zero, source_tensor


class MagnitudeMatmul(passes.Rule):
    """mm(where(|x| > t, x, 0), w) skips the rows of w that meet a zero."""

    name = "magnitude_matmul"

    def match(self, site: passes.Site) -> passes.Producer | None:
        """Say whether this matmul is ours: its left operand is our activation."""
        node = source_tensor(site.lhs)  # behind views and casts
        if not is_call(node, {aten.where.self}) or not is_zero(node.args[2]):
            return None
        return passes.Producer(passes.Family.PLAIN, "magnitude", node)

    def rewrite(
        self, site: passes.Site, weight: fx.Node, context: passes.PassContext
    ) -> fx.Node:
        """Emit the op that skips zeros; ``weight`` is row-contiguous already."""
        return passes.emit_activation_spmm(site, weight)


class ThresholdedFFN(nn.Module):
    """``down(silu(up(x)))``, where small hidden values count as zero."""

    def __init__(self, features: int, hidden: int, threshold: float) -> None:
        super().__init__()
        self.up = nn.Linear(features, hidden)
        self.threshold = threshold
        self.down = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., features)`` to ``(..., features)``."""
        h = nn.functional.silu(self.up(x))
        return self.down(torch.where(h.abs() > self.threshold, h, 0.0))


def main() -> None:
    """Compare what is found without the rule and with it."""
    torch.manual_seed(0)
    model = ThresholdedFFN(256, 1024, threshold=0.5).eval().requires_grad_(False)
    x = torch.randn(4, 256)
    print("Without the rule:", inductor_sparse.explain(model, x), sep="\n")

    passes.register(MagnitudeMatmul())
    print("\nWith the rule:", inductor_sparse.explain(model, x), sep="\n")
    # Its file is part of the compile cache's keys: edit it, and graphs compile anew.
    # options={"sparse.disabled_rules": "magnitude_matmul"} turns it off again.
    compiled = torch.compile(model, backend="sparse", options={"sparse.strict": True})
    torch.testing.assert_close(compiled(x), model(x))
    print("\nThe compiled model gives the same numbers as eager PyTorch.")


if __name__ == "__main__":
    main()
