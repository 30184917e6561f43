"""A derived recurrence: its passes chunk by chunk, and what tokens get of their reads. Differentiable once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import Recur, Value
from attnc.compiler.recurrences.derive import is_constant
from attnc.compiler.recurrences.derived import (
    Coupled,
    ElementwiseScan,
    Micro,
    Pass,
    RecurrenceForm,
    RunningReduction,
    SolvedRead,
    Stage,
)
from attnc.compiler.simulation.recurrent.cpu_chunks import chunk_on_cpu
from attnc.compiler.simulation.recurrent.recurrence_call import form_of
from attnc.compiler.value_nodes import axes, rank
from attnc.runtime.recurrent import coupled_tokens
from attnc.runtime.recurrent.call_tokens import CallTokens
from attnc.runtime.recurrent.entries import scan
from attnc.runtime.recurrent.linear import Delta, RankOne, linear_recurrence
from attnc.runtime.recurrent.monoids import running_log_sum, running_max
from attnc.runtime.recurrent.solves import solve_by_reads
from attnc.runtime.recurrent.token_integers import Bound
from attnc.runtime.recurrent.token_loop import States, fresh_of, order_of
from attnc.runtime.recurrent.token_values import TokenValues, aligned

Linear = Callable[..., tuple[Tensor, Tensor]]
"""`linear_recurrence`, or what gives the same."""


def run(
    derived: RecurrenceForm,
    recur: Recur,
    tokens: CallTokens,
    states: States,
    fresh: NDArray[np.bool_] | None,
    linear: Linear = linear_recurrence,
) -> tuple[Tensor, States]:
    """Return the results of `token_loop.run` for a recurrence with passes; `linear` computes those of linear states."""
    known = dict(tokens.inputs)
    tokens = replace(tokens, inputs=known)
    order = order_of(recur, TokenValues(tokens))
    back = None if order is None else np.argsort(order, 1)
    values = TokenValues(tokens, order)
    passing = _Passing(tokens, values, back, linear)
    passing.fresh = fresh_of(recur, values, fresh)
    last: States = {}
    for stages in _together(derived.stages):
        stage, *_ = stages
        if isinstance(stage, Coupled):
            last |= passing.coupled(stage, states, known)
        elif isinstance(stage, RunningReduction):
            last[stage.state.name] = passing.running(stage, states[stage.state.name], known)
        elif isinstance(stage, ElementwiseScan):
            last[stage.state.name] = passing.scanned(stage, states[stage.state.name], known)
        else:
            last |= passing.passed([one for one in stages if isinstance(one, Pass)], states, known)
    batch, heads, count = tokens.counts
    out = TokenValues(tokens).by_place(derived.result)
    return out.expand(batch, heads, count, out.shape[-1]), {state.name: last[state.name] for state in recur.states}


def _together(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Passes that follow one another and differ in what they write alone, as one."""
    result: list[list[Stage]] = []
    for stage in stages:
        before = result[-1][0] if result else None
        if isinstance(stage, Pass) and isinstance(before, Pass) and _are_one(before, stage):
            result[-1].append(stage)
        else:
            result.append([stage])
    return result


def _are_one(a: Pass, b: Pass) -> bool:
    return (
        not (a.solves or b.solves or a.flat or b.flat)
        and a.state.dims[0] == b.state.dims[0]
        and [(one.query, one.before) for one in a.reads] == [(one.query, one.before) for one in b.reads]
        and list(map(_without_value, a.steps)) == list(map(_without_value, b.steps))
        and not any(step.decay is not None and step.decay.side == "columns" for step in a.steps)
        and not any(step.write is None for step in (*a.steps, *b.steps))
    )


def _without_value(step: Micro) -> tuple[object, ...]:
    return step.decay, step.correction, step.repeat, step.write and step.write[0]


class GrowingError(Exception):
    """A factor of the text that was taken for a decay is none: it is above 1, or below 0."""


