"""Run the attentions of papers.attn, forward and backward, and compare each with the dense reference.

python examples/papers.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from attnc import compile_attention

FILE = Path(__file__).with_name("papers.attn")
TOKENS, HEADS, DIM = 64, 4, 16
PARAMETERS: dict[str, dict[str, Any]] = {
    "transformer_xl": {},
    "kerple": {},
    "cosformer": {},
    "retention_parallel": {},
    "long_short": {},
    "axial": {"width": 8},
    "focal": {"width": 8},
}
"""The inputs that each pattern needs."""


def difference(name: str) -> float:
    """Return the largest difference between the executor's output and gradients and the reference's, in fp64."""
    attend = compile_attention(f"{FILE}:{name}", **PARAMETERS[name])
    sizes = {"length": TOKENS} if name == "transformer_xl" else {}
    module = attend.module(heads=HEADS, dk=DIM, dv=DIM, **sizes).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    q, k, v = (torch.randn(1, HEADS, TOKENS, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3))
    learned = dict(module.named_parameters())
    call: Any = attend
    results = []
    for run in (call, call.reference):
        out = run(q, k, v, **learned)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, *learned.values()))))
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def main() -> int:
    """Compare all patterns; return 0 if they agree."""
    torch.manual_seed(0)
    worst = 0.0
    for name in PARAMETERS:
        gap = difference(name)
        worst = max(worst, gap)
        print(f"{name:20} differs from the dense reference by {gap:.1e}")
    return int(not worst < 1e-9)


if __name__ == "__main__":
    sys.exit(main())
