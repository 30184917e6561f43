"""Routing kernels in Triton's interpreter against the reference; `test_every_file.py` covers the library's patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import compile_attention

OTHERS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "clusters of each query's own": (
        """pattern by_query(groups: int = 4)
    align   end
    input   kc: int[batch, kv_head, key]
    select chosen
        over   b = kc[k] % groups
        score  dot(q, mean(b.k))
        keep   rank < 2
    visible k in chosen and k <= q
""",
        {"kc": (2, 2, 15)},
    ),
    "a choice beside sorted tokens": (
        """pattern beside(block: int = 4)
    align   end
    input   h: int[batch, token]
    select chosen
        over   b = k // 3
        score  dot(q, mean(b.k))
        from   b.start <= q
        keep   rank < 2
    visible (k in chosen or k == q) and order(h)[k] // block == order(h)[q] // block
""",
        {"h": (2, 15)},
    ),
}


@pytest.mark.parametrize("n_q", [15, 6])
@pytest.mark.parametrize("name", OTHERS)
def test_patterns_beside_the_library_agree_with_the_reference(name: str, n_q: int) -> None:
    text, shapes = OTHERS[name]
    attend: Any = compile_attention(text, backend="triton")
    q = torch.randn(2, 4, n_q, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 15, 16, requires_grad=True) for _ in range(2))
    inputs = {key: torch.randint(0, 4, shape) for key, shape in shapes.items()}
    outs = [run(q, k, v, **inputs) for run in (attend, attend.reference)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=2e-5)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
