"""The single attentions of a pattern, each as a pattern of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from attnc.compiler.ir import (
    BOUNDARIES,
    Attend,
    Bool,
    Element,
    ExactSelect,
    Index,
    Lookup,
    Not,
    Pattern,
    Recur,
    Selection,
    Softmax,
    Tensor,
    Value,
    fold,
    intern,
)
from attnc.compiler.ir.rewrite import substitute_attend
from attnc.compiler.ir.value_nodes import (
    default_score,
    output,
    output_lse,
    output_of_state,
    values_of,
    vector,
)
from attnc.compiler.ir.verify_ir import verified


@verified
def alone(pattern: Pattern, node: Attend, member: int | None = None) -> Pattern:
    """Return an attention as a pattern that reads earlier results as inputs; `member`: the number within a family."""
    attention = node if member is None or node.family is None else _member(node, member)
    states = tuple(dict.fromkeys(map(output_of_state, pattern.stateful)))
    earlier = [other for other in pattern.nodes if other.name != node.name]
    results = states + tuple(tensor for other in earlier for tensor in (output(other), output_lse(other)))
    earlier_inputs = tuple(tensor for tensor in results if tensor in _read(attention))
    selections = tuple(
        item for item in pattern.selections if item.given in content_masks([attention.visible, *values_of(attention)])
    )
    tensors = pattern.tensors + tuple(item.given for item in selections) + earlier_inputs
    return replace(
        pattern, tensors=tensors, nodes=(attention,), combine=None, lse=None, stateful=(), selections=selections
    )


def content_masks(roots: Iterable[Value | Index]) -> set[Tensor]:
    """Return the inputs that exact expressions read, including the truth tensors of selections."""
    return {below.tensor for root in roots for below in root.below if isinstance(below, Lookup)}


def content_masks_of_selection(item: Selection) -> set[Tensor]:
    """Return the truth tensors that a selection reads."""
    return content_masks([item.score, item.candidates, item.keep, item.always])


@verified
def open_inputs(pattern: Pattern) -> Pattern:
    """Return the pattern with every pair visible that may be, whatever selections select and inputs hold."""
    opened = open_choices(pattern)
    nodes = tuple(replace(node, visible=might_hold(node.visible, set(opened.tensors))) for node in opened.nodes)
    return replace(opened, nodes=nodes)


@verified
def open_choices(pattern: Pattern) -> Pattern:
    """Return the pattern with every pair visible that may be, whatever selections select or the order of tokens is."""
    content_masks = {item.given for item in pattern.selections}
    content_masks |= {tensor for tensor in pattern.tensors if tensor.made is not None}
    nodes = tuple(replace(node, visible=might_hold(node.visible, content_masks)) for node in pattern.nodes)
    tensors = tuple(tensor for tensor in pattern.tensors if tensor not in content_masks)
    return replace(pattern, nodes=nodes, tensors=tensors, selections=())


def might_hold(condition: Index, open_: set[Tensor], hopes: bool = True) -> Index:
    """Return a condition that holds wherever `condition` may hold; with `hopes` false, only where it must."""
    if not content_masks([condition]) & open_:
        return condition
    match condition:
        case Not(operand=operand):
            return fold.negation(might_hold(operand, open_, not hopes))
        case Bool(op=op, operands=operands):
            parts = [might_hold(operand, open_, hopes) for operand in operands]
            return fold.conjunction(*parts) if op == "and" else fold.disjunction(*parts)
        case ExactSelect(condition=test, then=then, otherwise=otherwise) if not content_masks([test]) & open_:
            return fold.choice(test, might_hold(then, open_, hopes), might_hold(otherwise, open_, hopes))
        case _:
            return fold.truth(hopes)


@verified
def choosing(pattern: Pattern, item: Selection) -> Pattern:
    """Return a pattern of one attention whose rows are those of `pattern` and whose inputs are those of a selection."""
    masks_read = tuple(other.given for other in pattern.selections if other.given in content_masks_of_selection(item))
    return replace(rows_of(replace(pattern, nodes=())), tensors=pattern.tensors + masks_read, requirements=())


@verified
def stateful_alone(pattern: Pattern, recur: Recur) -> Pattern:
    """Return a branch with a state as a pattern of its own."""
    return replace(pattern, nodes=(), combine=None, lse=None, stateful=(), recur=recur)


@verified
def packed(pattern: Pattern) -> Pattern:
    """Return the pattern over packed sequences, whose boundaries are in the tensor `cu_seqlens`."""
    boundaries = intern(Tensor("cu_seqlens", "int", (BOUNDARIES,)))
    return replace(pattern, tensors=(*pattern.tensors, boundaries), documents=boundaries, needs_align=True)


@verified
def rows_of(pattern: Pattern) -> Pattern:
    """Return a pattern of one attention with the rows of `pattern`."""
    if pattern.nodes:
        return alone(pattern, pattern.nodes[0])
    node = Attend(pattern.name, fold.truth(True), default_score(), Softmax(), vector("v"))
    return replace(pattern, nodes=(node,), combine=None, lse=None, recur=None, stateful=(), selections=())


def _read(node: Attend) -> set[Tensor]:
    return {below.tensor for root in values_of(node) for below in root.below if isinstance(below, Element)}


def _member(node: Attend, member: int) -> Attend:
    """Return one branch of a family."""
    assert node.family is not None
    return replace(substitute_attend(node, {node.family[0]: fold.const(member)}), family=None)


def inputs_of_attentions(pattern: Pattern) -> frozenset[str]:
    """The names of inputs that attentions or `combine` read; branches with a state alone read the other inputs."""
    roots: list[Value | Index | None] = [pattern.combine, pattern.lse, *(root for root, _ in pattern.requirements)]
    for node in pattern.nodes:
        loops = [end for loop in (node.stack, node.family) if loop is not None for end in loop[1:]]
        roots += [*values_of(node), node.visible, node.keys, node.key_of, *loops]
    tensors = {tensor for root in roots if root is not None for tensor in _tensors(root)}
    documents = {pattern.documents.name} if pattern.documents is not None else set[str]()
    return frozenset({tensor.name for tensor in tensors} | documents)


def _tensors(root: Value | Index) -> set[Tensor]:
    return {below.tensor for below in root.below if isinstance(below, Element | Lookup)}
