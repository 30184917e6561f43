"""A derived recurrence: run its passes chunk by chunk and compute the outputs from the reads. Differentiable once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import Recur, Value
from attnc.compiler.ir.value_nodes import axes
from attnc.compiler.recurrences.derive import is_constant
from attnc.compiler.recurrences.derived import (
    Coupled,
    ElementwiseScan,
    Micro,
    Pass,
    RunningReduction,
    SolvedRead,
    Stage,
)
from attnc.compiler.recurrences.recurrence_form import RecurrenceForm
from attnc.compiler.simulation.recurrent.cpu_chunks import chunk_on_cpu
from attnc.compiler.simulation.recurrent.recurrence_call import form_of
from attnc.runtime.executors.recurrent import coupled_tokens
from attnc.runtime.executors.recurrent.call_tokens import CallTokens
from attnc.runtime.executors.recurrent.entries import scan
from attnc.runtime.executors.recurrent.linear import linear_recurrence
from attnc.runtime.executors.recurrent.linear_inputs import Delta, RankOne
from attnc.runtime.executors.recurrent.monoids import running_log_sum, running_max
from attnc.runtime.executors.recurrent.solves import solve_by_reads
from attnc.runtime.executors.recurrent.token_integers import Bound
from attnc.runtime.executors.recurrent.token_loop import States, back_order_of, fresh_of, order_of
from attnc.runtime.executors.recurrent.token_values import LEAD, TokenValues, reordered
from attnc.runtime.values.value_walk import aligned

Linear = Callable[..., tuple[Tensor, Tensor]]
"""`linear_recurrence`, or a function with the same interface and results."""


def run(
    derived: RecurrenceForm,
    recur: Recur,
    tokens: CallTokens,
    states: States,
    fresh: NDArray[np.bool_] | None,
    linear: Linear = linear_recurrence,
) -> tuple[Tensor, States]:
    """Compute the results of `token_loop.run` for a derived recurrence; `linear` runs the passes of linear states."""
    inputs = dict(tokens.inputs)
    tokens = replace(tokens, inputs=inputs)
    order = order_of(recur, TokenValues(tokens))
    values = TokenValues(tokens, order)
    runner = _PassRunner(tokens, values, linear, fresh_of(recur, values, fresh))
    last: States = {}
    for stages in _grouped(derived.stages):
        stage, *_ = stages
        if isinstance(stage, Coupled):
            last |= runner.coupled(stage, states, inputs)
        elif isinstance(stage, RunningReduction):
            last[stage.state.name] = runner.running(stage, states[stage.state.name], inputs)
        elif isinstance(stage, ElementwiseScan):
            last[stage.state.name] = runner.scanned(stage, states[stage.state.name], inputs)
        else:
            last |= runner.passed([each_pass for each_pass in stages if isinstance(each_pass, Pass)], states, inputs)
    batch, heads, count = tokens.counts
    out = TokenValues(tokens).by_place(derived.result)
    return out.expand(batch, heads, count, out.shape[-1]), {state.name: last[state.name] for state in recur.states}


def _grouped(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Group consecutive passes that differ only in the values they write, so that each group runs as one pass."""
    result: list[list[Stage]] = []
    for stage in stages:
        first = result[-1][0] if result else None
        if isinstance(stage, Pass) and isinstance(first, Pass) and _can_share_steps(first, stage):
            result[-1].append(stage)
        else:
            result.append([stage])
    return result


def _can_share_steps(a: Pass, b: Pass) -> bool:
    """Check whether two passes differ only in the values they write."""
    return (
        not (a.solves or b.solves or a.flat or b.flat)
        and a.state.dims[0] == b.state.dims[0]
        and [(read.query, read.before) for read in a.reads] == [(read.query, read.before) for read in b.reads]
        and list(map(_without_value, a.steps)) == list(map(_without_value, b.steps))
        and not any(step.decay is not None and step.decay.side == "columns" for step in a.steps)
        and not any(step.write is None for step in (*a.steps, *b.steps))
    )


def _without_value(step: Micro) -> tuple[object, ...]:
    return step.decay, step.correction, step.repeat, step.write and step.write[0]


class GrowingError(Exception):
    """A factor that was assumed to be a decay is above 1 or below 0."""


