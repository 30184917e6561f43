"""The IR printer: its text is valid in the language and has the meaning of the node."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings

import expression_trees as trees
from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import fold
from attnc.compiler.ir.print_ir import print_index, print_value
from attnc.compiler.ir.rewrite import aggregate
from attnc.compiler.lowering.lower import lower
from attnc.spec.errors import EvaluationError
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.source import SourceFile
from expression_trees import Fault, Kit, Tree
from tiers import examples

Q, K = fold.place("q"), fold.place("k")


def lowered(source: str, **values: object) -> ir.Pattern:
    program = load_program(SourceFile("drawn.attn", source), lambda name, asker: None)
    return lower(bind(program, values, None))


INNER = fold.var("i", 7)
EXPRESSIONS = {
    "q >= k": fold.less_equal(K, Q),
    "q > k": fold.less(K, Q),
    "k + 3 >= q": fold.less(fold.sub(Q, K), fold.const(4)),
    "3 >= q": fold.less(Q, fold.const(4)),
    "q > 0": fold.less(fold.const(0), Q),
    "(q - k) % 3 == 1": fold.equal(fold.mod(fold.sub(Q, K), fold.const(3)), fold.const(1)),
    "not q == -2": fold.negation(fold.equal(Q, fold.const(-2))),
    "2 ** bitlen(q)": fold.power(fold.const(2), fold.function("bitlen", Q)),
    "q // k // (k + 1)": fold.floordiv(fold.floordiv(Q, K), fold.add(K, fold.const(1))),
    "-(3 * q)": fold.times(Q, -3),
    "[1, 2][head]": fold.table_read((1, 2), fold.head_index("head")),
    "sum(i'7 for i'7 in 0 .. q)": aggregate("sum", INNER, fold.const(0), Q, fold.truth(True), INNER),
    "(q == 0 or k == 0) and q + k == 0": fold.conjunction(
        fold.disjunction(fold.zero(Q), fold.zero(K)), fold.zero(fold.add(Q, K))
    ),
    "any(i'7 == q for i'7 in 0 .. k if q >= 2)": aggregate(
        "any", INNER, fold.const(0), K, fold.less_equal(fold.const(2), Q), fold.equal(INNER, Q)
    ),
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions(text: str) -> None:
    """Sums come in the order of the nodes' digests, which is the same in every process."""
    printed = print_index(EXPRESSIONS[text])
    assert sorted(re.findall(r"\w+|\S", printed)) == sorted(re.findall(r"\w+|\S", text))


@settings(max_examples=examples(150))
@given(trees.truths(3, Kit(faults=False)))
def test_printed_text_compiles_to_the_relation(tree: Tree) -> None:
    """Printed text compiles to a relation of the same values."""
    node = trees.build(tree)
    text = re.sub(r"'(\d+)", r"_\1", print_index(node))
    again = lowered(f"pattern p\n    align start\n    visible {text}\n").attend.visible
    wanted = trees.mask(tree, 5, 6)
    for q in range(5):
        for k in range(6):
            if wanted[q][k] is not None:
                try:
                    assert exact_evaluation.mask(again, (q, q + 1), (k, k + 1)).item() == wanted[q][k]
                except EvaluationError as error:
                    assert "64 bits" in str(error)
                except Fault:
                    pass


def test_values() -> None:
    attend = lowered("pattern p\n    visible true\n").attend
    assert print_value(attend.score) == "scale * dot(q, k)"
    assert print_value(attend.value) == "v"


PATTERN = '''
pattern many(window: int = 8, slopes: real[head] = [1/2, 2], flag: bool = true)
    """Everything that a pattern declares."""
    align   end
    tokens  t: 4, s: 8
    input   mark: bool[batch, token]
    require queries <= 99
    visible 0 <= q - k < window * slopes and q.t >= k.t or mark[k] and flag
'''


WHOLE = """\
pattern many(window = 8, slopes = [1/2, 2], flag = true)
    input mark: bool[batch, token]
    tokens t: 4, s: 8
    align end
    require 99 >= queries
    attend many
        visible q >= k and k + 4 * [1, 4][head] > q and q.t >= k.t or mark[batch, k]
        score   scale * dot(q, k)
        weights softmax(score)
        value   v"""


def test_a_pattern() -> None:
    assert str(lowered(PATTERN)) == WHOLE


def test_documents() -> None:
    text = str(lowered("pattern d\n    input doc: int[token]\n    documents doc\n    visible k <= q\n"))
    assert "    input doc: int[token]\n    documents doc\n" in text


ROUNDED = """
pattern blocks(width: int = 3)
    align   end
    visible k <= q
    round
        per  a = q // 4, b = (k + 1) // 8
        keep any(visible for q in a, k in b) and a != width
"""


def test_a_round() -> None:
    visible = str(lowered(ROUNDED)).splitlines()[3].strip()
    queries = "max(0, keys - 4 * a'0 - queries) .. min(4, keys - 4 * a'0)"
    keys = "max(1 - 8 * b'0, 0) .. min(8, 1 + keys - 8 * b'0)"
    pairs = f"any(any(q'2 + 4 * a'0 + 1 >= 8 * b'0 + k'1 for k'1 in {keys}) for q'2 in {queries})"
    wanted = f"visible round({pairs} and not a'0 == 3 per a'0 = q // 4, b'0 = (k + 1) // 8)"
    assert sorted(re.findall(r"\w+|\S", visible)) == sorted(re.findall(r"\w+|\S", wanted))
