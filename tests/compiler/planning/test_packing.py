"""Documents of many lengths in one plan: packs, masks across documents, counts of tiles and pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnc.compiler.planning import placing
from attnc.compiler.planning.build_plan import Relations, build_plan
from attnc.compiler.planning.documents import Windows
from attnc.compiler.planning.placing import Costs, pack
from attnc.compiler.planning.rates import AMX, PieceWork
from plan_calls import call, lowered
from plan_checks import check_plan
from tiers import examples

RELATIONS = {
    "causal": "k <= q",
    "all": "true",
    "window": "0 <= q - k < 20",
    "divided": "k <= q and q // (k + 1) % 2 == 0",
    "by length": "k <= q and 2 * k < keys",
}
SOURCE = "pattern p\n    input doc: int[token]\n    documents doc\n    align end\n    visible "


def truth_of(relations: Relations, doc: NDArray[np.int64], n_q: int) -> NDArray[np.bool_]:
    """Build the mask document by document."""
    n_k = len(doc)
    result = np.zeros((n_q, n_k), dtype=np.bool_)
    for local in relations.locals(0, 0):
        for w in local.windows:
            result[w.row : w.row + w.n_q, w.key : w.key + w.n_k] = relations.mask(
                0, 0, w.row, w.row + w.n_q, w.key, w.key + w.n_k
            )
    return result


@settings(max_examples=examples(60), deadline=None)
@given(
    st.sampled_from(sorted(RELATIONS)),
    st.lists(st.one_of(st.integers(1, 9), st.integers(1, 150)), min_size=1, max_size=30),
    st.integers(0, 400),
    st.sampled_from([1, 8]),
    st.booleans(),
)
def test_documents_of_all_lengths(name: str, lengths: list[int], cut: int, heads: int, shared: bool) -> None:
    doc = np.repeat(np.arange(len(lengths)), lengths)
    n_k = len(doc)
    n_q = max(1, n_k - cut)
    with pytest.MonkeyPatch.context() as patch:
        if not shared:
            patch.setattr(placing, "SHARED_ELEMENTS", 0)
        relations = Relations(lowered(SOURCE + RELATIONS[name] + "\n"), call(n_q, n_k, heads=heads, doc=doc))
        plan = build_plan(relations)
    truth = truth_of(relations, doc, n_q)
    assert (relations.mask(0, 0, 0, n_q, 0, n_k) == truth).all()
    assert not truth[doc[n_k - n_q :][:, None] != doc[None, :]].any()
    check_plan(plan, np.broadcast_to(truth, (1, heads, n_q, n_k)))
    assert plan.tiles.live <= plan.tiles.total


def test_tiles_of_documents() -> None:
    """A document's tiles are counted in its own grid, and tiles between documents by area."""
    lengths = [129, 300, 300, 1000, 128]
    doc = np.repeat(np.arange(5), lengths)
    n = len(doc)
    plan = build_plan(Relations(lowered(SOURCE + "k <= q\n"), call(n, n, heads=2, doc=doc)))
    assert (plan.q_tile, plan.k_tile) == (128, 128)
    full = live = own_tiles = 0
    for length in lengths:
        inside = np.tri(length, dtype=np.bool_)
        for row in range(0, length, 128):
            for column in range(0, length, 128):
                tile = inside[row : row + 128, column : column + 128]
                full, live, own_tiles = full + bool(tile.all()), live + bool(tile.any()), own_tiles + 1
    between = n * n - sum(length**2 for length in lengths)
    assert (plan.tiles.full, plan.tiles.live) == (2 * full, 2 * live)
    assert plan.tiles.total == 2 * own_tiles + -(-2 * between // 128**2)


def test_only_short_documents_are_packed() -> None:
    doc = np.repeat(np.arange(400), np.tile([3, 5, 2, 7], 100))
    plan = build_plan(Relations(lowered(SOURCE + "k <= q\n"), call(len(doc), len(doc), heads=1, doc=doc)))
    assert sum(len(g.pieces) for g in plan.groups) < 100
    assert any("packs of short documents" in reason for reason in plan.reasons)
    large = np.repeat(np.arange(40), np.tile([301, 512], 20))
    plan = build_plan(Relations(lowered(SOURCE + "k <= q\n"), call(len(large), len(large), doc=large)))
    assert {piece.mask for g in plan.groups for piece in g.pieces} == {"causal"}
    assert sum(len(g.pieces) for g in plan.groups) == 2


def test_packs_save_time() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 500)
    starts = np.cumsum(lengths) - lengths
    windows = Windows(starts, starts, lengths, lengths, np.zeros(500, dtype=np.int64))
    packs = pack(windows, Costs(AMX, PieceWork("float32", 64, 1, 6), "causal"))
    assert packs is not None
    assert (packs.last > packs.first).all()
    members = [n for a, b in zip(packs.first, packs.last, strict=True) for n in range(a, b + 1)]
    assert sorted([*members, *packs.alone.tolist()]) == list(range(500))
    assert pack(windows.take(np.arange(1)), Costs(AMX, PieceWork("float32", 64, 1, 6), "causal")) is None