class _PassRunner:
    """Runs the passes of one call. `fresh`: see `token_loop.run`, here in processing order."""

    def __init__(
        self, tokens: CallTokens, values: TokenValues, linear: Linear, fresh: NDArray[np.bool_] | None
    ) -> None:
        self._linear = linear
        self._tokens = tokens
        self._values = values
        self._back_order = back_order_of(values.order)
        self._fresh: Tensor | None = None
        if fresh is not None and fresh.any():
            batch, _, count = tokens.counts
            mask = np.broadcast_to(fresh, (batch, fresh.shape[1], count))
            self._fresh = torch.from_numpy(mask.copy()).to(tokens.q.device)

    def running(self, stage: RunningReduction, state: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Compute a running reduction: store its states by token in `inputs`, return the final state."""
        # In fp64: decays are exponentials of differences of running values, which may be small beside the values.
        operand, initial = self._values.widened(stage.added), state.double()
        operand = aligned(operand, axes(stage.added), stage.state.dims, LEAD)
        operand = operand.expand(*self._tokens.counts, *state.shape[2:])
        fresh = self._fresh
        run = running_max if stage.op == "max" else running_log_sum
        after = run(operand, initial, fresh if fresh is None or fresh.shape[1] > 1 else fresh[:, 0])
        before = torch.cat([initial[:, :, None], after[:, :, :-1]], 2)
        if fresh is not None:
            mask = fresh.reshape(*fresh.shape, *(1,) * len(stage.state.dims))
            before = torch.where(mask, stage.state.start, before)
        inputs[stage.before], inputs[stage.after] = self._by_position(before), self._by_position(after)
        return after[:, :, -1].to(state.dtype) if after.shape[2] else state

    def passed(self, stages: Sequence[Pass], states: States, inputs: dict[str, Tensor]) -> States:
        """Run passes that differ only in their writes: store the reads in `inputs`, return the final states."""
        stage, *_ = stages
        starts = [_as_matrix(each_pass, states[each_pass.state.name]) for each_pass in stages]
        widths = [start.shape[-1] for start in starts]
        steps = [step for micro in stage.steps for step in self._steps(micro)]
        arguments, start = self._arguments(stage, steps, starts[0]), starts[0]
        if len(stages) > 1:
            values = [
                self._values_of(each_pass, width) for each_pass, width in zip(stages[1:], widths[1:], strict=True)
            ]
            arguments["v"], start = torch.cat([cast("Tensor", arguments["v"]), *values], -1), torch.cat(starts, -1)
        final = start
        for i, read in enumerate(stage.reads):
            q = self._vector(read.query, start.shape[-2], ())
            out, final = self._run(q, arguments, start, before=read.before)
            for each_pass, x in zip(stages, torch.split(out, widths, -1), strict=True):
                is_number = len(each_pass.state.dims) <= (0 if each_pass.flat else 1)
                inputs[each_pass.reads[i].name] = self._by_position(x[..., 0] if is_number else x)
        for solved in stage.solves:
            inputs[solved.name] = self._by_position(self._solved(solved, arguments, start))
        if not stage.reads:
            q = self._tokens.q.new_zeros((*self._tokens.counts, start.shape[-2]))
            _, final = self._run(q, arguments, start, before=False)
        ends = zip(stages, torch.split(final, widths, -1), strict=True)
        return {each_pass.state.name: x.reshape(states[each_pass.state.name].shape) for each_pass, x in ends}

    def _values_of(self, stage: Pass, width: int) -> Tensor:
        steps = [step for micro in stage.steps for step in self._steps(micro)]
        return _joined(
            [self._vector(micro.write[1] if micro.write else None, width, bound) for micro, bound, _ in steps]
        )

    def _solved(self, solved: SolvedRead, arguments: dict[str, object], start: Tensor) -> Tensor:
        """Solve by conjugate gradients; each product of the matrix with a vector is one read of the state."""
        values, remainder = self._values, solved.rest
        factor = values.whole(solved.factor)[..., None]
        diagonal = remainder.vector if isinstance(remainder, ir.Diagonal) else None
        remainder_value = None if remainder is None else values.whole(remainder if diagonal is None else diagonal)

        def times(x: Tensor) -> Tensor:
            result = factor * self._run(x, arguments, start, before=False)[0]
            if remainder_value is None:
                return result
            return result + (remainder_value * x if diagonal is not None else (remainder_value @ x[..., None])[..., 0])

        return solve_by_reads(times, self._vector(solved.vector, start.shape[-2], ()).contiguous(), solved.steps)

    def scanned(self, stage: ElementwiseScan, state: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Run an elementwise scan: store the reads in `inputs`, return the final state."""
        outs, final = scan(stage, self._values, state, self._fresh)
        inputs.update({name: self._by_position(out) for (name, _), out in zip(stage.reads, outs, strict=True)})
        return final

    def coupled(self, stage: Coupled, states: States, inputs: dict[str, Tensor]) -> States:
        """Run coupled states: store the reads in `inputs`, return the final states."""
        initial = [states[state.name] for state in stage.states]
        outs, last = coupled_tokens.run(stage, self._values, initial, self._fresh)
        inputs.update({read.name: self._by_position(out) for read, out in zip(stage.reads, outs, strict=True)})
        return {state.name: x for state, x in zip(stage.states, last, strict=True)}

    def _run(self, q: Tensor, arguments: dict[str, object], start: Tensor, *, before: bool) -> tuple[Tensor, Tensor]:
        """Run the linear pass; heads that start anew at different tokens become batch entries."""
        fresh = self._fresh
        if fresh is None:
            return self._linear(q, state=start, before=before, **arguments)
        batch, heads, count, _ = q.shape
        if fresh.shape[1] == 1:
            resets = fresh[:, 0].expand(batch, count)
            return self._linear(q, state=start, before=before, resets=resets, **arguments)
        resets = fresh.expand(batch, heads, count).reshape(batch * heads, count)
        gate, keys = arguments.get("gate"), cast("Tensor", arguments["k"])
        if isinstance(gate, Tensor) and gate.ndim == 1:  # one per head
            arguments = {**arguments, "gate": gate[None, :, None].expand(keys.shape[:3])}
        folded = {name: _folded(x, batch, heads) for name, x in arguments.items()}
        out, final = self._linear(
            _folded(q, batch, heads),
            state=_folded(start, batch, heads),
            before=before,
            resets=resets,
            **folded,
        )
        return out.reshape(batch, heads, *out.shape[2:]), final.reshape(start.shape)

    def _steps(self, micro: Micro) -> list[tuple[Micro, Bound, bool]]:
        """Return the repetitions of a step: (step, bound variables, whether it is the first)."""
        if micro.repeat is None:
            return [(micro, (), True)]
        variable, *ends = micro.repeat
        low, high = (int(self._values.integers.of(end).flat[0]) for end in ends)
        return [(micro, ((variable, j),), j == low) for j in range(low, high)]

    def _arguments(self, stage: Pass, steps: list[tuple[Micro, Bound, bool]], start: Tensor) -> dict[str, object]:
        """Return the arguments of `linear_recurrence` besides q and the state."""
        rows, columns = start.shape[-2:]
        form = stage.form(len(steps))
        keys, values, lefts, reads = [], [], [], []
        for micro, bound, _ in steps:
            key, value = micro.write if micro.write is not None else (None, None)
            keys.append(self._vector(key, rows, bound))
            values.append(self._vector(value, columns, bound))
            left, read = (micro.correction.left, micro.correction.read) if micro.correction else (None, None)
            lefts += [self._vector(left, rows, bound)] * form.is_rank_one
            reads += [self._vector(read, rows, bound)] * form.is_corrected
        arguments: dict[str, object] = {"k": _joined(keys), "v": _joined(values), "micro": len(steps)}
        batch, heads, _ = self._tokens.counts
        dtype = str(self._tokens.q.dtype).removeprefix("torch.")
        arguments["chunk"] = chunk_on_cpu(form_of(stage, rows, columns, len(steps)), batch * heads, dtype)
        if form.is_delta:
            joined_reads = _joined(reads)
            arguments["correction"] = Delta(joined_reads.new_ones(joined_reads.shape[:-1]), joined_reads)
        elif form.is_rank_one:
            sees: Literal["decayed", "old"] = "old" if form.correction == "old" else "decayed"
            arguments["correction"] = RankOne(_joined(lefts), _joined(reads), sees)
        arguments |= self._gates(stage, steps, rows, columns)
        return arguments

    def _gates(self, stage: Pass, steps: list[tuple[Micro, Bound, bool]], rows: int, columns: int) -> dict[str, object]:
        if stage.decay is None:
            return {}
        side = stage.decay.side
        if len(steps) == 1 and side == "scalar":
            gate = self._values.whole(stage.decay.log)
            if is_constant(stage.decay.log) and not bool((gate <= 0).all()):
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
        """Return a log decay; in fp64 if it is the log of a factor, whose gradient is divided by as little as 1e-30."""
        if isinstance(node, ir.Apply) and node.op == "log" and not is_constant(node):
            return self._values.whole(node.operands[0], bound).double().log()
        return self._values.whole(node, bound).to(self._tokens.q.dtype)

    # --- values ------------------------------------------------------------------------------------------------------

    def _vector(self, node: Value | None, width: int, bound: Bound) -> Tensor:
        return self._values.vectors(node, width, self._tokens.q.dtype, bound)

    def _by_position(self, x: Tensor) -> Tensor:
        """Return a tensor in processing order reordered by position."""
        return reordered(x, self._back_order)


def _as_matrix(stage: Pass, state: Tensor) -> Tensor:
    if len(stage.state.dims) > 1:
        return state
    wide = state if stage.state.dims else state[..., None]
    return wide[..., None, :] if stage.flat else wide[..., None]


def _joined(parts: list[Tensor]) -> Tensor:
    """Interleave n tensors (B, H, T, …), one per micro-step, into one (B, H, T · n, …)."""
    if len(parts) == 1:
        return parts[0]
    stacked = torch.stack(parts, 3)
    return stacked.flatten(2, 3)


def _folded(argument: object, batch: int, heads: int) -> object:
    """Return an argument with heads as batch entries, (B · H, 1, …); leave other values unchanged."""
    if isinstance(argument, Delta | RankOne):
        parts: dict[str, Any] = {name: _folded(x, batch, heads) for name, x in vars(argument).items()}
        return replace(argument, **parts)
    if not isinstance(argument, Tensor):
        return argument
    return argument.reshape(batch * heads, 1, *argument.shape[2:])
