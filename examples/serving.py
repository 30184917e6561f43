"""Serve a window from a cache of its own length: a prompt in chunks, then token by token, against the whole call.

The ring has as many slots as the plan needs; older entries are overwritten. Every step is compared with the
corresponding row of a call on all tokens.

    python examples/serving.py
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from attnc import compile_attention

PROMPT, CHUNK, STEPS = 6000, 2000, 200


class Ring:
    """Keys or values of the tokens that are still needed."""

    def __init__(self, slots: int, first: int, heads: int, dim: int) -> None:
        self.data = torch.full((1, heads, slots, dim), float("nan"))
        self.first = first

    def write(self, token: int, x: Tensor) -> None:
        """Keep a token's x (1, heads, dim)."""
        turning = self.data.shape[2] - self.first
        slot = token if token < self.first else self.first + (token - self.first) % turning
        self.data[:, :, slot] = x


def main() -> int:
    """Prefill and decode; return 0 if both agree with the whole call."""
    torch.manual_seed(0)
    attend = compile_attention("sliding_window", window=1024, sinks=4)
    n = PROMPT + STEPS
    q, k, v = torch.randn(1, 8, n, 64), torch.randn(1, 2, n, 64), torch.randn(1, 2, n, 64)
    whole = attend(q, k, v)

    chunks = [attend.prefill(q[:, :, a : a + CHUNK], k, v, kv_len=a + CHUNK) for a in range(0, PROMPT, CHUNK)]
    error = (torch.cat(chunks, 2) - whole[:, :, :PROMPT]).abs().max().item()
    print(f"prompt of {PROMPT} tokens in chunks of {CHUNK}: largest difference from the whole {error:.1e}")

    need = attend.plan(1, n).cache
    assert need is not None
    rings = [Ring(need.first + need.last, need.first, 2, 64) for _ in range(2)]
    for token in range(PROMPT):
        for ring, x in zip(rings, (k, v), strict=True):
            ring.write(token, x[:, :, token])
    start, worst = time.perf_counter(), 0.0
    with torch.no_grad():
        for token in range(PROMPT, n):
            for ring, x in zip(rings, (k, v), strict=True):
                ring.write(token, x[:, :, token])
            query = q[:, :, token : token + 1]
            out = attend.decode(query, rings[0].data, rings[1].data, kv_len=token + 1, ring=True)
            assert isinstance(out, Tensor)
            worst = max(worst, (out - whole[:, :, token : token + 1]).abs().max().item())
    each = (time.perf_counter() - start) / STEPS * 1e3
    print(f"{STEPS} steps from a ring of {need.first + need.last} slots ({need}): {each:.2f} ms each, ", end="")
    print(f"largest difference {worst:.1e}")
    return 0 if max(error, worst) < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
