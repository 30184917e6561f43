"""Lowering of `round`: the tokens of a unit, refused units, faults, and blocks decided without evaluating tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.analysis import block_conditions, exact_evaluation
from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.ir import array_evaluator
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.ir.verify_ir import verify
from attnc.compiler.lowering.lower import lower
from attnc.compiler.lowering.specialise import CallSizes, Slices, specialise
from attnc.compiler.planning.documents import whole
from attnc.spec.errors import EvaluationError, SpecError
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.source import SourceFile

HEAD = "pattern p(block: int = 4, sizes: int[head] = [2, 3])\n"


def lowered(body: str, **values: object) -> ir.Pattern:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    program = load_program(SourceFile("drawn.attn", HEAD + lines), lambda name, asker: None)
    return lower(bind(program, values, None))


def relation(body: str, n_q: int, n_k: int, **values: object) -> ir.Index:
    """Return the relation of a call."""
    pattern = lowered(body, **values)
    verify(pattern)
    sizes = CallSizes({"heads": 1, "kv_heads": 1, "group": 1, "words": n_k // 2})
    window = whole(n_q, n_k, pattern.align)
    return specialise(pattern.attend.visible, sizes, Slices({}), window, batch=0, head=0, group=1)


def block_ids(body: str, n: int) -> list[int]:
    """Return for each query the first key of its block, where equal numbers of `a` and `b` are one block."""
    mask = exact_evaluation.mask(relation(f"visible q == k\n{body}", n, n), (0, n), (0, n))
    return [int(np.flatnonzero(row)[0]) for row in mask]


def rounds(units: str, keep: str = "any(visible for q in a, k in b)") -> str:
    return f"round\n    per  {units}\n    keep {keep}"


GRID = "tokens y: 4, x: 6"

UNITS: list[tuple[str, str, list[int]]] = [
    ("", "a = q // block, b = k // block", [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]),
    ("", "a = (q + 3) // block, b = (k + 3) // block", [0, 1, 1, 1, 1, 5, 5, 5, 5, 9]),
    ("", "a = (q - 9) // 4, b = (k - 9) // 4", [0, 1, 1, 1, 1, 5, 5, 5, 5, 9]),
    ("", "a = floor(q / 3 + 1/3), b = floor(k / 3 + 1/3)", [0, 0, 2, 2, 2, 5, 5, 5, 8]),
    ("", "a = q, b = k", list(range(10))),
    ("", "b = k // 20, a = q // 20", [0] * 10),
    ("", "a = (2 * q + 1) // 2 // 3, b = k // 3", [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]),
    (GRID, "a = q.y, b = k.y", [0] * 6 + [6] * 6 + [12] * 6 + [18] * 6),
    (GRID, "a = q.x // 4, b = k.x // 4", [0, 0, 0, 0, 4, 4] * 4),
    (GRID, "a = [q.x // 3, q.y // 3], b = [k.x // 3, k.y // 3]", [0, 0, 0, 3, 3, 3] * 3 + [18] * 3 + [21] * 3),
    (GRID, "a = [q.y, q.x], b = k", list(range(24))),
    ("tokens y: 2, x: words", "a = [q.y // 2, q.x // 2], b = [k.y // 2, k.x // 2]", [0, 0, 2, 2, 4] * 2),
]


@pytest.mark.parametrize(("tokens", "units", "wanted"), UNITS)
def test_units(tokens: str, units: str, wanted: list[int]) -> None:
    assert block_ids(f"{tokens}\n{rounds(units)}".strip(), len(wanted)) == wanted


def test_a_unit_holds_only_existing_queries() -> None:
    """The first query is at position 5, so its unit, 4 .. 8, has three queries."""
    keep = "count(true for q in a) == 3 and count(true for k in b) == 4"
    mask = exact_evaluation.mask(
        relation("align end\n" + rounds("a = q // 4, b = k // 4", keep), 6, 11), (0, 6), (0, 11)
    )
    assert mask.any(1).tolist() == [True] * 3 + [False] * 0 + [True] * 3
    assert mask.any(0).tolist() == [True] * 8 + [False] * 3


REFUSED = [
    "q % 4",
    "q // (block - 4)",
    "q // -4",
    "q * 2 // 3",
    "q // sizes",
    "[q // 4, q // 8]",
    "[q.y // 2, q.y // 3]",
    "q.y + q.x",
    "doc[q]",
]


@pytest.mark.parametrize("unit", REFUSED)
def test_other_units_are_refused(unit: str) -> None:
    with pytest.raises(SpecError) as caught:
        lowered(f"input doc: int[token]\n{GRID}\nvisible k <= q\n{rounds(f'a = {unit}, b = k')}")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "A701"
    assert diagnostic.primary.span.text == unit
    assert "q // 128" in diagnostic.help and "[q.y // 8, q.x // 8]" in diagnostic.help


def test_a_fault_names_a_position_in_its_block() -> None:
    with pytest.raises(EvaluationError) as caught:
        exact_evaluation.mask(relation(rounds("a = q // 4, b = k // 4", "10 // (a - 1) > b"), 12, 12), (0, 12), (0, 12))
    assert "division by zero, at query row 4 and key" in str(caught.value)


@pytest.mark.parametrize(
    "keep",
    [
        "a == 1 or 10 // (a - 1) > -20",
        "any(q == 5 or 10 // (5 - q) > -20 for q in a) or true",
        "any(q >= 5 or 10 // (6 - q) > 0 for q in a) or b >= 0",
        "true if a == 1 else 10 // (a - 1) > -20",
    ],
)
def test_a_fault_in_an_unread_value_is_ignored(keep: str) -> None:
    assert exact_evaluation.mask(relation(rounds("a = q // 4, b = k // 4", keep), 12, 12), (0, 12), (0, 12)).all()


def test_numbers_past_64_bits_are_an_error() -> None:
    keep = "(sum(2 ** 62 + q for q in a) + b) % 3 == 1"
    with pytest.raises(EvaluationError, match="beyond 64 bits"):
        exact_evaluation.mask(relation(rounds("a = q // 4, b = k // 4", keep), 12, 12), (0, 12), (0, 12))
    keep = "(1 if a == 0 else 2 ** 61) * 3 > b"
    assert exact_evaluation.mask(relation(rounds("a = q // 4, b = k // 4", keep), 8, 8), (0, 8), (0, 8)).all()


def test_equal_aggregates_are_one_node() -> None:
    keep = "count(share > 1/3 for k in b) > 0.6 * count(share > 0 for k in b)"
    body = f"visible k <= q\n{rounds('a = q // 4, b = k // 4', keep)}\n    let share = mean(visible for q in a)"
    nodes = [n for n in walk(lowered(body).attend.visible) if isinstance(n, ir.Reduce)]
    assert len(nodes) == 3, "one sum over queries, two over keys"


def test_a_decided_relation_has_no_unit_condition() -> None:
    assert isinstance(lowered(rounds("a = q // 4, b = k // 4", "true")).attend.visible, ir.Truth)


def blocks_by_hand(mask: NDArray[np.bool_], block: int, share: float) -> NDArray[np.bool_]:
    n = len(mask)
    rounded_mask = np.zeros_like(mask)
    for q in range(0, n, block):
        for k in range(0, n, block):
            block_pairs = slice(q, q + block), slice(k, k + block)
            rounded_mask[block_pairs] = mask[block_pairs].mean() >= share
    return rounded_mask


@pytest.mark.parametrize("tile", [1, 2, 4])
def test_tiles_of_whole_blocks_are_decided(tile: int) -> None:
    n, block = 1003, 16
    body = "visible abs(q - k) < 100 or k % 100 < 20\n" + rounds(
        f"a = q // {block}, b = k // {block}", "mean(visible for q in a, k in b) >= 1/2"
    )
    live = find_live_tiles(relation(body, n, n), TileGrid(n, n, block * tile, block * tile))
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    wanted = blocks_by_hand((abs(q - k) < 100) | (k % 100 < 20) & (q >= 0), block, 0.5)
    drawn = np.zeros((n, n), dtype=bool)
    for row, column, count, kind in zip(live.row, live.column, live.count, live.kind, strict=True):
        stretch = slice(int(column) * block * tile, int(column + count) * block * tile)
        rows = slice(int(row) * block * tile, int(row + 1) * block * tile)
        assert kind != 0 or wanted[rows, stretch].all()
        drawn[rows, stretch] = True
    assert not (wanted & ~drawn).any()
    assert live.partial == 0 or tile > 1


def test_no_pair_is_evaluated_where_intervals_decide(monkeypatch: Any) -> None:
    """Far from the edge of a window no pair is evaluated, however many blocks lie there."""
    lanes: list[int] = []
    evaluate = block_conditions.values_at

    def counting(node: ir.Index, points: array_evaluator.PointBatch, *rest: Any, **more: Any) -> Any:
        lanes.append(len(points))
        return evaluate(node, points, *rest, **more)

    monkeypatch.setattr(block_conditions, "values_at", counting)
    n, block = 1 << 17, 128
    keep = "count(visible for q in a, k in b) > 5000"
    body = "visible 0 <= q - k < 20000\n" + rounds(f"a = q // {block}, b = k // {block}", keep)
    live = find_live_tiles(relation(body, n, n), TileGrid(n, n, block, block))
    assert live.partial == 0
    assert sum(lanes) <= 64
    per_row = np.bincount(live.row, weights=live.count)
    assert per_row[-1] == 1 + 155 + 1, "half of the diagonal block, whole ones, and most of the one at 19,968"
