"""Replace one layer's attention: a model written for `scaled_dot_product_attention` gets a prefix-LM pattern.

The calling convention is SDPA's, grouped heads included; the pattern is the mask. The layer compiles as a whole. A
call is compared with the dense reference that is derived from the same text.

    python examples/engineer.py
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from attnc import compile_attention


class PrefixAttention(nn.Module):
    """Self-attention with grouped heads; the first `prefix` tokens of each sequence are visible to all."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.q = nn.Linear(width, heads * self.dim)
        self.kv = nn.Linear(width, 2 * kv_heads * self.dim)
        self.out = nn.Linear(heads * self.dim, width)
        self.attend = compile_attention("prefix_lm")

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, tokens, width) → q, k, v (batch, heads, tokens, head dimension)."""
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, self.dim).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, 2 * self.kv_heads, self.dim).transpose(1, 2).chunk(2, dim=1)
        return q, k, v

    def forward(self, x: Tensor, prefix: Tensor) -> Tensor:
        """x (batch, tokens, width), prefix (batch) of integers → (batch, tokens, width)."""
        # before: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out = self.attend(*self.heads_of(x), prefix=prefix)
        result: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return result


def main() -> int:
    """Run forward and backward, and compare with the dense reference in double precision; return 0 if they agree."""
    torch.manual_seed(0)
    layer = PrefixAttention(width=128, heads=8, kv_heads=2)
    x, prefix = torch.randn(2, 700, 128, requires_grad=True), torch.tensor([40, 300])
    layer(x, prefix).square().mean().backward()
    assert x.grad is not None
    print(f"gradient of x: norm {x.grad.norm():.4f}")

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")  # or the default backend
    agree = all(torch.equal(compiled(x[:, :n], prefix), layer(x[:, :n], prefix)) for n in (700, 500, 300))
    print(f"one compiled graph for three lengths, {'the same numbers' if agree else 'OTHER NUMBERS'}")

    q, k, v = layer.heads_of(x)
    exact = layer.attend.reference(q, k, v, prefix=prefix, dtype=torch.float64)
    out = layer.attend(q, k, v, prefix=prefix)
    error = (out - exact).abs().max().item()
    print(f"largest difference from the fp64 reference: {error:.1e}")
    print(layer.attend.plan(700, heads=8, kv_heads=2, head_dim=16, batch=2, prefix=prefix))
    return 0 if error < 1e-5 and agree else 1


if __name__ == "__main__":
    sys.exit(main())
