"""Routing by strips, regions, clusters, hashes and centroids against references."""

from __future__ import annotations

import pytest
import torch

from attnc import compile_attention
from cases.case import real
from cases.clusters import CLUSTERED, Clustered, biformer, hyper, routing, svg2
from cases.routing import DK, HEADS, KV_HEADS
from reference.clusters import biformer_choice, biformer_regions, svg2_choice, xattention_choice
from routing_calls import seen_as_in_reference, seen_by

pytestmark = pytest.mark.usefixtures("one_thread")


BRANCHES = {"hyper_attention", "routing_transformer"}


# --- equal scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CLUSTERED if case.name not in BRANCHES], ids=repr)
def test_ties_go_to_the_earlier_unit(case: Clustered) -> None:
    (q, k, v), inputs = case.drawn()
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    seen_as_in_reference(case, [q, k, v], inputs)


def test_ties_go_to_the_earlier_token_of_a_centroid() -> None:
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


# --- selections alone -------------------------------------------------------------------------------------------------


def test_selected_units() -> None:
    (q, k, v), inputs = svg2(41, 41, 5, 7, 0.4).drawn()
    attend = compile_attention("svg2", p=0.4, query_clusters=5, key_clusters=7)
    selected = attend.chosen(q, k, v, **inputs)["chosen"]
    wanted = svg2_choice(q, k, qc=inputs["qc"], kc=inputs["kc"], p=0.4, least=1)
    in_use = torch.stack(
        [torch.stack([torch.isin(torch.arange(5), clusters) for clusters in entry]) for entry in inputs["qc"]]
    )
    rows, places = wanted.shape[-2:]
    assert torch.equal(selected[..., :rows, :places] & in_use[..., :rows, None], wanted & in_use[..., :rows, None])
    assert not bool(selected[..., places:].any())

    q, k, v = real(2, HEADS, 48, DK), real(2, KV_HEADS, 48, DK), real(2, KV_HEADS, 48, 3)
    selected = compile_attention("xattention", block=8, stride=4, p=0.6).chosen(q, k, v)["chosen"]
    assert torch.equal(selected, xattention_choice(q, k, block=8, stride=4, p=0.6))

    case = biformer(6, 9, 3, 2)
    (q, k, v), _ = case.drawn()
    region, _, _ = biformer_regions(6, 9, 3)
    selected = case.compiled().chosen(q, k, v)["routed"]
    assert torch.equal(selected[:, None], biformer_choice(q, k, region=region, regions=3, topk=2))


def test_ids_past_the_bound_wrap() -> None:
    """An id beyond the bound is harmless: it is reduced modulo the number of clusters."""
    attend = compile_attention("svg2", p=0.4, query_clusters=4, key_clusters=6)
    (q, k, v), inputs = svg2(41, 41, 5, 7, 0.4).drawn()
    far = {"qc": inputs["qc"] % 4 + 4, "kc": inputs["kc"] % 6 - 6}
    near = {"qc": inputs["qc"] % 4, "kc": inputs["kc"] % 6}
    assert torch.equal(attend(q, k, v, **far), attend(q, k, v, **near))
