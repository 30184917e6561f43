"""A call of a recurrence, one part of its tokens after another.

What a part is made of, from its scaled queries to what its tokens read, stays in the cache and is dropped after it.
Kept for the gradient are what was given and the states between parts, from which each part is computed anew (Chen et
al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174). Differentiable once.
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
from attnc.runtime.cpu.autograd import FirstOrder, once
from attnc.runtime.profiling import backward_row, keep_name
from attnc.runtime.recurrent.call_tokens import CallTokens
from attnc.runtime.recurrent.document_runs import cut
from attnc.runtime.recurrent.recorded import keeping
from attnc.runtime.recurrent.token_values import TokenValues

States = dict[str, Tensor]
Fresh = NDArray[np.bool_] | None
Run = Callable[[CallTokens, States, Fresh], tuple[Tensor, States]]

# Tokens of a part, of all heads and batch entries together: few enough for what they are made of to stay in the cache,
# many enough for the calls that compute it (measured).
ROWS = 8192
# At least so many of each: the states between parts take the memory of some of them.
FEWEST = 256


@dataclass(frozen=True)
class Parts:
    """A call, and how a part of it is `run` from the states before it.

    `inputs`: the pattern's. `fresh` as in `token_loop.run`. States in `wide` are fp64 between parts. `constants`:
    values that no token changes, computed once. `longer`: how many times as long as others parts are.
    """

    run: Run
    tokens: CallTokens
    inputs: Sequence[ir.Tensor]
    fresh: Fresh = None
    wide: frozenset[str] = frozenset()
    constants: Sequence[Value] = ()
    longer: float = 1

    def attend(self, states: States) -> tuple[Tensor, States]:
        """(out (B, H, T, …), the states after the last token, in the dtypes of those given)."""
        if len(self.spans()) <= 1:
            return self.run(self.tokens, states, self.fresh)
        first = TokenValues(cut(self.inputs, self.tokens, slice(0, 1)).computed())
        constants = {node: first.by_place(node) for node in self.constants}
        whole = replace(self, tokens=replace(self.tokens, constants=constants))
        return whole.in_parts(states)

    def in_parts(self, states: States) -> tuple[Tensor, States]:
        """Run the call in parts of any length, under autograd where a gradient is required."""
        given = [*self.tokens.real, *states.values()]
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            out, *last = _CheckpointedParts.apply(self, tuple(states), *given)  # type: ignore[no-untyped-call]
            return out, dict(zip(states, last, strict=False))
        out, last = self.forward(self.tokens, states, [])
        return out, last

    def forward(self, tokens: CallTokens, states: States, kept: list[States]) -> tuple[Tensor, States]:
        """(out, the states after the last token); those before each part are added to `kept`."""
        now = self.begun(states)
        out: Tensor | None = None
        for span in self.spans():
            kept.append(now)
            found, now = self.run(self._part(tokens, span), now, self._fresh(span))
            if out is None:
                out = found.new_empty(*tokens.counts, found.shape[-1])
            out[:, :, span] = found
        assert out is not None
        return out, {name: now[name].to(x.dtype) for name, x in states.items()}

    def backward(
        self, tokens: CallTokens, kept: Sequence[States], d_out: Tensor, d_last: States, needed: Sequence[bool]
    ) -> tuple[list[Tensor], States]:
        """Gradients of the real tensors, zeros where they are not needed, and of the states before the first token."""
        totals = [torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tokens.real]
        adjoints = tokens.having(totals)
        whole = [x.shape == y.shape for x, y in zip(totals, self._part(adjoints, self.spans()[0]).real, strict=True)]
        for total, is_whole, need in zip(totals, whole, needed, strict=True):
            if is_whole or not need:
                total.zero_()
        for span, states in reversed(list(zip(self.spans(), kept, strict=True))):
            part = self._part(tokens, span)
            own = [x.detach().requires_grad_(need) for x, need in zip(part.real, needed, strict=True)]
            before = {name: x.detach().requires_grad_() for name, x in states.items()}
            with torch.enable_grad(), keeping():
                out, last = self.run(part.having(own), before, self._fresh(span))
            ends = [(out, d_out[:, :, span]), *((last[name], d) for name, d in d_last.items())]
            ends = [(x, d.to(x.dtype)) for x, d in ends if x.requires_grad]
            places = zip(own, self._part(adjoints, span).real, whole, strict=True)
            wanted = [(x, total, add) for x, total, add in places if x.requires_grad]
            found: Sequence[Tensor | None] = torch.autograd.grad(
                [x for x, _ in ends],
                [*before.values(), *(x for x, _, _ in wanted)],
                [d for _, d in ends],
                allow_unused=True,
            )
            pairs = zip(before.items(), found, strict=False)
            d_last = {name: torch.zeros_like(x) if d is None else d for (name, x), d in pairs}
            for (_, total, add), d in zip(wanted, found[len(before) :], strict=True):
                if add:
                    total.add_(0 if d is None else d)
                else:
                    total.copy_(torch.zeros_like(total) if d is None else d)
        return [total.to(x.dtype) for total, x in zip(totals, tokens.real, strict=True)], d_last

    def begun(self, states: States) -> States:
        """The states given, as they are between parts."""
        return {name: x.double() if name in self.wide else x for name, x in states.items()}

    def spans(self) -> list[slice]:
        """The tokens of each part, in order."""
        batch, heads, count = self.tokens.counts
        length = max(int(ROWS * self.longer) // max(batch * heads, 1), FEWEST)
        return [slice(start, min(start + length, count)) for start in range(0, count, length)]

    def _part(self, tokens: CallTokens, span: slice) -> CallTokens:
        return cut(self.inputs, tokens, span)

    def _fresh(self, span: slice) -> Fresh:
        if self.fresh is None or self.fresh.shape[2] == 1:
            return self.fresh
        own = self.fresh[:, :, span]
        return own if own.any() else None


class _CheckpointedParts(FirstOrder):
    """The parts under autograd; the last results are the states between them, which the backward pass needs."""

    @staticmethod
    def forward(parts: Parts, names: Sequence[str], *given: Tensor) -> tuple[Tensor, ...]:
        tokens, states = _apart(parts, names, given)
        kept: list[States] = []
        out, last = parts.forward(tokens, states, kept)
        return (out, *last.values(), *(x for one in kept[1:] for x in one.values()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.parts, ctx.names, *given = inputs
        keep_name(ctx)
        kept = output[1 + len(ctx.names) :]
        ctx.save_for_backward(*given, *kept)
        ctx.mark_non_differentiable(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = (ctx.parts, ctx.names, tuple(ctx.needs_input_grad[2:]), *grads[: 1 + len(ctx.names)])
        with backward_row(ctx):
            return (None, None, *once(_gradients, *given, *ctx.saved_tensors))


def _gradients(parts: Parts, names: Sequence[str], needed: Sequence[bool], *rest: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of all arguments."""
    (d_out, *d_last), rest = rest[: 1 + len(names)], rest[1 + len(names) :]
    given, between = rest[: len(needed)], rest[len(needed) :]
    tokens, states = _apart(parts, names, given)
    starts = [between[at : at + len(names)] for at in range(0, len(between), max(len(names), 1))]
    kept = [parts.begun(states), *(dict(zip(names, one, strict=True)) for one in starts)]
    own = needed[: len(needed) - len(names)]
    gradients, d_states = parts.backward(tokens, kept, d_out, dict(zip(names, d_last, strict=True)), own)
    return (*gradients, *(d_states[name].to(x.dtype) for name, x in states.items()))


def _apart(parts: Parts, names: Sequence[str], given: Sequence[Tensor]) -> tuple[CallTokens, States]:
    """The call with the tensors given, and the states before its first token."""
    count = len(given) - len(names)
    return parts.tokens.having(given[:count]), dict(zip(names, given[count:], strict=True))


__all__ = ["Parts"]
