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


def clusters(n: int) -> dict[str, Tensor]:
    return {"qc": torch.randint(0, 5, (1, 4, n)), "kc": torch.randint(0, 6, (1, 2, n))}


def hashes(n: int) -> dict[str, Tensor]:
    ids = {"hq": torch.randint(0, 9, (1, 4, n)), "hk": torch.randint(0, 9, (1, 2, n))}
    return {**ids, "sample": torch.randint(0, n, (1, 2, 7))}


def centroids(n: int) -> dict[str, Tensor]:
    return {"mu": torch.randn(4, 3, 16), "memory_k": torch.randn(4, 3, 2, 16), "memory_v": torch.randn(4, 3, 2, 16)}


def pieces(n: int) -> dict[str, Tensor]:
    begin = torch.arange(n) // 7 * 7
    return {"begin": begin[None], "stop": (begin + 7).clamp(max=n)[None]}


CASES: dict[str, Case] = {
    "anchor": (45, {"block": 4, "group": 3, "theta": 1}, nothing),
    "biformer": (35, {"height": 5, "width": 7, "regions": 3, "topk": 2}, nothing),
    "deepseek_sparse": (
        37,
        {"topk": 6},
        lambda n: {"iq": torch.randn(1, n, 3, 4), "ik": torch.randn(1, n, 4), "w": torch.randn(1, n, 3)},
    ),
    "dhsa": (45, {"rows": 8, "topk": 12, "near": 4, "first": 2}, pieces),
    "dynamic_mask": (37, {"keys_kept": 7}, lambda n: {"bias": torch.randn(1, 2, n)}),
    "hip": (
        61,
        {"stages": [8, 4], "kept": [24, 8], "strides": [2, 1], "rows": 8, "sinks": 3, "window": 8},
        nothing,
    ),
    "hybrid_forcing": (
        36,
        {"frame": 4, "sinks": 1, "local": 5, "ratio": 0.5, "block": 4},
        lambda n: {"rq": torch.randn(1, 4, n, 16), "rk": torch.randn(1, 4, n, 16), "mix": torch.randn(4, 16)},
    ),
    "hyper_attention": (45, {"block": 8}, hashes),
    "minference_blocks": (45, {"block": 8, "topk": 3}, nothing),
    "minference_vertical_slash": (45, {"columns": 3, "slashes": 3, "block": 4, "probe": 5}, nothing),
    "mminference_grid": (45, {"strides": [3, 4], "probe": 6}, nothing),
    "moba": (45, {"block": 8, "topk": 3}, nothing),
    "native_sparse": (45, {"block": 8, "topk": 4, "window": 11}, lambda n: {"gate": torch.rand(1, n, 4, 3)}),
    "recycled": (37, {}, lambda n: {"cached": torch.randint(-1, n, (1, 2, 5)), "since": torch.tensor([30])}),
    "routing_transformer": (37, {"size": 9}, centroids),
    "seer": (
        45,
        {"block": 8, "threshold": 0.2, "dense_rows": 1},
        lambda n: {"gq": torch.randn(1, 4, 6, 4), "gk": torch.randn(1, 4, 6, 4)},
    ),
    "seer_decode": (45, {"block": 8, "budget": 16}, lambda n: {"gate": torch.randn(1, 2, n, 6)}),
    "sparse_d": (45, {"block": 8}, lambda n: {"map": torch.rand(1, 4, 6, 6) < 0.4}),
    "svg2": (45, {"p": 0.4, "query_clusters": 5, "key_clusters": 7}, clusters),
    "token_sparse": (37, {"window": 6, "pool": 3, "tau": 0.3}, nothing),
    "vmoba": (60, {"frames": 3, "height": 4, "width": 5, "chunk": [2, 2, 2], "topk": 2, "layer": 2}, nothing),
    "vmoba_threshold": (60, {"frames": 3, "height": 4, "width": 5, "chunk": [2, 2, 2], "layer": 1}, nothing),
    "vsa": (
        60,
        {"frames": 3, "height": 4, "width": 5, "tile": [2, 2, 2], "density": 0.3},
        lambda n: {"gate": torch.randn(1, 4, n, 16)},
    ),
    "xattention": (48, {"block": 8, "stride": 4, "p": 0.6}, nothing),
}

KEY_BY_KEY = {
    *{"anchor", "deepseek_sparse", "dynamic_mask", "minference_vertical_slash", "recycled", "routing_transformer"},
    *{"dhsa", "hip", "mminference_grid", "token_sparse"},
}
"""Those whose choice is not among places of keys."""
BY_HEAD = {"hyper_attention": 4, "svg2": 4}
"""Those with places of each head's own: how many calls there are."""


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
    kv_heads = 4 if name in ("hybrid_forcing", "routing_transformer") else 2
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
    times = 0 if name in KEY_BY_KEY else BY_HEAD.get(name, 1)
    assert calls == ["forward"] * times + ["backward"] * times


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
def test_others_agree_with_the_reference(name: str, n_q: int) -> None:
    text, shapes = OTHERS[name]
    attend: Any = compile_attention(text, backend="triton")
    q = torch.randn(2, 4, n_q, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 15, 16, requires_grad=True) for _ in range(2))
    given = {key: torch.randint(0, 4, shape) for key, shape in shapes.items()}
    outs = [run(q, k, v, **given) for run in (attend, attend.reference)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=2e-5)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
