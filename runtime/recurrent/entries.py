"""States that are taken entry by entry: what their steps are made of, cut into stretches of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import Index, Value
from attnc.compiler.recurrences.derived import ElementwiseScan
from attnc.compiler.value_nodes import axes, rank, state_at
from attnc.runtime.recurrent.scan import scan_stretches
from attnc.runtime.recurrent.stretch_scan import StretchStates
from attnc.runtime.recurrent.token_values import StretchValues, TokenValues, aligned

Leaf = Value | Index
"""A value or condition that is known of all tokens before a stretch."""


def scan(
    stage: ElementwiseScan, values: TokenValues, state: Tensor, fresh: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Return each read of every token, in processing order, and the state after the last token.

    `fresh`: bool (B, H or 1, T).
    """
    leaves = _leaves([stage.decay, stage.write, *(node for _, node in stage.reads)])
    tensors = [
        values.condition(cast("Index", leaf)) if is_condition else values.whole(cast("Value", leaf))
        for leaf, is_condition in leaves.items()
    ]
    first, last = (state_at(stage.state.name, version, stage.state.dims) for version in (0, stage.versions))
    dims = stage.state.dims

    def of_stretch(given: Sequence[Tensor], states: dict[Leaf, Tensor]) -> StretchValues:
        known: dict[Leaf, Tensor] = dict(zip(leaves, given, strict=True))
        known.update(states)
        return StretchValues(values, known)

    def make(*given: Tensor) -> tuple[Tensor, Tensor]:
        known = of_stretch(given, {})
        decay, write = (aligned(known.of(node), axes(node), dims) for node in (stage.decay, stage.write))
        return decay, write

    before_too = any(first in cast("tuple[Value, ...]", node.below) for _, node in stage.reads)

    def read(states: StretchStates, *given: Tensor) -> list[Tensor]:
        known = of_stretch(given, {last: states.after, **({first: states.before} if before_too else {})})
        return [known.of(node) for _, node in stage.reads]

    if fresh is not None and fresh.shape[1] == 1:
        fresh = fresh[:, 0]
    tokens = values.tokens.counts[2]
    whole = [node for _, node in stage.reads] == [last]
    spare = None
    if _is_made(stage.write) and stage.write not in _leaves([node for _, node in stage.reads]):
        spare = values.taken_back(stage.write)
    outs, final = scan_stretches(
        make, None if whole else read, tensors, tokens=tokens, state=state, resets=fresh, spare=spare
    )
    return [out.expand(*values.tokens.counts, *out.shape[3:]) for out in outs], final


def _is_made(node: Value) -> bool:
    """Whether its tensor is its own, and no view of another."""
    return isinstance(node, ir.Contract) or (isinstance(node, ir.Apply) and node.op in ("add", "sub", "mul", "div"))


def _leaves(roots: Sequence[Value]) -> dict[Leaf, bool]:
    """Return the leaves of a stretch's values, conditions among them; True where a leaf can be a vector a token."""
    result: dict[Leaf, bool] = {}
    stack = list(reversed(roots))
    while stack:
        node = stack.pop()
        if isinstance(node, ir.StateAt) or node in result:
            continue
        reads = any(isinstance(below, ir.StateAt) for below in node.below)
        if not reads and (rank(node) <= 1 or not isinstance(node, ir.Apply | ir.Outer | ir.FloatSelect | ir.Diagonal)):
            result[node] = False
            continue
        if isinstance(node, ir.FloatSelect):
            result[node.condition] = True
            stack += [node.then, node.otherwise]
        else:
            stack += [getattr(node, name) for name in ("left", "right", "vector", "matrix") if hasattr(node, name)]
            stack += list(getattr(node, "operands", ()))
    return result


__all__ = ["scan"]
