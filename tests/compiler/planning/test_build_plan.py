"""Complete plans: every visible pair once, over heads, batch entries and documents, without quadratic allocations."""

from __future__ import annotations

import tracemalloc
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from numpy.typing import NDArray

from attnc.compiler.ir import Pattern
from attnc.compiler.ir.verify_ir import verify
from attnc.compiler.planning.build_plan import CallShape, Relations, build_plan
from attnc.compiler.planning.cpu_plan import Plan
from attnc.compiler.planning.documents import DocumentsNotContiguousError
from attnc.spec.errors import EvaluationError
from plan_calls import call, lowered
from plan_checks import check_plan
from programs import Program, programs
from tiers import examples

Sizes = dict[str, int]


def planned(source: str, shape: CallShape) -> Plan:
    return build_plan(Relations(lowered(source), shape))


def relation_of(relations: Relations) -> NDArray[np.bool_]:
    s = relations.shape
    masks = [[relations.mask(b, h, 0, s.n_q, 0, s.n_k) for h in range(s.heads)] for b in range(s.batch)]
    return np.array(masks, dtype=np.bool_).reshape(s.batch, s.heads, s.n_q, s.n_k)


def words(pattern: Pattern, n_k: int) -> Sizes:
    """Return the run-time length that the drawn programs read."""
    lengths = [int(getattr(extent, "value", 1)) for segment in pattern.segments for _, extent in segment.axes]
    return {"words": n_k // int(np.prod(lengths))} if lengths else {}


@settings(max_examples=examples(60))
@given(programs(longest=300, elements=1 << 17))
def test_plans(program: Program) -> None:
    pattern, s = lowered(program.source, **program.parameters), program.shape
    verify(pattern)
    sizes = words(pattern, s.n_k)
    relations = Relations(pattern, call(s.n_q, s.n_k, s.heads, s.kv_heads, s.batch, sizes=sizes, **program.inputs))
    try:
        truth = relation_of(relations)
    except EvaluationError:
        assume(False)
        raise
    plan = build_plan(relations)
    check_plan(plan, truth)
    assert plan.tiles.live == plan.tiles.full + plan.tiles.partial
    in_classes = any(
        "residue classes" in reason for reason in plan.reasons
    )  # small classes may make more tiles than dense attention has
    assert in_classes or plan.tiles.live <= plan.tiles.total
    assert str(plan)


def test_heads_with_equal_relations_share_pieces() -> None:
    source = "pattern p\n    visible 0 <= q - k < 2 ** (head // 2 * 2 + 2)\n"
    plan = planned(source, call(200, 200, heads=6, kv_heads=3, batch=2))
    assert [(g.batches, g.heads) for g in plan.groups] == [((0, 1), (0, 1)), ((0, 1), (2, 3)), ((0, 1), (4, 5))]
    by_kv = planned("pattern p\n    visible kv_head == 0 or k <= q\n", call(64, 64, heads=6, kv_heads=3))
    assert [g.heads for g in by_kv.groups] == [(0, 1), (2, 3, 4, 5)]


def test_batch_entries_with_equal_relations_share_pieces() -> None:
    source = "pattern p\n    input n: int[batch]\n    visible k < n\n"
    plan = planned(source, call(100, 100, batch=4, n=np.array([30, 70, 30, 70])))
    assert sorted(g.batches for g in plan.groups) == [(0, 2), (1, 3)]
    assert plan.visible == 100 * (30 + 70 + 30 + 70)


def test_documents() -> None:
    source = "pattern p\n    input doc: int[batch, token]\n    documents doc\n    visible k <= q\n"
    doc = np.repeat([[3, 1, 2, 9], [0, 4, 5, 6]], [50, 50, 50, 7], axis=1)
    plan = planned(source, call(157, 157, heads=2, batch=2, doc=doc))
    inside = doc[:, :, None] == doc[:, None, :]
    check_plan(plan, np.repeat((inside & np.tri(157, dtype=np.bool_))[:, None], 2, axis=1))
    pieces = plan.groups[0].pieces
    assert [(p.queries.count, p.queries.length, p.mask) for p in pieces] == [(3, 50, "causal"), (1, 7, "causal")]
    with pytest.raises(DocumentsNotContiguousError):
        planned(source, call(4, 4, doc=np.array([[1, 2, 1, 1]])))


@pytest.mark.parametrize(
    ("n_q", "n_k", "batch", "heads"), [(0, 0, 1, 1), (0, 5, 1, 1), (5, 0, 1, 1), (5, 5, 0, 1), (5, 5, 1, 0)]
)
@pytest.mark.parametrize("relation", ["k <= q", "0 <= q - k < 3", "head == 0 and k < 4"])
def test_relations_without_visible_pairs(relation: str, n_q: int, n_k: int, batch: int, heads: int) -> None:
    source = f"pattern p\n    align start\n    visible {relation}\n"
    relations = Relations(lowered(source), call(n_q, n_k, heads=heads, kv_heads=max(heads, 1), batch=batch))
    check_plan(build_plan(relations), relation_of(relations))


def test_the_last_rows_of_a_longer_key_list() -> None:
    source = "pattern p\n    align end\n    visible 0 <= q - k < 40\n"
    for n_q in (1, 7, 129):
        relations = Relations(lowered(source), call(n_q, 300))
        check_plan(build_plan(relations), relation_of(relations))


PATTERNS = {
    "causal": "visible k <= q",
    "window": "visible 0 <= q - k < 1024",
    "sinks": "visible 0 <= q - k < 1024 or k <= q and k < 4",
    "blocked": "visible q // 256 == k // 256",
    "blocked, causal": "visible q // 192 == k // 192 and k <= q",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PATTERNS)
def test_planning_makes_nothing_quadratic(name: str, dtype: str) -> None:
    """At N = 65,536 the peak stays below N²/4096 bytes for masks (a byte an element) and a few vectors of N numbers."""
    n = 1 << 16
    pattern = lowered(f"pattern p\n    {PATTERNS[name]}\n")
    build_plan(Relations(pattern, call(256, 256, dtype=dtype)))
    tracemalloc.start()
    try:
        plan = build_plan(Relations(pattern, call(n, n, dtype=dtype)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(prod(mask.shape) < n * n // 4096 for mask in plan.masks)
    assert sum(len(g.pieces) for g in plan.groups) <= 24
    assert plan.visible is not None
    assert peak < 8 << 20, f"{peak / (1 << 20):.1f} MiB"


def test_plans_are_the_same_each_time() -> None:
    source = "pattern p\n    visible 0 <= q - k < 70 or k % 50 == 3 and k <= q\n"
    first, second = (planned(source, call(700, 700)) for _ in range(2))
    assert str(first) == str(second)
    assert first.groups == second.groups
    assert all(np.array_equal(a.whole(), b.whole()) for a, b in zip(first.masks, second.masks, strict=True))
