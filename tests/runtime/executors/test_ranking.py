"""Ranking: the best candidates of a row against a sort by hand, with equal scores and NaN among them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnc.runtime.executors.selections.ranking import _packed_best, best, ranked
from tiers import examples

SCORES = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.0, 1.0 + 2**-23, 3.0, math.inf, math.nan])


def sorted_candidates(score: list[float], candidates: list[bool]) -> list[int]:
    """Return the candidates from best to worst: NaN scores last, equal scores in order of position."""
    places = [i for i, may in enumerate(candidates) if may]
    return sorted(places, key=lambda i: (math.isnan(score[i]), -score[i] if not math.isnan(score[i]) else 0.0, i))


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=9), st.integers(0, 10))
def test_the_best_agree_with_a_sort(row: list[tuple[float, bool]], count: int) -> None:
    score, candidates = [x for x, _ in row], [may for _, may in row]
    wanted = torch.zeros(len(row), dtype=torch.bool)
    wanted[sorted_candidates(score, candidates)[:count]] = True
    for dtype in (torch.float32, torch.float64):
        given_, among = torch.tensor([score], dtype=dtype), torch.tensor([candidates])
        assert torch.equal(best(given_, among, count)[0], wanted)
        if 0 < count < len(row):
            assert torch.equal(_packed_best(given_, among, count)[0], wanted)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=9))
def test_ranks_count_the_candidates_before(row: list[tuple[float, bool]]) -> None:
    score, candidates = [x for x, _ in row], [may for _, may in row]
    rank, _ = ranked(torch.tensor([score]), torch.tensor([candidates]), with_mass=False)
    order = sorted_candidates(score, candidates)
    assert [int(rank[0, i]) for i in order] == list(range(len(order)))


def test_mass_sums_the_better_candidates() -> None:
    score = torch.tensor([[0.1, 0.5, 0.2, 0.2]])
    rank, mass = ranked(score, torch.tensor([[True, True, False, True]]), with_mass=True)
    assert mass is not None
    assert rank[0, [1, 3, 0]].tolist() == [0, 1, 2]
    torch.testing.assert_close(
        mass[0, [1, 3, 0]], torch.tensor([0.0, 0.5, 0.7], dtype=torch.float64), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (2, 4, 70)])
def test_large_rows(shape: tuple[int, ...]) -> None:
    score = torch.randn(shape).round(decimals=1)  # many equal scores
    among = torch.rand(shape) < 0.7
    wanted = _by_rank(score, among, 7)
    assert torch.equal(best(score, among, 7), wanted)
    assert torch.equal(best(score.double(), among, 7), wanted)


def _by_rank(score: Tensor, among: Tensor, count: int) -> Tensor:
    selected = torch.zeros_like(among)
    for row, may, out in zip(
        score.flatten(0, -2), among.flatten(0, -2), selected.view(-1, score.shape[-1]), strict=True
    ):
        out[sorted_candidates(row.tolist(), may.tolist())[:count]] = True
    return selected
