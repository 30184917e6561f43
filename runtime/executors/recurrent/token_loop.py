"""A recurrence computed token by token, straight from its steps: the reference, which supports every step equation.

Differentiable as often as torch can. The states of all tokens are kept for the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.ir import Recur, Value
from attnc.compiler.ir.value_nodes import state_at
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.executors.recurrent.call_tokens import CallTokens
from attnc.runtime.executors.recurrent.token_values import TokenValues, reordered

States = dict[str, Tensor]


def run(
    recur: Recur, tokens: CallTokens, states: States, fresh: NDArray[np.bool_] | None, *, guarded: bool = False
) -> tuple[Tensor, States]:
    """Compute (out (B, H, T, width), states after the last token) from states (B, H, …).

    `fresh`: a mask of the tokens before which the states start anew, (B or 1, H or 1, T). `guarded`: see `TokenValues`.

    Raises ArgumentError, EvaluationError, UnsupportedError.
    """
    plain = TokenValues(tokens, guarded=guarded)
    batch, heads, count = tokens.counts
    order = order_of(recur, plain)
    values = plain if order is None else TokenValues(tokens, order, guarded)
    current = {state.name: states[state.name][:, :, None] for state in recur.states}
    start = {state.name: torch.full_like(current[state.name], state.start) for state in recur.states}
    fresh = fresh_of(recur, values, fresh)
    outs: list[Tensor] = []
    for token in range(count):
        if fresh is not None:
            current = _restarted(current, start, fresh[:, :, min(token, fresh.shape[2] - 1)])
        out, current = _run_token(recur, values, current, token)
        outs.append(out.expand(batch, heads, 1, out.shape[-1]))
    last = {name: x[:, :, 0] for name, x in current.items()}
    if not outs:
        return tokens.v.new_zeros((batch, heads, 0, tokens.v.shape[-1])), last
    return reordered(torch.cat(outs, 2), back_order_of(order)), last


def order_of(recur: Recur, values: TokenValues) -> NDArray[np.int64] | None:
    """Return the positions in processing order, (H or 1, T); None: in order. Raises ArgumentError for ties."""
    if recur.order is None:
        return None
    keys = values.integers.of(recur.order)[0]
    keys = np.broadcast_to(keys, (keys.shape[0], values.tokens.counts[2]))
    order = np.argsort(keys, axis=1, kind="stable")
    sorted_keys = np.take_along_axis(keys, order, 1)
    if (sorted_keys[:, 1:] == sorted_keys[:, :-1]).any():
        raise ArgumentError(
            f"`{recur.name}`: `scan` gives two tokens the same place in the order: add a term that tells them apart"
        )
    return order


def fresh_of(recur: Recur, values: TokenValues, fresh: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Return the mask of tokens before which states start anew, by `fresh` or by `reset`, in processing order."""
    if recur.reset is not None:
        reset = values.integers.of(recur.reset) != 0
        fresh = reset if fresh is None else fresh | reset
    if fresh is None or values.order is None:
        return fresh
    fresh, order = np.broadcast_arrays(fresh, values.order[None])
    return np.take_along_axis(fresh, order, 2)


def back_order_of(order: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    """Return the index of each position in processing order."""
    return None if order is None else np.argsort(order, 1)


def _restarted(states: States, start: States, mask: NDArray[np.bool_]) -> States:
    """Return the states before a token: the start values where `mask` (B or 1, H or 1) is true."""
    if not mask.any():
        return states
    mask_tensor = torch.from_numpy(mask.copy())
    return {
        name: torch.where(mask_tensor.to(x.device).reshape(*mask_tensor.shape, *(1,) * (x.ndim - 2)), start[name], x)
        for name, x in states.items()
    }


def _run_token(recur: Recur, values: TokenValues, current: States, token: int) -> tuple[Tensor, States]:
    """Run the steps of a token; return its output and the states after it."""
    states: dict[Value, Tensor] = {}
    dims = {state.name: state.dims for state in recur.states}
    for state in recur.states:
        states[state_at(state.name, 0, state.dims)] = current[state.name]
    latest = dict(current)
    for step in recur.steps:
        state_node = state_at(step.state, step.version, dims[step.state])
        before = states[state_node]
        if step.repeat is None:
            after = values.of(step.value, states, token)
        else:
            variable, low, high = step.repeat
            for j in range(*(int(values.integers.of(end).flat[0]) for end in (low, high))):
                states[state_node] = values.of(step.value, states, token, ((variable, j),))
            after, states[state_node] = states[state_node], before
        after = after.expand(before.shape)
        states[state_at(step.state, step.version + 1, dims[step.state])] = after
        latest[step.state] = after
    return values.of(recur.read, states, token), latest


def beginning(recur: Recur, sizes: Mapping[str, int], batch: int, heads: int, like: Tensor) -> States:
    """Return the states before the first token, (B, H, …), in the (complex) dtype of `like` and on its device."""
    result = {}
    for state in recur.states:
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in state.dims]
        dtype = like.dtype.to_complex() if state.is_complex else like.dtype
        result[state.name] = like.new_full((batch, heads, *shape), state.start, dtype=dtype)
    return result
