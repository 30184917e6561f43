"""Recurrences of any step equation by one kernel: token by token, with states on the chip.

The kernel computes what `attnc.runtime.executors.recurrent.token_loop` computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.ir import Index, Recur, Value
from attnc.compiler.ir.value_nodes import Axes
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.recurrences.kernels.stepping import Stepping
from attnc.compiler.recurrences.kernels.tape_kernels import Stage, emit_token_by_token
from attnc.compiler.recurrences.step_tape import NoTapeError, StepTape, tape_of
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.device_targets import target_of
from attnc.runtime.executors.recurrent.call_tokens import CallTokens
from attnc.runtime.executors.recurrent.recorded import recorded
from attnc.runtime.executors.recurrent.token_loop import back_order_of, fresh_of, order_of
from attnc.runtime.executors.recurrent.token_values import TokenValues, reordered
from attnc.runtime.executors.triton.launch import launch
from attnc.spec.errors import EvaluationError

States = dict[str, Tensor]
_STAGES: tuple[Stage, Stage] = ("forward", "backward")
SHORTEST, LONGEST = 16, 128
"""Minimum and maximum number of tokens in a stretch; within them, stretches are about as many as tokens in one."""


def run(recur: Recur, tokens: CallTokens, states: States, fresh: NDArray[np.bool_] | None) -> tuple[Tensor, States]:
    """Compute (out (B, H, T, width), states after the last token), fp32, from states (B, H, …), as the token loop does.

    Differentiable once. Raises UnsupportedError if no kernel supports the recurrence or no GPU is available;
    ArgumentError and EvaluationError as the token loop does.
    """
    batch, heads, count = tokens.counts
    plain = TokenValues(tokens)
    order = order_of(recur, plain)
    values = plain if order is None else TokenValues(tokens, order)
    try:
        call = _token_call(recur, values, states, fresh)
        leaves = [call.tensors_by_op[i] for i in call.stepping.tape.leaves]
        initial_states = [states[name] for name, _ in call.stepping.tape.after]
        keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (*leaves, *initial_states))
        call = replace(call, stepping=replace(call.stepping, keeps=keeps))
        for stage in _STAGES[: 1 + keeps]:
            emit_token_by_token(call.stepping, stage)
    except (NoTapeError, NotInKernelsError) as error:
        raise UnsupportedError(
            f"`{recur.name}` runs token by token, but not by a kernel: {error}; use the reference "
            f'executor, backend="reference", or move the tensors to the CPU'
        ) from error
    out, *last = recorded(call, [*leaves, *initial_states])
    out = reordered(out.view(batch, heads, count, -1), back_order_of(order))
    return out, dict(zip((name for name, _ in call.stepping.tape.after), last, strict=True))


@dataclass(frozen=True, eq=False)
class _TokenCall:
    """One call: its kernel specification, and its leaf (fp32) and test (int32) tensors by operation number."""

    stepping: Stepping
    batch: int
    heads: int
    tokens: int
    tensors_by_op: Mapping[int, Tensor]
    fresh: Tensor | None
    reuses: ClassVar[bool] = False

    @property
    def lanes(self) -> int:
        """Number of heads of all batch entries."""
        return self.batch * self.heads

    @property
    def stretch(self) -> int:
        """Number of tokens in a stretch."""
        return min(LONGEST, max(SHORTEST, 1 << (isqrt(max(self.tokens - 1, 0)).bit_length())))

    @property
    def stretches(self) -> int:
        """Number of stretches."""
        return -(-self.tokens // self.stretch)

    def axes(self, i: int) -> Axes:
        """Return the axes of an operation's value."""
        return self.stepping.tape.ops[i].axes

    def states(self) -> list[Axes]:
        """Return the axes of the states, in order."""
        axes_by_state = {op.of: op.axes for op in self.stepping.tape.ops if op.kind == "state"}
        return [axes_by_state[name] for name, _ in self.stepping.tape.after]

    def slots(self, axes: Axes) -> int:
        """Return how many programs of a head hold a copy of a value; 1 if the value is divided among them."""
        return 1 if self.stepping.is_part(axes) else self.stepping.parts

    def buffer(self, axes: Axes, *counts: int) -> Tensor:
        """Allocate an uninitialised buffer with `counts` values for each head and slot."""
        shape = (self.lanes * self.slots(axes), *counts, *self.stepping.shape(axes))
        return torch.empty(shape, dtype=torch.float32, device=next(iter(self.tensors_by_op.values())).device)

    def run(self, stage: Stage, leaves: Mapping[int, Tensor], tensors: dict[str, Tensor]) -> None:
        """Launch the kernel of a stage."""
        for i, x in self.tensors_by_op.items():
            kind = self.stepping.tape.ops[i].kind
            tensor = leaves.get(i, x)
            tensors[f"{kind}{i}"] = tensor.expand(self.batch, self.heads, *tensor.shape[2:])
        if self.fresh is not None:
            tensors["fresh"] = self.fresh.expand(self.batch, self.heads, self.fresh.shape[2])
        numbers = {
            "heads": self.heads,
            "tokens": self.tokens,
            "parts": self.stepping.parts,
            "stretch": self.stretch,
            "stretches": self.stretches,
        }
        launch(emit_token_by_token(self.stepping, stage), self.lanes, tensors, numbers)

    @property
    def keeps(self) -> int:
        """Number of tensors of states before stretches."""
        return len(self.stepping.tape.after) if self.stepping.keeps else 0

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run the forward kernel: out (lanes, T, width), states after the last token, states before stretches."""
        tape, axes = self.stepping.tape, self.states()
        states = tensors[len(tape.leaves) :]
        device = states[0].device
        out = torch.empty(self.lanes, self.tokens, *self.stepping.shape(tape.ops[tape.read].axes), device=device)
        last = [torch.empty(x.shape, dtype=torch.float32, device=device) for x in states]
        kept = [self.buffer(state_axes, self.stretches) for state_axes in axes] if self.stepping.keeps else []
        tensors_by_name = {"out": out}
        for n, (initial, end) in enumerate(zip(states, last, strict=True)):
            tensors_by_name |= {f"begun{n}": initial.float().contiguous(), f"last{n}": end}
        tensors_by_name |= {f"kept{n}": x for n, x in enumerate(kept)}
        self.run("forward", dict(zip(tape.leaves, tensors, strict=False)), tensors_by_name)
        return [out, *last, *kept]

    def backward(
        self, tensors: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor]:
        """Run the backward kernel: the gradients of the leaves and of the initial states."""
        tape, axes = self.stepping.tape, self.states()
        (d_out, *d_last), states = grads, tensors[len(tape.leaves) :]
        leaves = dict(zip(tape.leaves, tensors, strict=False))
        tensors_by_name = {"dout": d_out.float().contiguous()}
        for n, state_axes in enumerate(axes):
            tensors_by_name |= {
                f"dlast{n}": d_last[n].float().contiguous(),
                f"kept{n}": kept[n],
                f"before{n}": self.buffer(state_axes, self.stretch),
                f"dbegun{n}": self.buffer(state_axes),
            }
        for i in tape.leaves:
            count = self.tokens if i in self.stepping.varying else 1
            tensors_by_name[f"dleaf{i}"] = self.buffer(tape.ops[i].axes, count)
        self.run("backward", leaves, tensors_by_name)
        gradients = [self._summed(tensors_by_name[f"dleaf{i}"], tape.ops[i].axes, x) for i, x in leaves.items()]
        starts = zip(axes, states, strict=True)
        return gradients + [self._summed(tensors_by_name[f"dbegun{n}"], *start) for n, start in enumerate(starts)]

    def _summed(self, partial_sums: Tensor, axes: Axes, like: Tensor) -> Tensor:
        """Reduce a gradient to its tensor's shape: sum over programs and over broadcast dimensions."""
        lead = (self.batch, self.heads, self.slots(axes))
        total = partial_sums.view(*lead, *partial_sums.shape[1:]).sum(2)
        return total.sum_to_size(like.shape).to(like.dtype)


