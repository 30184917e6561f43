"""A recurrence token by token, straight from its lines: the reference, and what any step equation can run as.

Differentiable as often as torch can. The states of all tokens are kept for the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.ir import Recur, Value
from attnc.compiler.value_nodes import state_at
from attnc.runtime.call_errors import ArgumentError
from attnc.runtime.recurrent.call_tokens import CallTokens
from attnc.runtime.recurrent.token_values import TokenValues

States = dict[str, Tensor]


def run(
    recur: Recur, tokens: CallTokens, states: States, fresh: NDArray[np.bool_] | None, *, guarded: bool = False
) -> tuple[Tensor, States]:
    """(out (B, H, T, width), states after the last token), from states (B, H, …).

    `fresh`: the tokens before which the states begin anew, (B or 1, H or 1, T). `guarded`: see `TokenValues`.

    Raises ArgumentError, EvaluationError, UnsupportedError.
    """
    plain = TokenValues(tokens, guarded=guarded)
    batch, heads, count = tokens.counts
    order = order_of(recur, plain)
    values = plain if order is None else TokenValues(tokens, order, guarded)
    now = {state.name: states[state.name][:, :, None] for state in recur.states}
    start = {state.name: torch.full_like(now[state.name], state.start) for state in recur.states}
    fresh = fresh_of(recur, values, fresh)
    outs: list[Tensor] = []
    for token in range(count):
        if fresh is not None:
            now = _begun(now, start, fresh[:, :, min(token, fresh.shape[2] - 1)])
        out, now = _lines(recur, values, now, token)
        outs.append(out.expand(batch, heads, 1, out.shape[-1]))
    last = {name: x[:, :, 0] for name, x in now.items()}
    if not outs:
        return tokens.v.new_zeros((batch, heads, 0, tokens.v.shape[-1])), last
    return put_back(torch.cat(outs, 2), order), last


def order_of(recur: Recur, values: TokenValues) -> NDArray[np.int64] | None:
    """The places of the tokens as they come, (H or 1, T); None for their own order. Raises ArgumentError for ties."""
    if recur.order is None:
        return None
    keys = values.integers.of(recur.order)[0]
    keys = np.broadcast_to(keys, (keys.shape[0], values.tokens.counts[2]))
    order = np.argsort(keys, axis=1, kind="stable")
    sorted_keys = np.take_along_axis(keys, order, 1)
    if (sorted_keys[:, 1:] == sorted_keys[:, :-1]).any():
        raise ArgumentError(f"`{recur.name}`: `scan` gives two tokens the same place: add what tells them apart")
    return order


def fresh_of(recur: Recur, values: TokenValues, fresh: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """The tokens before which the states begin anew, `fresh` and those that reset them, as tokens are taken."""
    if recur.reset is not None:
        given = values.integers.of(recur.reset) != 0
        fresh = given if fresh is None else fresh | given
    if fresh is None or values.order is None:
        return fresh
    fresh, places = np.broadcast_arrays(fresh, values.order[None])
    return np.take_along_axis(fresh, places, 2)


def put_back(x: Tensor, order: NDArray[np.int64] | None) -> Tensor:
    """Return a result in processing order, (B, H, T, width), by position."""
    if order is None:
        return x
    back = torch.from_numpy(np.argsort(order, 1)).to(x.device)
    return torch.take_along_dim(x, back[None, :, :, None], 2)


def _begun(now: States, start: States, here: NDArray[np.bool_]) -> States:
    """The states, as they are at the start where this token (B or 1, H or 1) begins anew."""
    if not here.any():
        return now
    mask = torch.from_numpy(here.copy())
    return {
        name: torch.where(mask.to(x.device).reshape(*mask.shape, *(1,) * (x.ndim - 2)), start[name], x)
        for name, x in now.items()
    }


def _lines(recur: Recur, values: TokenValues, now: States, token: int) -> tuple[Tensor, States]:
    """Return the output of a token, and the states after it."""
    known: dict[Value, Tensor] = {}
    dims = {state.name: state.dims for state in recur.states}
    for state in recur.states:
        known[state_at(state.name, 0, state.dims)] = now[state.name]
    latest = dict(now)
    for line in recur.steps:
        own = state_at(line.state, line.version, dims[line.state])
        before = known[own]
        if line.repeat is None:
            after = values.of(line.value, known, token)
        else:
            variable, low, high = line.repeat
            for j in range(*(int(values.integers.of(end).flat[0]) for end in (low, high))):
                known[own] = values.of(line.value, known, token, ((variable, j),))
            after, known[own] = known[own], before
        after = after.expand(before.shape)
        known[state_at(line.state, line.version + 1, dims[line.state])] = after
        latest[line.state] = after
    return values.of(recur.read, known, token), latest


def beginning(recur: Recur, sizes: Mapping[str, int], batch: int, heads: int, like: Tensor) -> States:
    """The states before the first token, (B, H, …), in the dtype of a tensor, or its complex one, and on its device."""
    result = {}
    for state in recur.states:
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in state.dims]
        dtype = like.dtype.to_complex() if state.is_complex else like.dtype
        result[state.name] = like.new_full((batch, heads, *shape), state.start, dtype=dtype)
    return result


__all__ = ["States", "beginning", "fresh_of", "order_of", "put_back", "run"]
