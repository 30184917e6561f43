"""A compiled pattern as a layer of a receptive field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.ir import Extent, HeadIndex, Index, Lookup, Recur, fold
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.ir.value_nodes import output, output_lse, output_of_state, values_of
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.lowering.lower import lower
from attnc.compiler.lowering.specialise import Window, specialise
from attnc.compiler.passes.attentions import open_choices, rows_of
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.receptive.fields import Layer
from attnc.compiler.receptive.held import Held
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.call.call_shapes import TensorSizes, shape_of_call
from attnc.runtime.patterns.pattern_description import PatternDescription
from attnc.runtime.planning.branch_relations import BranchRelations, places
from attnc.runtime.planning.call_relations import relations_of

Int64 = NDArray[np.int64]

_TOKEN = fold.place("q")


def layer_of(attention: PatternDescription, n: int, heads: int, inputs: Mapping[str, Any]) -> Layer:
    """Return a pattern's layer: the pairs visible among n tokens in any head and branch, for the first batch entry.

    A query sees a unit of keys as a whole: pooled keys depend on each of their tokens. Where content selects, every key
    that may be selected is visible. A state depends on all tokens before it, since a reset or the border of a document.

    Raises UnsupportedError for keys that are not tokens and for branches that read outputs of others, and the errors of
    a call of these sizes.
    """
    pattern = open_choices(lower(attention.bound))
    _refuse(pattern)
    batch = next((x.shape[0] for t, x in _passed_inputs(pattern, inputs) if t.dims[:1] == ("batch",)), 1)
    sizes = TensorSizes(n, n, batch, heads, heads, 64, 64, "float32")
    relations_of_nodes = (
        BranchRelations(replace(pattern, stateful=())).relations(sizes, inputs) if pattern.nodes else []
    )
    states = [state for recur in states_of(pattern) for state in _held(pattern, recur, sizes, inputs)]
    return Layer.of(
        n, [(r, None if node.keys is None else places(node, r, n)) for node, r in relations_of_nodes], states
    )


def states_of(pattern: ir.Pattern) -> tuple[Recur, ...]:
    """Return the recurrence of a pattern, or its branches with a state."""
    return pattern.stateful if pattern.recur is None else (pattern.recur,)


def inputs_of_layer(attention: PatternDescription) -> frozenset[str]:
    """Return the inputs that a layer depends on: those of the relation, of the order of a scan, and of resets."""
    pattern = attention.pattern
    read = {node for recur in states_of(pattern) for root in _clauses(recur) for node in walk(root)}
    names = {node.tensor.name for node in read if isinstance(node, Lookup)}
    sizes = {node.name for node in read if isinstance(node, Extent)}
    state_inputs = {t.name for t in pattern.tensors if t.name in names or sizes & set(map(str, t.dims))}
    if pattern.documents is not None:
        state_inputs.add(pattern.documents.name)
    return frozenset(state_inputs) if attention.is_recurrence else attention.relation_inputs | state_inputs


def _clauses(recur: Recur) -> list[Index]:
    return [root for root in (recur.order, recur.reset) if root is not None]


def _passed_inputs(pattern: ir.Pattern, inputs: Mapping[str, Any]) -> list[tuple[ir.Tensor, Any]]:
    """Return the tensors of the pattern whose inputs are passed, with the inputs."""
    return [(tensor, inputs[tensor.name]) for tensor in pattern.tensors if tensor.name in inputs]


# --- states ----------------------------------------------------------------------------------------------------------


def _held(pattern: ir.Pattern, recur: Recur, sizes: TensorSizes, inputs: Mapping[str, Any]) -> list[Held]:
    """Return the tokens that the state of a branch holds, by head. Raises ArgumentError where a scan has ties."""
    clauses = _clauses(recur)
    # A node that reads what the state's order and resets read, so that a call takes the same inputs.
    read = fold.disjunction(*(root if ir.is_truth(root) else fold.equal(root, fold.const(0)) for root in clauses))
    order_pattern = rows_of(replace(pattern, nodes=(), recur=None, stateful=()))
    order_pattern = checked(replace(order_pattern, nodes=(replace(order_pattern.attend, visible=read),)))
    relations = relations_of(
        order_pattern, shape_of_call(order_pattern, sizes, {t.name: x for t, x in _passed_inputs(pattern, inputs)})
    )
    by_head = any(isinstance(node, HeadIndex) and node.name != "batch" for root in clauses for node in walk(root))
    by_head |= any(
        isinstance(node, Lookup) and {"head", "kv_head"} & set(node.tensor.dims)
        for root in clauses
        for node in walk(root)
    )
    return [_held_by(recur, relations, head) for head in range(sizes.heads if by_head else 1)]


def _held_by(recur: Recur, relations: Relations, head: int) -> Held:
    n = relations.shape.n_q
    order, fresh = np.arange(n, dtype=np.int64), np.zeros(n, dtype=np.bool_)
    for window in relations.windows(0):
        rows = slice(window.row, window.row + window.n_q)
        if not window.n_q:
            continue
        if recur.order is not None:
            keys = _by_token(recur.order, relations, window, head)
            local = np.argsort(keys, kind="stable")
            if (np.diff(keys[local]) == 0).any():
                raise ArgumentError(f"`{recur.name}`: `scan` gives two tokens the same place: add a tie-breaker")
            order[rows] = window.row + local
        if recur.reset is not None:
            fresh[rows] = _by_token(recur.reset, relations, window, head) != 0
        fresh[order[window.row]] = True
    return Held.of(order, fresh)


def _by_token(root: Index, relations: Relations, window: Window, head: int) -> Int64:
    """Return the value of an expression for each token of a window."""
    specialised = specialise(root, relations.sizes, relations.slices, window, batch=0, head=head, group=1)
    places, one = np.arange(window.n_q, dtype=np.int64), np.zeros(1, dtype=np.int64)
    wide = not fits_word(specialised, (0, window.n_q), (0, 1))
    active = np.ones((window.n_q, 1), dtype=np.bool_)
    return exact_evaluation.integers_at(specialised, places, one, active, relations.pattern.origins, wide=wide)[:, 0]


# --- what is not followed --------------------------------------------------------------------------------------------


def _refuse(pattern: ir.Pattern) -> None:
    outputs: set[str] = set()
    for recur in states_of(pattern):
        outputs.add(output_of_state(recur).name)
        if any(map(_is_other_token, (part for root in _lines(recur) for part in root.below))):
            raise UnsupportedError(
                f"`{pattern.name}` has a state, `{recur.name}`, that reads other tokens: their dependencies cannot "
                f"be followed"
            )
    for node in pattern.nodes:
        if node.keys is not None and node.key_of is None:
            raise UnsupportedError(
                f"`{pattern.name}` has keys that are not tokens: dependencies through them cannot be followed"
            )
        read = {below.tensor.name for root in values_of(node) for below in root.below if isinstance(below, ir.Element)}
        if read & outputs:
            raise UnsupportedError(
                f"`{pattern.name}` has an attention that reads the output of another: dependencies through both "
                f"cannot be followed"
            )
        outputs |= {output(node).name, output_lse(node).name}


def _lines(recur: Recur) -> list[ir.Value]:
    return [recur.read, *(step.value for step in recur.steps)]


def _is_other_token(node: object) -> bool:
    """Check whether a value reads the vector of another token."""
    return isinstance(node, ir.Vec) and node.at is not _TOKEN
