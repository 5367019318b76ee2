"""A rule of your own: an activation that this package does not know, with its zeros.

FATReLU (Kurtz et al., ICML 2020, "Inducing and Exploiting Activation Sparsity for Fast
Inference on Deep Neural Networks") is zero up to a threshold above zero.  No rule of
the package matches it: three lines of matching do, and the rest is the package's.
Run it: ``python examples/write_a_rule.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import inductor_sparse
from inductor_sparse import passes
from inductor_sparse.passes.fx_utils import aten, is_call, is_zero, source_tensor


class FATReLUMatmul(passes.Rule):
    """mm(where(x <= t, 0, x), w) skips the rows of w that meet a zero."""

    name = "fatrelu_matmul"

    def match(self, site: passes.Site) -> passes.Producer | None:
        """Say whether this matmul is ours: its left operand is our activation."""
        node = source_tensor(site.lhs)  # behind views and casts
        if not is_call(node, {aten.where.self}) or not is_zero(node.args[1]):
            return None
        return passes.Producer(passes.Family.PLAIN, "fatrelu", node)

    def rewrite(
        self, site: passes.Site, weight: fx.Node, context: passes.PassContext
    ) -> fx.Node:
        """Emit the op that skips zeros; ``weight`` is row-contiguous already."""
        return passes.emit_activation_spmm(site, weight)


class FATReLUFFN(nn.Module):
    """``down(fatrelu(up(x)))``."""

    def __init__(self, features: int, hidden: int, threshold: float) -> None:
        super().__init__()
        self.up = nn.Linear(features, hidden)
        self.act = nn.Threshold(threshold, 0.0)
        self.down = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., features)`` to ``(..., features)``."""
        return self.down(self.act(self.up(x)))


def main() -> None:
    """Compare what is found without the rule and with it."""
    torch.manual_seed(0)
    model = FATReLUFFN(256, 1024, threshold=1.0).eval().requires_grad_(False)
    x = torch.randn(4, 256)
    print("Without the rule:", inductor_sparse.explain(model, x), sep="\n")

    passes.register(FATReLUMatmul())
    print("\nWith the rule:", inductor_sparse.explain(model, x), sep="\n")
    # Its file is part of the compile cache's keys: edit it, and graphs compile anew.
    # options={"sparse.disabled_rules": "fatrelu_matmul"} turns it off again.
    compiled = torch.compile(model, backend="sparse", options={"sparse.strict": True})
    torch.testing.assert_close(compiled(x), model(x))
    print("\nThe compiled model gives the same numbers as eager PyTorch.")


if __name__ == "__main__":
    main()
