"""Routing patterns of the library by kernels, in Triton's interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.runtime.gpu import chosen
from attnc.runtime.library import routing_names

Case = tuple[int, dict[str, Any], Callable[[int], dict[str, Tensor]]]


def nothing(n: int) -> dict[str, Tensor]:
    return {}


CASES: dict[str, Case] = {
    "anchor": (45, {"block": 4, "group": 3, "theta": 1}, nothing),
    "deepseek_sparse": (
        37,
        {"topk": 6},
        lambda n: {"iq": torch.randn(1, n, 3, 4), "ik": torch.randn(1, n, 4), "w": torch.randn(1, n, 3)},
    ),
    "dynamic_mask": (37, {"keys_kept": 7}, lambda n: {"bias": torch.randn(1, 2, n)}),
    "hybrid_forcing": (
        36,
        {"frame": 4, "sinks": 1, "local": 5, "ratio": 0.5, "block": 4},
        lambda n: {"rq": torch.randn(1, 4, n, 16), "rk": torch.randn(1, 4, n, 16), "mix": torch.randn(4, 16)},
    ),
    "minference_blocks": (45, {"block": 8, "topk": 3}, nothing),
    "minference_vertical_slash": (45, {"columns": 3, "slashes": 3, "block": 4, "probe": 5}, nothing),
    "moba": (45, {"block": 8, "topk": 3}, nothing),
    "native_sparse": (45, {"block": 8, "topk": 4, "window": 11}, lambda n: {"gate": torch.rand(1, n, 4, 3)}),
    "recycled": (37, {}, lambda n: {"cached": torch.randint(-1, n, (1, 2, 5)), "since": torch.tensor([30])}),
    "seer": (
        45,
        {"block": 8, "threshold": 0.2, "dense_rows": 1},
        lambda n: {"gq": torch.randn(1, 4, 6, 4), "gk": torch.randn(1, 4, 6, 4)},
    ),
    "seer_decode": (45, {"block": 8, "budget": 16}, lambda n: {"gate": torch.randn(1, 2, n, 6)}),
    "sparse_d": (45, {"block": 8}, lambda n: {"map": torch.rand(1, 4, 6, 6) < 0.4}),
    "token_sparse": (37, {"window": 6, "pool": 3, "tau": 0.3}, nothing),
    "vmoba": (60, {"frames": 3, "height": 4, "width": 5, "chunk": [2, 2, 2], "topk": 2, "layer": 2}, nothing),
    "vmoba_threshold": (60, {"frames": 3, "height": 4, "width": 5, "chunk": [2, 2, 2], "layer": 1}, nothing),
    "vsa": (
        60,
        {"frames": 3, "height": 4, "width": 5, "tile": [2, 2, 2], "density": 0.3},
        lambda n: {"gate": torch.randn(1, 4, n, 16)},
    ),
}

KEY_BY_KEY = {"anchor", "deepseek_sparse", "dynamic_mask", "minference_vertical_slash", "recycled", "token_sparse"}
"""Those whose choice is not among places of keys."""


def test_every_one_has_a_case() -> None:
    assert set(CASES) == set(routing_names())


def counted(own: Callable[..., Any], way: str, calls: list[str]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        calls.append(way)
        return own(*given)

    return run


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, params, make = CASES[name]
    kv_heads = 4 if name == "hybrid_forcing" else 2
    calls: list[str] = []
    for way in ("forward", "backward"):
        monkeypatch.setattr(chosen.ChosenOnGpu, way, counted(getattr(chosen.ChosenOnGpu, way), way, calls))
    attend = compile_attention(name, backend="triton", **params)
    q = torch.randn(1, 4, n, 16, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, n, 16, requires_grad=True) for _ in range(2))
    given: dict[str, Any] = {key: x.requires_grad_(x.is_floating_point()) for key, x in make(n).items()}
    leaves = [x for x in (q, k, v, *given.values()) if x.requires_grad]
    outs = [run(q, k, v, **given) for run in (attend, attend.reference)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=2e-5)
    weights = torch.randn_like(outs[0])
    grads = [
        torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True, materialize_grads=True) for out in outs
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert calls == ([] if name in KEY_BY_KEY else ["forward", "backward"])
