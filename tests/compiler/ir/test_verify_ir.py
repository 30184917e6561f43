"""Folding makes well-formed nodes, and the verifier finds malformed ones."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

import expression_trees as trees
from attnc.compiler import ir
from attnc.compiler.ir import fold, value_nodes
from attnc.compiler.ir.rewrite import aggregate, walk
from attnc.compiler.ir.verify_ir import (
    IRInvalid,
    find_violations,
    free_variables,
    verified,
    verify,
    verify_passes,
    violations_of,
)
from expression_trees import Kit, Tree
from tiers import examples

Q, K = fold.place("q"), fold.place("k")


def pattern(visible: ir.Index, *tensors: ir.Tensor) -> ir.Pattern:
    attend = ir.Attend("out", visible, value_nodes.default_score(), ir.Softmax(), value_nodes.vector("v"))
    return ir.Pattern("p", {}, (), tensors, (), None, True, None, (), (attend,), {})


@settings(max_examples=examples(150))
@given(trees.truths(3, Kit()))
def test_folded_expressions_are_well_formed(tree: Tree) -> None:
    verify(pattern(trees.build(tree)))


DIFFERENCE = ir.intern(ir.Linear(((Q, 1), (K, -1)) if Q.digest < K.digest else ((K, -1), (Q, 1)), 0))
TRUE = fold.truth(True)
CAUSAL = fold.less_equal(K, Q)
TENSOR = ir.intern(ir.Tensor("doc", "int", ("batch", "token")))
VAR = fold.var("i", 1)

BROKEN: dict[str, ir.Index] = {
    "not a truth value": Q,
    "is not a number": ir.intern(ir.Compare("ge", CAUSAL)),
    "itself a sum or a constant": ir.intern(ir.Compare("ge", ir.intern(ir.Linear(((DIFFERENCE, 1),), 3)))),
    "coefficient is 0": ir.intern(ir.Compare("ge", ir.intern(ir.Linear(((Q, 0),), 1)))),
    "not sorted": ir.intern(ir.Compare("ge", ir.intern(ir.Linear(tuple(reversed(DIFFERENCE.terms)), 0)))),
    "it is not a sum": ir.intern(ir.Compare("ge", ir.intern(ir.Linear(((Q, 1),), 0)))),
    "common divisor": ir.intern(ir.Compare("ge", ir.intern(ir.Linear(((Q, 2),), 0)))),
    "first coefficient": ir.intern(ir.Compare("eq", ir.intern(ir.Linear(((Q, -1),), 3)))),
    "value is a constant": ir.intern(ir.Compare("ge", fold.const(3))),
    "should have been folded into": ir.intern(ir.Bool("and", (CAUSAL, TRUE))),
    "fewer than two": ir.intern(ir.Bool("or", (CAUSAL,))),
    "without `not`": ir.intern(ir.Not(CAUSAL)),
    "condition should have been": ir.intern(ir.ExactSelect(TRUE, CAUSAL, fold.zero(Q))),
    "sides are equal": ir.intern(ir.ExactSelect(fold.zero(Q), CAUSAL, CAUSAL)),
    "one side is a number": ir.intern(ir.ExactSelect(fold.zero(Q), CAUSAL, Q)),
    "is unbound": fold.zero(VAR),
    "1 indices for 2": fold.zero(fold.lookup(TENSOR, (Q,))),
    "is not declared": fold.zero(fold.lookup(ir.intern(ir.Tensor("other", "int", ())), ())),
    "is not an operation": fold.zero(ir.intern(ir.Arith("sqrt", (Q,)))),
    "takes 1 operand": fold.zero(ir.intern(ir.Arith("abs", (Q, K)))),
    "product with a constant": fold.zero(
        ir.intern(ir.Arith("mul", tuple(sorted((Q, fold.const(2)), key=lambda n: n.digest))))
    ),
    "`min` of fewer": fold.zero(ir.intern(ir.Arith("min", (Q,)))),
    "is not allowed here": ir.intern(ir.UnitCondition((VAR,), (K,), (), (), fold.zero(VAR))),
    "variables differ in number": ir.intern(ir.UnitCondition((VAR,), (), (), (K,), fold.zero(VAR))),
    "empty table": fold.zero(ir.intern(ir.TableRead((), Q))),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_expressions_are_found(what: str) -> None:
    with pytest.raises(IRInvalid, match=what):
        verify(pattern(BROKEN[what], TENSOR))


def test_a_node_that_is_not_interned_is_found() -> None:
    lone = ir.Compare("ge", DIFFERENCE)
    object.__setattr__(lone, "digest", CAUSAL.digest)
    assert "not interned" in " ".join(violations_of(lone))


def test_broken_patterns_are_found() -> None:
    whole = pattern(CAUSAL)
    verify(whole)
    for wrong, what in (
        (replace(whole, nodes=(whole.attend, replace(whole.attend, name="near"))), "but no `combine`"),
        (replace(whole, nodes=whole.nodes * 2), "two nodes"),
        (replace(whole, tensors=(TENSOR, TENSOR)), "two tensors"),
        (replace(whole, documents=TENSOR), "not declared"),
        (replace(whole, segments=(ir.Segment(None, (("t", CAUSAL),), Q, Q),)), "not a number"),
    ):
        assert what in " ".join(find_violations(wrong))


def test_free_variables() -> None:
    inner = aggregate("any", VAR, Q, K, TRUE, fold.zero(fold.sub(VAR, fold.var("j", 2))))
    assert free_variables(inner) == {fold.var("j", 2)}
    assert VAR in set(walk(inner))


@verified
def lose_declaration(of: ir.Pattern) -> ir.Pattern:
    return replace(of, tensors=())


@verified
def lose_normal_form(relation: ir.Index) -> ir.Index:
    return ir.intern(ir.Bool("and", (relation,)))


def test_a_pass_that_breaks_a_pattern_is_found() -> None:
    with pytest.raises(IRInvalid, match="`doc` is not declared"):
        lose_declaration(pattern(fold.zero(fold.lookup(TENSOR, (fold.const(0), K))), TENSOR))


def test_a_pass_that_breaks_a_relation_is_found() -> None:
    with pytest.raises(IRInvalid, match="fewer than two"):
        lose_normal_form(CAUSAL)


def test_passes_are_not_verified_unless_asked() -> None:
    verify_passes(False)
    try:
        assert lose_normal_form(CAUSAL) is not CAUSAL
    finally:
        verify_passes()


def test_the_environment_switches_verification_on() -> None:
    command = "import attnc.runtime; from attnc.compiler.ir import verify_ir; print(verify_ir._is_on)"
    for value, expected in (("1", "True"), ("0", "False")):
        environment = {**os.environ, "ATTNC_VERIFY_IR": value}
        done = subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, check=True, text=True
        )
        assert done.stdout.strip() == expected


def selecting(**changes: Any) -> ir.Pattern:
    """Return a pattern whose only selection keeps the first key of each row, with some fields changed."""
    places = (fold.head_index("batch"), fold.head_index("head"), Q, K)
    kept = ir.intern(ir.Tensor("kept", "bool", ("batch", "head", "query", "key")))
    item = ir.Selection(
        "kept", kept, None, Q, None, None, value_nodes.default_score(), CAUSAL, value_nodes.number(1.0), fold.zero(K)
    )
    return replace(pattern(fold.lookup(kept, places)), selections=(replace(item, **changes),))


def test_a_selection_declares_its_result() -> None:
    verify(selecting())


@pytest.mark.parametrize(
    ("changes", "violation"),
    [
        ({"candidates": Q}, "`candidates` of the selection `kept`: `q` is not a truth value"),
        ({"always": fold.zero(fold.lookup(TENSOR, (fold.const(0), K)))}, "the tensor `doc` is not declared"),
        ({"row_of": CAUSAL}, "is not a number"),
    ],
)
def test_selections_are_verified(changes: dict[str, Any], violation: str) -> None:
    assert any(violation in phrase for phrase in find_violations(selecting(**changes)))
