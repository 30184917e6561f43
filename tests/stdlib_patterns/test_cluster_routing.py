"""Routing by strips, regions, clusters, hashes and centroids against references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from reference import clusters as cluster_references
from reference.clusters import biformer_choice, biformer_regions, svg2_choice, xattention_choice
from routing_cases import (
    DK,
    HEADS,
    KV_HEADS,
    Case,
    Inputs,
    real,
    same_as_reference,
    seen_as_in_reference,
    seen_by,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def clusters(of_queries: int, of_keys: int) -> Callable[[int, int], Inputs]:
    """Clusters of which one at least is empty, where there are several."""

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


class Routed(Case):
    """A case whose pattern has parameters that its reference has not."""

    OURS = ("query_clusters", "key_clusters")

    def reference(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        own = {name: x for name, x in self.params.items() if name not in self.OURS}
        return cluster_references.REFERENCES[self.name](q, k, v, **inputs, **own)

    def drawn(self) -> tuple[list[Tensor], Inputs]:
        qkv, inputs = super().drawn()
        if self.name == "routing_transformer":  # each query head has centroids, and keys, of its own
            qkv[1:] = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in qkv[1:]]
        return qkv, inputs


def svg2(n_q: int, n_k: int, of_queries: int, of_keys: int, p: float, least: int = 1) -> Routed:
    own = {"p": p, "least": least, "query_clusters": of_queries, "key_clusters": of_keys}
    return Routed("svg2", n_q, n_k, own, clusters(of_queries, of_keys))


def hyper(n_q: int, n_k: int, block: int, buckets: int, samples: int) -> Routed:
    return Routed("hyper_attention", n_q, n_k, {"block": block}, hashes(buckets, samples))


def biformer(height: int, width: int, regions: int, topk: int) -> Routed:
    own = {"height": height, "width": width, "regions": regions, "topk": topk}
    return Routed("biformer", height * width, height * width, own)


def routing(n_q: int, n_k: int, count: int, size: int, memories: int = 2) -> Routed:
    return Routed("routing_transformer", n_q, n_k, {"size": size}, centroids(count, memories))


CASES = [
    *[
        Routed("xattention", 48, 48, {"block": 8, "stride": stride, "p": p})
        for stride in (1, 4, 8)
        for p in (0.3, 0.77)
    ],
    *[Routed("xattention", 48, 48, {"block": 8, "stride": 4, "p": p}) for p in (0, 2)],
    Routed("xattention", 8, 8, {"block": 8, "stride": 2, "p": 0.9}),
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

BRANCHES = {"hyper_attention", "routing_transformer"}


def test_every_one_has_a_case() -> None:
    assert {case.name for case in CASES} == set(cluster_references.REFERENCES)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_output_and_gradients(case: Routed, backend: str) -> None:
    same_as_reference(case, backend, fixed=["mu"])


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_what_is_seen(case: Routed) -> None:
    seen_as_in_reference(case, *case.drawn())


# --- equal scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in BRANCHES], ids=repr)
def test_the_earlier_where_all_are_equal(case: Routed) -> None:
    (q, k, v), inputs = case.drawn()
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    seen_as_in_reference(case, [q, k, v], inputs)


def test_the_earlier_tokens_of_a_centroid() -> None:
    case = routing(21, 21, 3, 5)
    (q, k, v), inputs = case.drawn()
    q, k = (torch.zeros_like(x) for x in (q, k))
    seen, wanted = case.reference(q, k, v, inputs)
    assert torch.equal(seen_by(case, [q, k, v], inputs), seen)
    assert not bool(seen[:, :, 5:].any())
    torch.testing.assert_close(case.compiled()(q, k, v, **inputs), wanted)


def test_equal_hashes_keep_their_order() -> None:
    case = hyper(24, 24, 8, 1, 3)
    (q, k, v), inputs = case.drawn()
    seen = seen_by(case, [q, k, v], inputs)
    block = torch.arange(24) // 8
    assert torch.equal(seen, (block[:, None] == block).expand(seen.shape))


# --- choices by themselves --------------------------------------------------------------------------------------------


def test_what_is_chosen() -> None:
    (q, k, v), inputs = svg2(41, 41, 5, 7, 0.4).drawn()
    attend = compile_attention("svg2", p=0.4, query_clusters=5, key_clusters=7)
    found = attend.chosen(q, k, v, **inputs)["chosen"]
    wanted = svg2_choice(q, k, qc=inputs["qc"], kc=inputs["kc"], p=0.4, least=1)
    asked = torch.stack([torch.stack([torch.isin(torch.arange(5), own) for own in entry]) for entry in inputs["qc"]])
    rows, places = wanted.shape[-2:]
    assert torch.equal(found[..., :rows, :places] & asked[..., :rows, None], wanted & asked[..., :rows, None])
    assert not bool(found[..., places:].any())

    q, k, v = real(2, HEADS, 48, DK), real(2, KV_HEADS, 48, DK), real(2, KV_HEADS, 48, 3)
    found = compile_attention("xattention", block=8, stride=4, p=0.6).chosen(q, k, v)["chosen"]
    assert torch.equal(found, xattention_choice(q, k, block=8, stride=4, p=0.6))

    case = biformer(6, 9, 3, 2)
    (q, k, v), _ = case.drawn()
    region, _, _ = biformer_regions(6, 9, 3)
    found = case.compiled().chosen(q, k, v)["routed"]
    assert torch.equal(found[:, None], biformer_choice(q, k, region=region, regions=3, topk=2))


def test_numbers_past_the_bound_wrap() -> None:
    """An id beyond the bound is harmless: it is taken modulo the number of clusters."""
    attend = compile_attention("svg2", p=0.4, query_clusters=4, key_clusters=6)
    (q, k, v), inputs = svg2(41, 41, 5, 7, 0.4).drawn()
    far = {"qc": inputs["qc"] % 4 + 4, "kc": inputs["kc"] % 6 - 6}
    near = {"qc": inputs["qc"] % 4, "kc": inputs["kc"] % 6}
    assert torch.equal(attend(q, k, v, **far), attend(q, k, v, **near))
