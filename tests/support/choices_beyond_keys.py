"""Selections and units of keys in calls whose first queries are before key 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention
from attnc.runtime.call.example_inputs import example_inputs
from attnc.spec.meaning.evaluate import Evaluator

N_Q, N_K = 14, 8
"""Numbers of queries and keys; queries are at positions -6 to 7."""

_BLOCKS = "select s\n        over b = k // 2\n        score dot(q, mean(b.k))\n"
_TEXTS: Mapping[str, str] = {
    "blocks of the past": f"{_BLOCKS}        from b.end <= q\n        keep rank < 2\n        always q in b\n"
    "    visible k in s and k <= q",
    "blocks wherever they are": f"{_BLOCKS}        keep rank < 2\n    visible k in s",
    "a rest that rounds down": f"{_BLOCKS}        keep rank < 2\n    visible k in s and k // 4 - q // 4 <= 1",
    "one choice for each head": "select s\n        per head\n        score dot(k, k)\n        keep rank < 3\n"
    "    visible k in s and k <= q",
    "a family": "select s[i in 0 .. 2]\n        over b = k // 2\n        score dot(q, mean(b.k)) * (i + 1)\n"
    "        from b.end <= q\n        keep rank < 1 + i\n    visible k in s[0] or k in s[1]",
    "a bias of each query": "input bias: real[batch, query, key]\n    select s\n        score dot(q, k) + bias[q, k]\n"
    "        keep rank < 3\n    visible k in s",
    "units as keys": "over b = k // 4\n    visible b.end <= q\n    score scale * dot(q, mean(b.k))\n"
    "    value mean(b.v)",
}
CHOICES = [*_TEXTS, "moba", "native_sparse", "flash_moba"]
_PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "moba": {"block": 2, "topk": 2},
    "native_sparse": {"block": 2, "topk": 3, "window": 3},
    "flash_moba": {"block": 2, "topk": 2},
}


def chooser(name: str, **params: Any) -> Attention:
    """Compile a pattern of `CHOICES`."""
    if name in _TEXTS:
        return compile_attention(f"pattern p\n    align end\n    {_TEXTS[name]}\n", **params)
    return compile_attention(name, **_PARAMETERS[name], **params)


def drawn(attend: Attention, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Draw q of two heads, k and v of one kv head, and the inputs."""
    draw = torch.Generator().manual_seed(7)
    made = example_inputs(attend.bound, N_Q, N_K, {}, batch=2, heads=2, sizes={"kv_head": 1, "dk": 8, "dv": 8})
    inputs = {name: example.tensor.to(dtype) for name, example in made.items()}
    return [torch.randn(2, h, n, 8, generator=draw).to(dtype) for h, n in ((2, N_Q), (1, N_K), (1, N_K))], inputs


def meant(attend: Attention, vectors: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Compute the output by the evaluator."""
    inputs_by_name = {name: x.double().tolist() for name, x in inputs.items()}
    call = Evaluator(attend.bound, queries=N_Q, keys=N_K, heads=2, kv_heads=1, inputs=inputs_by_name)
    q, k, v = (x.double().tolist() for x in vectors)
    return torch.tensor(call.attend(q, k, v)[0], dtype=torch.float64)


def gradients(attend: Any, vectors: list[Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return out, and the gradients of q, k and v."""
    q, k, v = leaves = [x.clone().requires_grad_() for x in vectors]
    out = attend(q, k, v, **inputs)
    return [out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)]