class _Passing:
    """The passes of one call. `fresh`: see `token_loop.run`, in the order in which tokens are taken."""

    def __init__(self, tokens: CallTokens, values: TokenValues, back: NDArray[np.int64] | None, linear: Linear) -> None:
        self._linear = linear
        self._tokens = tokens
        self._values = values
        self._back = back
        self.fresh: NDArray[np.bool_] | None = None

    def running(self, stage: RunningReduction, state: Tensor, known: dict[str, Tensor]) -> Tensor:
        """The state before and after each token, by name; what it is in the end."""
        # In fp64: decays are exponentials of differences of these, which may be small beside them.
        added, start = self._values.widened(stage.added), state.double()
        added = aligned(added, axes(stage.added), stage.state.dims)
        added = added.expand(*self._tokens.counts, *state.shape[2:])
        fresh = self._fresh_tensor()
        run = running_max if stage.op == "max" else running_log_sum
        after = run(added, start, fresh if fresh is None or fresh.shape[1] > 1 else fresh[:, 0])
        before = torch.cat([start[:, :, None], after[:, :, :-1]], 2)
        if fresh is not None:
            mask = fresh.reshape(*fresh.shape, *(1,) * len(stage.state.dims))
            before = torch.where(mask, stage.state.start, before)
        known[stage.before], known[stage.after] = self._placed(before), self._placed(after)
        return after[:, :, -1].to(state.dtype) if after.shape[2] else state

    def passed(self, stages: Sequence[Pass], states: States, known: dict[str, Tensor]) -> States:
        """Every read by its name; what the states are in the end. Several passes differ in what they write alone."""
        stage, *_ = stages
        starts = [_as_matrix(one, states[one.state.name]) for one in stages]
        widths = [start.shape[-1] for start in starts]
        steps = [step for micro in stage.steps for step in self._steps(micro)]
        given, start = self._arguments(stage, steps, starts[0]), starts[0]
        if len(stages) > 1:
            values = [self._values_of(one, width) for one, width in zip(stages[1:], widths[1:], strict=True)]
            given["v"], start = torch.cat([cast("Tensor", given["v"]), *values], -1), torch.cat(starts, -1)
        final = start
        for i, taken in enumerate(stage.reads):
            q = self._side(taken.query, start.shape[-2], ())
            out, final = self._run(q, given, start, before=taken.before)
            for one, x in zip(stages, torch.split(out, widths, -1), strict=True):
                is_number = len(one.state.dims) <= (0 if one.flat else 1)
                known[one.reads[i].name] = self._placed(x[..., 0] if is_number else x)
        for solved in stage.solves:
            known[solved.name] = self._placed(self._solved(solved, given, start))
        if not stage.reads:
            q = self._tokens.q.new_zeros((*self._tokens.counts, start.shape[-2]))
            _, final = self._run(q, given, start, before=False)
        ends = zip(stages, torch.split(final, widths, -1), strict=True)
        return {one.state.name: x.reshape(states[one.state.name].shape) for one, x in ends}

    def _values_of(self, stage: Pass, width: int) -> Tensor:
        steps = [step for micro in stage.steps for step in self._steps(micro)]
        return _joined([self._side(micro.write[1] if micro.write else None, width, bound) for micro, bound, _ in steps])

    def _solved(self, solved: SolvedRead, given: dict[str, object], start: Tensor) -> Tensor:
        """Solve by conjugate gradients; each product of the matrix with a vector is one read of the state."""
        values, rest = self._values, solved.rest
        factor = values.whole(solved.factor)[..., None]
        diagonal = rest.vector if isinstance(rest, ir.Diagonal) else None
        other = None if rest is None else values.whole(rest if diagonal is None else diagonal)

        def times(x: Tensor) -> Tensor:
            result = factor * self._run(x, given, start, before=False)[0]
            if other is None:
                return result
            return result + (other * x if diagonal is not None else (other @ x[..., None])[..., 0])

        return solve_by_reads(times, self._side(solved.vector, start.shape[-2], ()).contiguous(), solved.steps)

    def scanned(self, stage: ElementwiseScan, state: Tensor, known: dict[str, Tensor]) -> Tensor:
        """Every read by its name; what the state is in the end."""
        outs, final = scan(stage, self._values, state, self._fresh_tensor())
        known.update({name: self._placed(out) for (name, _), out in zip(stage.reads, outs, strict=True)})
        return final

    def coupled(self, stage: Coupled, states: States, known: dict[str, Tensor]) -> States:
        """Every read by its name; what the states are in the end."""
        own = [states[state.name] for state in stage.states]
        outs, last = coupled_tokens.run(stage, self._values, own, self._fresh_tensor())
        known.update({one.name: self._placed(out) for one, out in zip(stage.reads, outs, strict=True)})
        return {state.name: x for state, x in zip(stage.states, last, strict=True)}

    def _run(self, q: Tensor, given: dict[str, object], start: Tensor, *, before: bool) -> tuple[Tensor, Tensor]:
        """By batch entries; where heads begin anew at tokens of their own, each as an entry."""
        fresh = self._fresh_tensor()
        if fresh is None:
            return self._linear(q, state=start, before=before, **given)
        batch, heads, count, _ = q.shape
        if fresh.shape[1] == 1:
            resets = fresh[:, 0].expand(batch, count)
            return self._linear(q, state=start, before=before, resets=resets, **given)
        resets = fresh.expand(batch, heads, count).reshape(batch * heads, count)
        gate, keys = given.get("gate"), cast("Tensor", given["k"])
        if isinstance(gate, Tensor) and gate.ndim == 1:  # of each head
            given = {**given, "gate": gate[None, :, None].expand(keys.shape[:3])}
        own = {name: _folded(x, batch, heads) for name, x in given.items()}
        out, final = self._linear(
            _folded(q, batch, heads),
            state=_folded(start, batch, heads),
            before=before,
            resets=resets,
            **own,
        )
        return out.reshape(batch, heads, *out.shape[2:]), final.reshape(start.shape)

    def _steps(self, micro: Micro) -> list[tuple[Micro, Bound, bool]]:
        """A step as often as it is repeated; whether it is the first time."""
        if micro.repeat is None:
            return [(micro, (), True)]
        variable, *ends = micro.repeat
        low, high = (int(self._values.integers.of(end).flat[0]) for end in ends)
        return [(micro, ((variable, j),), j == low) for j in range(low, high)]

    def _arguments(self, stage: Pass, steps: list[tuple[Micro, Bound, bool]], start: Tensor) -> dict[str, object]:
        """Return the arguments of `linear_recurrence` besides q and the state."""
        rows, columns = start.shape[-2:]
        keys, values, lefts, reads = [], [], [], []
        for micro, bound, _ in steps:
            key, value = micro.write if micro.write is not None else (None, None)
            keys.append(self._side(key, rows, bound))
            values.append(self._side(value, columns, bound))
            if micro.correction is not None:
                lefts.append(self._side(micro.correction.left, rows, bound))
                reads.append(self._side(micro.correction.read, rows, bound))
        given: dict[str, object] = {"k": _joined(keys), "v": _joined(values), "micro": len(steps)}
        batch, heads, _ = self._tokens.counts
        dtype = str(self._tokens.q.dtype).removeprefix("torch.")
        given["chunk"] = chunk_on_cpu(form_of(stage, rows, columns, len(steps)), batch * heads, dtype)
        correction = stage.steps[0].correction
        if correction is not None and correction.merged:
            read = _joined(reads)
            given["correction"] = Delta(read.new_ones(read.shape[:-1]), read)
        elif correction is not None:
            given["correction"] = RankOne(_joined(lefts), _joined(reads), correction.sees)
        given |= self._gates(stage, steps, rows, columns)
        return given

    def _gates(self, stage: Pass, steps: list[tuple[Micro, Bound, bool]], rows: int, columns: int) -> dict[str, object]:
        decays = [micro.decay for micro in stage.steps if micro.decay is not None]
        if not decays:
            return {}
        side = decays[0].side
        if len(steps) == 1 and side == "scalar":
            gate = self._whole(decays[0].log)
            if is_constant(decays[0].log) and not bool((gate <= 0).all()):
                raise GrowingError
            if gate.shape[0] == gate.shape[2] == 1:
                return {"gate": gate[0, :, 0].expand(self._tokens.counts[1])}
        parts = []
        for micro, bound, first in steps:
            if micro.decay is None or not first:
                parts.append(torch.zeros((), dtype=self._tokens.q.dtype, device=self._tokens.q.device))
            else:
                parts.append(self._log_decay(micro.decay.log, bound))
        width = {"scalar": (), "rows": (rows,), "columns": (columns,)}[side]
        shape = (*self._tokens.counts, *width)
        return {"gate_columns" if side == "columns" else "gate": _joined([part.expand(shape) for part in parts])}

    def _log_decay(self, node: Value, bound: Bound) -> Tensor:
        """In fp64 the log of a factor: the factor's gradient is the logarithm's by what may be 1e-30."""
        if isinstance(node, ir.Apply) and node.op == "log" and not is_constant(node):
            return self._values.whole(node.operands[0], bound).double().log()
        return self._values.whole(node, bound).to(self._tokens.q.dtype)

    # --- values ------------------------------------------------------------------------------------------------------

    def _whole(self, node: Value) -> Tensor:
        return self._values.whole(node)

    def _side(self, node: Value | None, width: int, bound: Bound) -> Tensor:
        """A vector of every token."""
        shape = (*self._tokens.counts, width)
        if node is None:
            return self._tokens.q.new_zeros(()).expand(shape)
        span = self._values.whole(node, bound).to(self._tokens.q.dtype)
        return (span if rank(node) else span[..., None]).expand(shape)

    def _fresh_tensor(self) -> Tensor | None:
        if self.fresh is None or not self.fresh.any():
            return None
        batch, _, count = self._tokens.counts
        own = np.broadcast_to(self.fresh, (batch, self.fresh.shape[1], count))
        return torch.from_numpy(own.copy()).to(self._tokens.q.device)

    def _placed(self, x: Tensor) -> Tensor:
        """Return a tensor of tokens by position in processing order."""
        if self._back is None:
            return x
        back = torch.from_numpy(self._back).to(x.device)
        return torch.take_along_dim(x, back.reshape(1, *back.shape, *(1,) * (x.ndim - 3)), 2)


def _as_matrix(stage: Pass, state: Tensor) -> Tensor:
    if len(stage.state.dims) > 1:
        return state
    wide = state if stage.state.dims else state[..., None]
    return wide[..., None, :] if stage.flat else wide[..., None]


def _joined(parts: list[Tensor]) -> Tensor:
    """The micro-steps of each token one after another: (B, H, T · n, …) of n tensors (B, H, T, …)."""
    if len(parts) == 1:
        return parts[0]
    whole = torch.stack(parts, 3)
    return whole.flatten(2, 3)


def _folded(x: object, batch: int, heads: int) -> object:
    """Heads as batch entries."""
    if isinstance(x, Delta):
        read = None if x.read is None else cast("Tensor", _folded(x.read, batch, heads))
        return Delta(cast("Tensor", _folded(x.beta, batch, heads)), read)
    if isinstance(x, RankOne):
        left, read = (cast("Tensor", _folded(y, batch, heads)) for y in (x.left, x.read))
        return RankOne(left, read, x.sees)
    if not isinstance(x, Tensor):
        return x
    return x.reshape(batch * heads, 1, *x.shape[2:])


__all__ = ["GrowingError", "Linear", "run"]
