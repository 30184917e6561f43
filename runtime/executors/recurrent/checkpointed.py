"""A call of a recurrence in parts of its tokens, one after another.

The intermediates of a part, from scaled queries to reads, stay in the cache and are dropped after it. The backward pass
keeps the arguments and the states between parts, and recomputes each part (Chen et al. 2016, "Training Deep Nets with
Sublinear Memory Cost", arXiv 1604.06174). Differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import Value
from attnc.runtime.executors.cpu.autograd import FirstOrder, once
from attnc.runtime.executors.recurrent.call_tokens import CallTokens
from attnc.runtime.executors.recurrent.document_runs import cut
from attnc.runtime.executors.recurrent.recorded import keeping
from attnc.runtime.executors.recurrent.token_values import TokenValues
from attnc.runtime.process.profiling import backward_row, keep_name

States = dict[str, Tensor]
Fresh = NDArray[np.bool_] | None
Run = Callable[[CallTokens, States, Fresh], tuple[Tensor, States]]

# Rows (tokens times heads times batch entries) of a part: few enough for the intermediates to stay in the cache, many
# enough to amortise the overhead of torch calls (measured).
ROWS = 8192
# Minimum number of tokens of a part: the states between parts take as much memory as some tokens.
FEWEST = 256


@dataclass(frozen=True)
class Parts:
    """A call in parts. `run` computes a part from the states before it.

    `inputs`: the pattern's inputs. `fresh`: as in `token_loop.run`. `wide`: the states that are fp64 between parts.
    `constants`: values that are the same for all tokens, computed once. `longer`: a factor of the usual part length.
    """

    run: Run
    tokens: CallTokens
    inputs: Sequence[ir.Tensor]
    fresh: Fresh = None
    wide: frozenset[str] = frozenset()
    constants: Sequence[Value] = ()
    longer: float = 1

    def attend(self, states: States) -> tuple[Tensor, States]:
        """Compute (out (B, H, T, …), the states after the last token, in the dtypes of `states`)."""
        if len(self.spans()) <= 1:
            return self.run(self.tokens, states, self.fresh)
        first = TokenValues(cut(self.inputs, self.tokens, slice(0, 1)).computed())
        constants = {node: first.by_place(node) for node in self.constants}
        prepared = replace(self, tokens=replace(self.tokens, constants=constants))
        return prepared.in_parts(states)

    def in_parts(self, states: States) -> tuple[Tensor, States]:
        """Run the call in parts of any length, under autograd where a gradient is required."""
        tensors = [*self.tokens.real, *states.values()]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            out, *last = _CheckpointedParts.apply(self, tuple(states), *tensors)  # type: ignore[no-untyped-call]
            return out, dict(zip(states, last, strict=False))
        out, last = self.forward(self.tokens, states, [])
        return out, last

    def forward(self, tokens: CallTokens, states: States, kept: list[States]) -> tuple[Tensor, States]:
        """Compute (out, the states after the last token); append the states before each part to `kept`."""
        current = self.begun(states)
        out: Tensor | None = None
        for span in self.spans():
            kept.append(current)
            part_out, current = self.run(self._part(tokens, span), current, self._fresh(span))
            if out is None:
                out = part_out.new_empty(*tokens.counts, part_out.shape[-1])
            out[:, :, span] = part_out
        assert out is not None
        return out, {name: current[name].to(x.dtype) for name, x in states.items()}

    def backward(
        self, tokens: CallTokens, kept: Sequence[States], d_out: Tensor, d_last: States, needed: Sequence[bool]
    ) -> tuple[list[Tensor], States]:
        """Compute gradients of the real tensors (zeros if not needed) and of the states before the first token."""
        totals = [torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tokens.real]
        adjoints = tokens.having(totals)
        uncut = [x.shape == y.shape for x, y in zip(totals, self._part(adjoints, self.spans()[0]).real, strict=True)]
        for total, is_uncut, need in zip(totals, uncut, needed, strict=True):
            if is_uncut or not need:
                total.zero_()
        for span, states in reversed(list(zip(self.spans(), kept, strict=True))):
            part = self._part(tokens, span)
            leaves = [x.detach().requires_grad_(need) for x, need in zip(part.real, needed, strict=True)]
            before = {name: x.detach().requires_grad_() for name, x in states.items()}
            with torch.enable_grad(), keeping():
                out, last = self.run(part.having(leaves), before, self._fresh(span))
            ends = [(out, d_out[:, :, span]), *((last[name], d) for name, d in d_last.items())]
            ends = [(x, d.to(x.dtype)) for x, d in ends if x.requires_grad]
            targets = zip(leaves, self._part(adjoints, span).real, uncut, strict=True)
            sums = [(x, total, add) for x, total, add in targets if x.requires_grad]
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                [x for x, _ in ends],
                [*before.values(), *(x for x, _, _ in sums)],
                [d for _, d in ends],
                allow_unused=True,
            )
            pairs = zip(before.items(), gradients, strict=False)
            d_last = {name: torch.zeros_like(x) if d is None else d for (name, x), d in pairs}
            for (_, total, add), d in zip(sums, gradients[len(before) :], strict=True):
                if add:
                    total.add_(0 if d is None else d)
                else:
                    total.copy_(torch.zeros_like(total) if d is None else d)
        return [total.to(x.dtype) for total, x in zip(totals, tokens.real, strict=True)], d_last

    def begun(self, states: States) -> States:
        """Return the states in the dtypes that they have between parts."""
        return {name: x.double() if name in self.wide else x for name, x in states.items()}

    def spans(self) -> list[slice]:
        """Return the tokens of each part, in order."""
        batch, heads, count = self.tokens.counts
        length = max(int(ROWS * self.longer) // max(batch * heads, 1), FEWEST)
        return [slice(start, min(start + length, count)) for start in range(0, count, length)]

    def _part(self, tokens: CallTokens, span: slice) -> CallTokens:
        return cut(self.inputs, tokens, span)

    def _fresh(self, span: slice) -> Fresh:
        if self.fresh is None or self.fresh.shape[2] == 1:
            return self.fresh
        part_fresh = self.fresh[:, :, span]
        return part_fresh if part_fresh.any() else None


class _CheckpointedParts(FirstOrder):
    """The parts under autograd; the last results are the states between parts, which the backward pass needs."""

    @staticmethod
    def forward(parts: Parts, names: Sequence[str], *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, states = _arguments(parts, names, tensors)
        kept: list[States] = []
        out, last = parts.forward(tokens, states, kept)
        return (out, *last.values(), *(x for states_before in kept[1:] for x in states_before.values()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.parts, ctx.names, *tensors = inputs
        keep_name(ctx)
        kept = output[1 + len(ctx.names) :]
        ctx.save_for_backward(*tensors, *kept)
        ctx.mark_non_differentiable(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (ctx.parts, ctx.names, tuple(ctx.needs_input_grad[2:]), *grads[: 1 + len(ctx.names)])
        with backward_row(ctx):
            return (None, None, *once(_gradients, *arguments, *ctx.saved_tensors))


def _gradients(
    parts: Parts, names: Sequence[str], needed: Sequence[bool], *grads_and_saved: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of all arguments of `_CheckpointedParts.forward`."""
    (d_out, *d_last), grads_and_saved = grads_and_saved[: 1 + len(names)], grads_and_saved[1 + len(names) :]
    tensors, between = grads_and_saved[: len(needed)], grads_and_saved[len(needed) :]
    tokens, states = _arguments(parts, names, tensors)
    starts = [between[i : i + len(names)] for i in range(0, len(between), max(len(names), 1))]
    kept = [parts.begun(states), *(dict(zip(names, part_states, strict=True)) for part_states in starts)]
    tensors_needed = needed[: len(needed) - len(names)]
    gradients, d_states = parts.backward(tokens, kept, d_out, dict(zip(names, d_last, strict=True)), tensors_needed)
    return (*gradients, *(d_states[name].to(x.dtype) for name, x in states.items()))


def _arguments(parts: Parts, names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[CallTokens, States]:
    """Return the call with other tensors, and the states before its first token."""
    count = len(tensors) - len(names)
    return parts.tokens.having(tensors[:count]), dict(zip(names, tensors[count:], strict=True))


__all__ = ["Parts"]
