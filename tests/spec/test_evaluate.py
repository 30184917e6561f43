"""The evaluator against each pattern's definition, written independently in Python."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.spec.errors import AttncError, EvaluationError
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.program import BoundProgram
from attnc.spec.source import SourceFile

SHIFTED = """
def shifted(x, y, length, window, dilation = 1)
    let group  = x % dilation
    let size   = length // dilation + (1 if group < length % dilation else 0)
    let leader = min(x // dilation, size - 1)
    let first  = clamp(leader - window // 2, 0, size - window)
    return y % dilation == group and first <= y // dilation < first + window
"""


def pattern(body: str, *, head: str = "", before: str = "", **parameters: object) -> BoundProgram:
    """Return a pattern with these lines, bound to these parameters."""
    lines = "\n".join(f"    {line.strip()}" for line in body.strip().splitlines())
    signature = f"({head})" if head else ""
    text = f"{before}\npattern p{signature}\n{lines}\n"
    return bind(load_program(SourceFile("p.attn", text), lambda name, asking: None), parameters)


def evaluator(
    bound: BoundProgram, *, queries: int, keys: int, heads: int = 1, kv_heads: int = 1, inputs: Any = None
) -> Evaluator:
    return Evaluator(bound, queries=queries, keys=keys, heads=heads, kv_heads=kv_heads, inputs=inputs)


def mask(bound: BoundProgram, *, head: int = 0, **call: Any) -> list[list[bool]]:
    """Return the relation of a call, row by row."""
    return evaluator(bound, **call).mask(head=head)


def expected(rule: Callable[[int, int], bool], queries: int, keys: int, shift: int = 0) -> list[list[bool]]:
    return [[rule(q + shift, k) for k in range(keys)] for q in range(queries)]


def test_every_pair_is_visible_without_a_visible_line() -> None:
    assert mask(pattern("tokens i: n"), queries=2, keys=2) == [[True, True], [True, True]]


@given(st.integers(1, 9), st.integers(0, 4), st.integers(1, 12), st.integers(0, 8))
def test_sliding_window(window: int, sinks: int, queries: int, more: int) -> None:
    bound = pattern(
        """align end
        visible 0 <= q - k < window or k <= q and k < sinks""",
        head="window: int, sinks: int",
        window=window,
        sinks=sinks,
    )
    keys = queries + more
    rule = expected(lambda q, k: 0 <= q - k < window or (k <= q and k < sinks), queries, keys, more)
    assert mask(bound, queries=queries, keys=keys) == rule
    assert evaluator(bound, queries=queries, keys=keys).visible(0, 0) == rule[0][0]


def test_align_start_leaves_positions_alone() -> None:
    bound = pattern("align start\nvisible k <= q")
    assert mask(bound, queries=2, keys=4) == expected(lambda q, k: k <= q, 2, 4)


def test_unequal_lengths_need_align() -> None:
    with pytest.raises(EvaluationError, match="need `align`"):
        mask(pattern("visible k <= q"), queries=2, keys=4)
    bound = pattern("input a: bool[query]\ninput b: bool[key]\nvisible a[q] and b[k]")
    inputs = {"a": [True, False], "b": [True, False, True]}
    assert mask(bound, queries=2, keys=3, inputs=inputs) == [[True, False, True], [False] * 3]


@pytest.mark.parametrize(("length", "window", "dilation"), [(9, 3, 1), (9, 4, 2), (10, 5, 2), (11, 3, 3)])
def test_shifted_window_keeps_its_size_at_the_edges(length: int, window: int, dilation: int) -> None:
    bound = pattern(
        "visible shifted(q, k, keys, window, dilation)",
        head="window: int, dilation: int",
        before=SHIFTED,
        window=window,
        dilation=dilation,
    )
    for q, row in enumerate(mask(bound, queries=length, keys=length)):
        seen = [k for k in range(length) if row[k]]
        assert len(seen) == window
        assert q in seen
        assert all(b - a == dilation for a, b in itertools.pairwise(seen))


def test_radial_relation_is_rational_arithmetic() -> None:
    bound = pattern(
        """tokens t: frames, s: per_frame
        let gap   = abs(q.t - k.t)
        let reach = 2 ** (bitlen(per_frame) - bitlen(gap))
        let width = per_frame if gap <= 1 else max(reach * decay, block)
        let kept  = reach >= 4 or gap % (4 // reach) == 0
        visible abs(q.s - k.s) <= width and kept or sink and k.t == 0""",
        head="frames: int, per_frame: int, decay: real, block: int, sink: bool = true",
        frames=7,
        per_frame=3,
        decay=0.2,
        block=1,
    )

    def rule(q: int, k: int) -> bool:
        (qt, qs), (kt, ks) = divmod(q, 3), divmod(k, 3)
        gap = abs(qt - kt)
        reach = Fraction(2) ** ((3).bit_length() - gap.bit_length())
        width = 3 if gap <= 1 else max(reach * Fraction(1, 5), Fraction(1))
        kept = reach >= 4 or gap % (4 // reach) == 0
        return (abs(qs - ks) <= width and kept) or kt == 0

    assert mask(bound, queries=21, keys=21) == expected(rule, 21, 21)


def test_segments_and_a_length_that_is_inferred() -> None:
    bound = pattern(
        """tokens video(y: 2, x: 3)
        tokens text(i: words)
        visible q in text or k in text or q.x == k.x
        visible words == 4""",
    )

    def rule(q: int, k: int) -> bool:
        return q >= 6 or k >= 6 or q % 3 == k % 3

    assert mask(bound, queries=10, keys=10) == expected(rule, 10, 10)
    with pytest.raises(EvaluationError, match="do not fit"):
        mask(bound, queries=5, keys=5)


def test_tokens_must_fit_the_grid() -> None:
    with pytest.raises(EvaluationError, match=r"2 × 3 = 6 tokens, got 7"):
        mask(pattern("tokens y: 2, x: 3\nvisible q.y == k.y"), queries=7, keys=7)


def test_documents_see_only_themselves() -> None:
    bound = pattern(
        """input doc: int[batch, token]
        input mark: bool[token]
        input row: int[query]
        align end
        documents doc
        visible k <= q and (k == 0 or mark[k] or keys == 3) and row[q] >= 0 and q >= keys - queries"""
    )
    doc, mark = [5, 5, 5, 2, 2, 9, 9, 9, 9], [False, True, False] * 3

    def rule(q: int, k: int) -> bool:
        start, end = doc.index(doc[k]), doc.index(doc[k]) + doc.count(doc[k])
        return doc[q] == doc[k] and k <= q and (k == start or mark[k] or end - start == 3)

    inputs = {"doc": [doc], "mark": mark, "row": list(range(9))}
    assert mask(bound, queries=9, keys=9, inputs=inputs) == expected(rule, 9, 9)
    suffix = {**inputs, "row": list(range(5))}
    assert mask(bound, queries=5, keys=9, inputs=suffix) == expected(rule, 5, 9, 4)


def test_documents_are_contiguous() -> None:
    bound = pattern("input doc: int[token]\ndocuments doc\nvisible k <= q")
    with pytest.raises(EvaluationError, match="starts again at token 2"):
        mask(bound, queries=3, keys=3, inputs={"doc": [1, 2, 1]})


def test_heads_parameters_and_inputs() -> None:
    bound = pattern(
        """input full: bool[batch, kv_head]
        input shift: int[head, offsets]
        visible q - k < window or full or any(k == q - shift[i] for i in offsets) or head == 3 and k == 0""",
        head="window: int[head]",
        window=[1, 2, 3, 4],
    )
    inputs = {"full": [[False, True]], "shift": [[4], [5], [6], [7]]}
    for head in range(4):

        def rule(q: int, k: int, head: int = head) -> bool:
            return q - k < head + 1 or head >= 2 or k == q - (4 + head)

        actual = mask(bound, queries=8, keys=8, heads=4, kv_heads=2, head=head, inputs=inputs)
        assert actual == expected(rule, 8, 8)


def test_aggregates_rebind_positions() -> None:
    bound = pattern(
        """let near = abs(q - k) <= 1
        let bound = sum(w for head in heads)
        visible count(near for k) + count(near for q in 0 .. 2) + max(w for head in group) + k <= bound""",
        head="w: int[head]",
        w=[1, 2, 3, 4],
    )

    def rule(q: int, k: int) -> bool:
        keys = sum(abs(q - j) <= 1 for j in range(6))
        return keys + sum(abs(i - k) <= 1 for i in range(2)) + 4 + k <= 10

    assert mask(bound, queries=6, keys=6, heads=4, kv_heads=2, head=2) == expected(rule, 6, 6)


def test_visible_reads_the_relation_of_the_lines_before() -> None:
    bound = pattern(
        """visible q - k < 4
        visible k <= q
        let seen = count(visible for k)
        visible seen < 3 or k % 2 == 0"""
    )

    def rule(q: int, k: int) -> bool:
        return 0 <= q - k < 4 and (min(q + 1, 4) < 3 or k % 2 == 0)

    assert mask(bound, queries=9, keys=9) == expected(rule, 9, 9)


def test_definitions_read_the_positions_of_their_use() -> None:
    bound = pattern("visible f(q) and any(f(q) for k in 2 .. 4)", before="def f(x) = any(x == k + i for i in 0 .. 3)")

    def rule(q: int, k: int) -> bool:
        return 0 <= q - k < 3 and any(0 <= q - j < 3 for j in (2, 3))

    assert mask(bound, queries=8, keys=8) == expected(rule, 8, 8)


def test_an_argument_keeps_its_position_where_a_definition_rebinds_it() -> None:
    bound = pattern("visible f(k)", before="def f(x) = any(x == k for k in 0 .. 2)")
    assert mask(bound, queries=1, keys=4) == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("condition", "seen"),
    [
        ("k > 0 and 6 // k == 2", [False, False, False, True]),
        ("k == 0 or 6 // k == 2", [True, False, False, True]),
        ("(6 // k if k > 0 else 0) == 0", [True, False, False, False]),
        ("f(k > 0, 6 // k)", [False, False, False, True]),
        ("floor(sqrt(k)) == 1", [False, True, True, True]),
        ("ceil(log2(k + 1)) == 2", [False, False, True, True]),
        ("floor(k ** 0.5 * 2) == 2", [False, True, True, False]),
        ("isqrt(k) == 1 and bitlen(k) == 2", [False, False, True, True]),
        ("power_of_two(k)", [False, True, True, False]),
        ("-k // 2 == -1 and -k % 2 == 0", [False, False, True, False]),
        ("k / 2 == 0.5 or k / 3 == 1", [False, True, False, True]),
        ("2 ** -k == 1 / 4", [False, False, True, False]),
        ("xor(k, 1) == bitor(k, 1) and bitand(k, 2) == 2", [False, False, True, False]),
        ("[3, 2, 1, 0][k] == k + 1", [False, True, False, False]),
        ("not (k < 2) == (k < 3)", [False, False, False, True]),
        ("all(k < i for i in 3 .. 3)", [True] * 4),
        ("mean(i for i in 0 .. k + 1) == 1", [False, False, True, False]),
        ("mean(i for i in 0 .. 0) == k", [True, False, False, False]),
        ("sum(i for i in 0 .. k if i != 1) == 2", [False, False, False, True]),
        ("clamp(k, 1, 2) == k", [False, True, True, False]),
    ],
)
def test_expressions(condition: str, seen: list[bool]) -> None:
    if condition.startswith("not (k < 2) =="):
        seen = [a != b for a, b in zip([True, True, False, False], [True, True, True, False], strict=True)]
    before = "def f(c, x) = c and x == 2"
    assert mask(pattern(f"visible {condition}", before=before), queries=1, keys=4) == [seen]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("6 // k == 2", "division by zero"),
        ("6 % k == 2", "division by zero"),
        ("(k + 2 ** 62) * 2 > 0", "64 bits"),
        ("isqrt(k - 1) > 0", "negative"),
        ("bitlen(k - 1) > 0", "negative"),
        ("floor(log(k)) > 0", "not defined"),
        ("floor((k - 1) ** 0.5) > 0", "negative"),
        ("clamp(k, 1, k) > 0", "low <= high"),
        ("[1, 2][k + 2] > 0", "out of range"),
        ("table[k - 1]", "test the index first"),
        ("max(i for i in 0 .. k) > 0", "of an empty range"),
        ("sum(i for i in 0 .. 99999999) > 0", "steps"),
        ("0 ** (k - 1) > 1", "division by zero"),
        ("dk > 3", "unknown"),
    ],
)
def test_conditions_without_a_value(condition: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnc.spec.meaning.evaluate.MAX_STEPS", 10_000)
    bound = pattern(f"input table: bool[key]\nvisible {condition}")
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluator(bound, queries=2, keys=2, inputs={"table": [True, True]}).visible(0, 0)
    assert isinstance(caught.value, AttncError)
    assert isinstance(caught.value, ArithmeticError)
    assert caught.value.span is not None
    assert caught.value.span.line == 4


def test_doubling_definitions_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnc.spec.meaning.evaluate.MAX_STEPS", 10_000)
    lines = "\n".join(f"let a{i + 1} = a{i} + a{i}" for i in range(13))  # 8,191 operations, below the limit of 10,000
    assert mask(pattern(f"let a0 = k\n{lines}\nvisible a13 == 0 or k > 0"), queries=1, keys=2) == [[True, True]]
    calls = "\n".join(f"def f{i + 1}(x) = f{i}(x) + f{i}(x)" for i in range(13))
    bound = pattern("visible f13(k) == 0", before=f"def f0(x) = x\n{calls}")
    with pytest.raises(EvaluationError, match="steps"):
        mask(bound, queries=1, keys=1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "`table` is missing"),
        ({"tabel": [[1, 2]]}, "did you mean `table`"),
        ({"table": [[1, 2]], "other": 3}, "no input `other`"),
        ({"table": [1, 2]}, "has 1 dimensions, expected 2"),
        ({"table": [[1, 2, 3]]}, "has 3 entries, expected 2"),
        ({"table": [[1, True]]}, "holds True"),
        ({"table": [[1, 2**63]]}, "64 bits"),
    ],
)
def test_inputs_are_checked(inputs: dict[str, Any], message: str) -> None:
    bound = pattern("input table: int[batch, key]\nvisible table[k] > 1")
    with pytest.raises(EvaluationError, match=message):
        mask(bound, queries=2, keys=2, inputs=inputs)


def test_calls_are_checked() -> None:
    with pytest.raises(EvaluationError, match="not a multiple"):
        mask(pattern("visible k <= q"), queries=2, keys=2, heads=3, kv_heads=2)
    per_head = pattern("visible q - k < w", head="w: int[head]", w=[1, 2])
    with pytest.raises(EvaluationError, match="2 entries, expected one for each of 3 heads"):
        mask(per_head, queries=2, keys=2, heads=3)
    bound = pattern("require keys % block == 0\nvisible k <= q", head="block: int", block=4)
    with pytest.raises(EvaluationError, match="keys % block"):
        mask(bound, queries=6, keys=6)


def test_values_of_expressions() -> None:
    bound = pattern("align end\nlet gap = q - k\nvisible gap > 0")
    call = Evaluator(bound, queries=2, keys=5)
    assert call.value(bound.program.visible[0], q=1, k=3) is True


# --- round ------------------------------------------------------------------------------------------------------------


def rounded(body: str, units: str, keep: str) -> BoundProgram:
    lines = "".join(f"    {line.strip()}\n" for line in body.strip().splitlines())
    text = f"pattern p\n{lines}    round\n        per  {units}\n        keep {keep}\n"
    return bind(load_program(SourceFile("p.attn", text), lambda name, asking: None), {})


def by_blocks(
    rule: Callable[[int, int], bool],
    units: tuple[Callable[[int], object], Callable[[int], object]],
    keep: Callable[[list[int], list[int], set[tuple[int, int]]], bool],
    queries: range,
    keys: range,
) -> list[list[bool]]:
    """Return the relation rounded to blocks; `keep` receives a block's queries, keys and visible pairs."""
    unit_q, unit_k = units

    def stays(q: int, k: int) -> bool:
        rows = [i for i in queries if unit_q(i) == unit_q(q)]
        columns = [j for j in keys if unit_k(j) == unit_k(k)]
        return keep(rows, columns, {(i, j) for i in rows for j in columns if rule(i, j)})

    return [[stays(q, k) for k in keys] for q in queries]


KEEPS: dict[str, Callable[[list[int], list[int], set[tuple[int, int]]], bool]] = {
    "any(visible for q in a, k in b)": lambda rows, columns, seen: bool(seen),
    "all(visible for q in a, k in b)": lambda rows, columns, seen: len(seen) == len(rows) * len(columns),
    "mean(visible for q in a, k in b) >= 1/2": lambda rows, columns, seen: 2 * len(seen) >= len(rows) * len(columns),
    "count(visible for q in a, k in b if q != k) > a.size": lambda rows, columns, seen: (
        len([pair for pair in seen if pair[0] != pair[1]]) > len(rows)
    ),
    "a.start <= b.end and sum(j for j in b) % 2 == 0": lambda rows, columns, seen: (
        rows[0] <= columns[-1] + 1 and sum(columns) % 2 == 0
    ),
    "count(count(visible for q in a) > 1 for k in b) > 1": lambda rows, columns, seen: (
        len([j for j in columns if len([i for i in rows if (i, j) in seen]) > 1]) > 1
    ),
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(
    ("units", "of"),
    [
        ("a = q // 4, b = k // 3", (lambda q: q // 4, lambda k: k // 3)),
        ("b = (k + 2) // 5, a = q", (lambda q: q, lambda k: (k + 2) // 5)),
        ("a = q % 3, b = [k % 2, k // 6]", (lambda q: q % 3, lambda k: (k % 2, k // 6))),
    ],
)
@pytest.mark.parametrize("more", [0, 3])
def test_round(keep: str, units: str, of: Any, more: int) -> None:
    """Units may be any sets of tokens, consecutive or not; a unit holds only the queries of the call."""
    bound = rounded("align end\nvisible 0 <= q - k < 5", units, keep)
    queries, keys = range(more, 11), range(11)
    wanted = by_blocks(lambda q, k: 0 <= q - k < 5, of, KEEPS[keep], queries, keys)
    assert mask(bound, queries=11 - more, keys=11) == wanted


def test_round_of_coordinates_and_inputs() -> None:
    bound = rounded(
        "tokens y: 3, x: 4\ninput cluster: int[token]\nvisible q.x == k.x or q.y + 1 == k.y",
        "a = [q.y // 2, q.x // 3], b = cluster[k]",
        "count(visible for q in a, k in b) >= 4",
    )
    cluster = [0, 1, 2, 0, 0, 2, 2, 2, 1, 0, 2, 1]

    def rule(q: int, k: int) -> bool:
        return q % 4 == k % 4 or q // 4 + 1 == k // 4

    tokens = range(12)
    of = (lambda q: (q // 8, q % 4 // 3), lambda k: cluster[k])
    wanted = by_blocks(rule, of, lambda rows, columns, seen: len(seen) >= 4, tokens, tokens)
    assert mask(bound, queries=12, keys=12, inputs={"cluster": cluster}) == wanted


def test_round_inside_documents() -> None:
    bound = rounded(
        "align end\ninput doc: int[token]\ndocuments doc\nvisible k <= q",
        "a = q // 3, b = k // 3",
        "any(visible for q in a, k in b)",
    )
    seen = mask(bound, queries=9, keys=9, inputs={"doc": [7] * 4 + [2] * 5})

    def rule(q: int, k: int) -> bool:
        start = 0 if q < 4 else 4
        return (q < 4) == (k < 4) and (k - start) // 3 <= (q - start) // 3

    assert seen == expected(rule, 9, 9)
