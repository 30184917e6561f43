"""Relations that require equal ids are cut into windows; the plan's visible pairs are checked against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnc.compiler.planning.build_plan import Relations, build_plan
from attnc.compiler.planning.cpu_plan import Plan
from plan_calls import call, lowered
from plan_checks import check_plan

Int64 = NDArray[np.int64]

TEXT = """
pattern ids
    input ids: int[batch, token]
    {align}
    visible {visible}
"""

RESTS = {
    "ids[q] == ids[k]": lambda far: far < 10**9,
    "ids[q] == ids[k] and k <= q": lambda far: far >= 0,
    "q - k < 5 and ids[k] == ids[q] and k - q < 3": lambda far: (far < 5) & (far > -3),
    "abs(q - k) % 3 == 0 and ids[q] == ids[k]": lambda far: abs(far) % 3 == 0,
}
"""Conditions on the distance from key to query, in addition to equal ids."""


def planned(visible: str, ids: Int64, n_q: int, align: str, heads: int = 2) -> tuple[Plan, Relations]:
    pattern = lowered(TEXT.format(visible=visible, align=f"align   {align}" if align else ""))
    batch, n_k = ids.shape
    relations = Relations(pattern, call(n_q, n_k, heads, heads, batch, ids=ids))
    return build_plan(relations), relations


def truth(visible: str, ids: Int64, n_q: int, offset: int, heads: int = 2) -> NDArray[np.bool_]:
    q, k = np.arange(n_q)[:, None] + offset, np.arange(ids.shape[1])[None]
    seen = np.stack([(row[q] == row[k]) & RESTS[visible](q - k) for row in ids])
    return np.repeat(seen[:, None], heads, axis=1)


def drawn_ids(lengths: list[list[int]], seed: int) -> Int64:
    """Draw runs of ids whose values are in no order; every row is cut to the length of the shortest."""
    draw = np.random.default_rng(seed)
    rows = [np.repeat(draw.permutation(len(own)) - 3, own) for own in lengths]
    return np.stack([row[: min(map(len, rows))] for row in rows]).astype(np.int64)


@given(
    st.sampled_from(sorted(RESTS)),
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=9), min_size=1, max_size=2),
    st.integers(0, 99),
    st.sampled_from(["start", "end"]),
    st.integers(0, 99),
)
def test_plans(visible: str, lengths: list[list[int]], cut: int, align: str, seed: int) -> None:
    ids = drawn_ids(lengths, seed)
    n_q = ids.shape[1] - cut % ids.shape[1]
    offset = ids.shape[1] - n_q if align == "end" else 0
    plan, relations = planned(visible, ids, n_q, align)
    true = truth(visible, ids, n_q, offset)
    check_plan(plan, true)
    for batch, head in np.ndindex(true.shape[:2]):
        assert (relations.mask(batch, head, 0, n_q, 0, ids.shape[1]) == true[batch, head]).all()


def test_windows_are_those_of_the_ids() -> None:
    """Where each id is one run, the remaining relation reads no ids, and a formula covers it."""
    ids = np.repeat([5, 2, 9], [700, 300, 1100])[None]
    plan, relations = planned("ids[q] == ids[k] and k <= q", ids, ids.shape[1], "")
    (local,) = relations.locals(0, 0)
    assert [(w.row, w.key, w.n_q, w.n_k) for w in local.windows] == [
        (0, 0, 700, 700),
        (700, 700, 300, 300),
        (1000, 1000, 1100, 1100),
    ]
    assert "ids" not in str(local.relation)
    assert plan.data == ids.nbytes  # the key of the plan still contains the ids


def test_an_id_in_two_runs() -> None:
    """The id's two runs see each other: the plan has no windows and is still correct."""
    ids = np.repeat([4, 7, 4], [40, 33, 90])[None]
    visible = "ids[q] == ids[k] and k <= q"
    plan, relations = planned(visible, ids, 163, "")
    (local,) = relations.locals(0, 0)
    assert len(local.windows) == 1
    check_plan(plan, truth(visible, ids, 163, 0))


@pytest.mark.parametrize(
    "visible",
    [
        "ids[q] == ids[k] and k % 7 != 0",  # depends on the key's position
        "ids[q] == ids[k] and ids[q] > 0",  # reads ids elsewhere too
        "ids[q] == ids[k] and (q - k) // max(q - k, 1) == 1",  # divides
        "ids[q] == ids[k] or q == k",
        "ids[q] != ids[k]",
    ],
)
def test_relations_that_are_not_cut(visible: str) -> None:
    _, relations = planned(visible, np.repeat([4, 7], [40, 33])[None], 73, "")
    (local,) = relations.locals(0, 0)
    assert len(local.windows) == 1
