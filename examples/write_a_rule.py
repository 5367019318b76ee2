"""A rule of your own: zeros that are made inside an op this package cannot see into.

``winners`` keeps the largest activations of every row and zeroes the others, as a
k-sparse autoencoder does, in an op of its own.  No rule of the package knows that op:
two lines of matching do, and the rest is the package's.
Run it: ``python examples/write_a_rule.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import inductor_sparse
from inductor_sparse import passes
from inductor_sparse.passes.fx_utils import is_call, source_tensor


@torch.library.custom_op("write_a_rule::winners", mutates_args=())
def winners(z: Tensor, k: int) -> Tensor:
    """The ``k`` largest values of each row of ``z``, and zeros."""
    least = z.topk(k, dim=-1).values[..., -1:]
    return torch.where(z >= least, z, 0.0)


@winners.register_fake
def _(z: Tensor, k: int) -> Tensor:
    return torch.empty_like(z)


class WinnersMatmul(passes.Rule):
    """mm(winners(z, k), w) skips the rows of w that meet a zero."""

    name = "winners_matmul"

    def match(self, site: passes.Site) -> passes.Producer | None:
        """Say whether this matmul is ours: its left operand is our activation."""
        node = source_tensor(site.lhs)  # behind views and casts
        if not is_call(node, {torch.ops.write_a_rule.winners.default}):
            return None
        return passes.Producer(passes.Family.PLAIN, "winners", node)

    def rewrite(
        self, site: passes.Site, weight: fx.Node, context: passes.PassContext
    ) -> fx.Node:
        """Emit the op that skips zeros; ``weight`` is row-contiguous already."""
        return passes.emit_activation_spmm(site, weight)


class SparseAutoencoder(nn.Module):
    """``decode(winners(encode(x)))``."""

    def __init__(self, features: int, hidden: int, k: int) -> None:
        super().__init__()
        self.encode = nn.Linear(features, hidden)
        self.k = k
        self.decode = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., features)`` to ``(..., features)``."""
        return self.decode(winners(self.encode(x), self.k))


def main() -> None:
    """Compare what is found without the rule and with it."""
    torch.manual_seed(0)
    model = SparseAutoencoder(256, 1024, k=32).eval().requires_grad_(False)
    x = torch.randn(4, 256)
    print("Without the rule:", inductor_sparse.explain(model, x), sep="\n")

    passes.register(WinnersMatmul())
    print("\nWith the rule:", inductor_sparse.explain(model, x), sep="\n")
    # Its file is part of the compile cache's keys: edit it, and graphs compile anew.
    # options={"sparse.disabled_rules": "winners_matmul"} turns it off again.
    compiled = torch.compile(model, backend="sparse", options={"sparse.strict": True})
    torch.testing.assert_close(compiled(x), model(x))
    print("\nThe compiled model gives the same numbers as eager PyTorch.")


if __name__ == "__main__":
    main()
