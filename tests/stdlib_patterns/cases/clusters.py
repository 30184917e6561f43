"""Cases of `routing/` patterns whose selections come from regions, clusters, hashes or centroids."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cases.case import real
from cases.routing import DK, HEADS, KV_HEADS, Inputs, Routed, case_of
from reference import clusters


def ids(of_queries: int, of_keys: int) -> Callable[[int, int], Inputs]:
    """Draw cluster ids; if there are several clusters, at least one is empty."""

    def draw(n_q: int, n_k: int) -> Inputs:
        qc = torch.randint(0, max(of_queries - 1, 1), (2, HEADS, n_q))
        return {"qc": qc, "kc": torch.randint(0, max(of_keys - 1, 1), (2, KV_HEADS, n_k))}

    return draw


def hashes(buckets: int, samples: int) -> Callable[[int, int], Inputs]:
    def draw(n_q: int, n_k: int) -> Inputs:
        hq, hk = torch.randint(0, buckets, (2, HEADS, n_q)), torch.randint(0, buckets, (2, KV_HEADS, n_k))
        return {"hq": hq, "hk": hk, "sample": torch.randint(0, n_k, (2, KV_HEADS, samples))}

    return draw


def centroids(count: int, memories: int) -> Callable[[int, int], Inputs]:
    def draw(n_q: int, n_k: int) -> Inputs:
        return {
            "mu": real(HEADS, count, DK),
            "memory_k": real(HEADS, count, memories, DK),
            "memory_v": real(HEADS, count, memories, 3),
        }

    return draw


class Clustered(Routed):
    """A case whose pattern has parameters that its reference does not take."""

    OURS = ("query_clusters", "key_clusters")

    def reference(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        params = {name: x for name, x in self.params.items() if name not in self.OURS}
        return clusters.REFERENCES[self.name](q, k, v, **inputs, **params)

    def drawn(self) -> tuple[list[Tensor], Inputs]:
        qkv, inputs = super().drawn()
        if self.name == "routing_transformer":  # each query head has its own centroids and keys
            qkv[1:] = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in qkv[1:]]
        return qkv, inputs


def svg2(n_q: int, n_k: int, of_queries: int, of_keys: int, p: float, least: int = 1) -> Clustered:
    params = {"p": p, "least": least, "query_clusters": of_queries, "key_clusters": of_keys}
    return Clustered("svg2", n_q, n_k, params, ids(of_queries, of_keys))


def hyper(n_q: int, n_k: int, block: int, buckets: int, samples: int) -> Clustered:
    return Clustered("hyper_attention", n_q, n_k, {"block": block}, hashes(buckets, samples))


def biformer(height: int, width: int, regions: int, topk: int) -> Clustered:
    params = {"height": height, "width": width, "regions": regions, "topk": topk}
    return Clustered("biformer", height * width, height * width, params)


def routing(n_q: int, n_k: int, count: int, size: int, memories: int = 2) -> Clustered:
    return Clustered("routing_transformer", n_q, n_k, {"size": size}, centroids(count, memories))


CLUSTERED = [
    *[
        Clustered("xattention", 48, 48, {"block": 8, "stride": stride, "p": p})
        for stride in (1, 4, 8)
        for p in (0.3, 0.77)
    ],
    *[Clustered("xattention", 48, 48, {"block": 8, "stride": 4, "p": p}) for p in (0, 2)],
    Clustered("xattention", 8, 8, {"block": 8, "stride": 2, "p": 0.9}),
    Clustered("xattention", 60, 60, {"block": 12, "stride": 3, "p": 0.6}),
    biformer(7, 9, 3, 2),
    biformer(6, 9, 3, 1),
    biformer(5, 4, 4, 3),
    biformer(4, 4, 2, 9),
    *[svg2(n_q, 41, 5, 7, p) for n_q in (41, 11) for p in (0.2, 0.7, 1)],
    svg2(41, 41, 1, 1, 0.5),
    svg2(23, 41, 6, 12, 0.1, 4),
    svg2(23, 41, 6, 12, 0.4, 50),
    hyper(40, 40, 8, 5, 6),
    hyper(41, 41, 8, 64, 5),
    hyper(20, 40, 8, 7, 9),
    hyper(40, 20, 4, 7, 3),
    hyper(13, 13, 64, 3, 4),
    *[routing(n_q, 37, count, size) for n_q in (37, 12) for count, size in ((3, 5), (2, 60), (5, 1))],
    routing(20, 20, 4, 6, 1),
]


CASES = [case_of(one, fixed=frozenset(["mu"])) for one in CLUSTERED]
