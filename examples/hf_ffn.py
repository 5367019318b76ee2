"""An FFN as Hugging Face models write it, compiled: ``python examples/hf_ffn.py``.

With ``transformers`` installed, ``ACT2FN`` is ``transformers.activations.ACT2FN``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import inductor_sparse

ACT2FN = {"relu2": lambda x: torch.square(nn.functional.relu(x))}


class MLP(nn.Module):
    """The feed-forward layer of Nemotron, Arcee and other ReLU² models."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN["relu2"]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, tokens, hidden_size)`` to the same shape."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


def main() -> None:
    """Compile it, ask what happened, compare with eager PyTorch."""
    mlp, x = MLP(512, 2048).eval().requires_grad_(False), torch.randn(1, 16, 512)
    print(inductor_sparse.explain(mlp, x))
    compiled = torch.compile(mlp, backend="sparse")
    torch.testing.assert_close(compiled(x), mlp(x))
    print("\nThe compiled FFN gives the same numbers as the eager one.")


if __name__ == "__main__":
    main()
