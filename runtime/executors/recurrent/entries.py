"""States with an elementwise update: evaluate their decays, writes and reads in stretches of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import Index, Value
from attnc.compiler.ir.value_nodes import rank, state_at
from attnc.compiler.recurrences.derived import ElementwiseScan
from attnc.runtime.executors.recurrent.stretch_scan import StretchStates, scan_stretches
from attnc.runtime.executors.recurrent.token_values import StretchValues, TokenValues
from attnc.runtime.values.scaled import plain

Leaf = Value | Index
"""A value or condition that is computed for all tokens before the first stretch."""


def scan(
    stage: ElementwiseScan, values: TokenValues, state: Tensor, fresh: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Return each read of every token, in processing order, and the state after the last token.

    `fresh`: bool (B, H or 1, T), true where the state is set to 0 before the token.
    """
    leaves = _leaves([stage.decay, stage.write, *(node for _, node in stage.reads)])
    tensors = [
        values.condition(cast("Index", leaf)) if is_condition else values.whole(cast("Value", leaf))
        for leaf, is_condition in leaves.items()
    ]
    first, last = (state_at(stage.state.name, version, stage.state.dims) for version in (0, stage.versions))
    dims = stage.state.dims

    def stretch_values(leaf_tensors: Sequence[Tensor], states: dict[Leaf, Tensor]) -> StretchValues:
        tensors_by_leaf: dict[Leaf, Tensor] = dict(zip(leaves, leaf_tensors, strict=True))
        tensors_by_leaf.update(states)
        return StretchValues(values, tensors_by_leaf)

    def make(*leaf_tensors: Tensor) -> tuple[Tensor, Tensor]:
        evaluated = stretch_values(leaf_tensors, {})
        decay, write = (plain(evaluated.aligned(node, dims)) for node in (stage.decay, stage.write))
        return decay, write

    reads_before = any(first in cast("tuple[Value, ...]", node.below) for _, node in stage.reads)

    def read(states: StretchStates, *leaf_tensors: Tensor) -> list[Tensor]:
        states_by_leaf: dict[Leaf, Tensor] = {last: states.after}
        if reads_before:
            states_by_leaf[first] = states.before
        evaluated = stretch_values(leaf_tensors, states_by_leaf)
        return [evaluated.of(node) for _, node in stage.reads]

    if fresh is not None and fresh.shape[1] == 1:
        fresh = fresh[:, 0]
    tokens = values.tokens.counts[2]
    reads_after_only = [node for _, node in stage.reads] == [last]
    spare = None
    if _owns_memory(stage.write) and stage.write not in _leaves([node for _, node in stage.reads]):
        spare = values.taken_back(stage.write)
    outs, final = scan_stretches(
        make, None if reads_after_only else read, tensors, tokens=tokens, state=state, resets=fresh, spare=spare
    )
    return [out.expand(*values.tokens.counts, *out.shape[3:]) for out in outs], final


def _owns_memory(node: Value) -> bool:
    """Check whether a node's tensor has its own memory and is not a view of another tensor."""
    return isinstance(node, ir.Contract) or (isinstance(node, ir.Apply) and node.op in ("add", "sub", "mul", "div"))


def _leaves(roots: Sequence[Value]) -> dict[Leaf, bool]:
    """Return the leaves of a stretch's values; True for conditions, False for values."""
    result: dict[Leaf, bool] = {}
    stack = list(reversed(roots))
    while stack:
        node = stack.pop()
        if isinstance(node, ir.StateAt) or node in result:
            continue
        depends_on_state = any(isinstance(child, ir.StateAt) for child in node.below)
        if not depends_on_state and (
            rank(node) <= 1 or not isinstance(node, ir.Apply | ir.Outer | ir.FloatSelect | ir.Diagonal)
        ):
            result[node] = False
            continue
        if isinstance(node, ir.FloatSelect):
            result[node.condition] = True
            stack += [node.then, node.otherwise]
        else:
            stack += [getattr(node, name) for name in ("left", "right", "vector", "matrix") if hasattr(node, name)]
            stack += list(getattr(node, "operands", ()))
    return result