def _token_call(recur: Recur, values: TokenValues, states: States, fresh: NDArray[np.bool_] | None) -> _TokenCall:
    """Return the kernel call of a recurrence. Raises NoTapeError, EvaluationError, UnsupportedError."""
    batch, heads, count = values.tokens.counts

    def ends(node: Index) -> tuple[int, int]:
        values_of_node = values.integers.of(node)
        return int(values_of_node.min()), int(values_of_node.max())

    tape = tape_of(recur, ends)
    sizes: dict[str, int] = {}
    tensors: dict[int, Tensor] = {}
    for i in tape.leaves:
        x = values.whole(cast("Value", tape.ops[i].of))
        if x.is_complex():
            raise NoTapeError("its steps combine a complex number with a state")
        tensors[i] = _packed(x.float())
        _measure(sizes, tape.ops[i].axes, x.shape[3:])
    for name, _ in tape.after:
        _measure(
            sizes, next(op.axes for op in tape.ops if op.of == name and op.kind == "state"), states[name].shape[2:]
        )
    tests = {i: values.integers.in_order(cast("Index", tape.ops[i].of)) for i in tape.tests}
    _check_picks(tape, tests, sizes)
    tensors |= {i: torch.from_numpy(at.astype(np.int32)).to(values.tokens.q.device) for i, at in tests.items()}
    fresh = fresh_of(recur, values, fresh)
    target = target_of(values.tokens.q.device)
    stepping = Stepping(
        recur.name,
        tape,
        tuple(sorted(sizes.items())),
        frozenset(i for i, x in tensors.items() if x.shape[2] > 1),
        tuple(next(state.start for state in recur.states if state.name == name) for name, _ in tape.after),
        resets=fresh is not None,
        keeps=False,
        precision=target.products_on_chip,
        registers=target.registers,
    )
    begins = None if fresh is None else torch.from_numpy(fresh.astype(np.int32)).to(values.tokens.q.device)
    return _TokenCall(stepping, batch, heads, count, tensors, begins)


def _packed(x: Tensor) -> Tensor:
    """Return `x` with the entries of a token contiguous, as kernels read them."""
    step = 1
    for size, stride in zip(reversed(x.shape[3:]), reversed(x.stride()[3:]), strict=True):
        if size > 1 and stride != step:
            return x.contiguous()
        step *= size
    return x


def _measure(sizes: dict[str, int], axes: Axes, shape: Sequence[int]) -> None:
    """Record the sizes of named axes."""
    sizes.update((axis, size) for axis, size in zip(axes, shape, strict=True) if isinstance(axis, str))


def _check_picks(tape: StepTape, tests: Mapping[int, NDArray[np.int64]], sizes: Mapping[str, int]) -> None:
    """Check that every picked entry is within range; raises EvaluationError."""
    for op in tape.ops:
        if op.kind == "pick":
            vector, test = op.operands
            axis = tape.ops[vector].axes[0]
            size = axis if isinstance(axis, int) else sizes[axis]
            smallest, largest = int(tests[test].min()), int(tests[test].max())
            if smallest < 0 or largest >= size:
                worst = smallest if smallest < 0 else largest
                raise EvaluationError("A902", f"the index {worst} is out of range", None, f"there are {size} entries")
