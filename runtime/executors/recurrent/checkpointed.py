"""A call of a recurrence in parts of its tokens, so that the intermediates of a part stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import Value
from attnc.runtime.executors.recurrent.call_tokens import CallTokens, cut
from attnc.runtime.executors.recurrent.recorded import SpanWork, Tensors, recorded
from attnc.runtime.executors.recurrent.token_values import TokenValues

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
        work = _PartsWork(prepared, list(states))
        tensors = [*prepared.tokens.real, *states.values()]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            out, *last = recorded(work, tensors)
        else:
            out, *last = work.forward(tensors)
        return out, dict(zip(states, last, strict=False))

    def spans(self) -> list[slice]:
        """Return the tokens of each part, in order."""
        batch, heads, count = self.tokens.counts
        length = max(int(ROWS * self.longer) // max(batch * heads, 1), FEWEST)
        return [slice(start, min(start + length, count)) for start in range(0, count, length)]

    def fresh_of(self, span: slice) -> Fresh:
        """Return the tokens of a part before which the states start anew; None if there are none."""
        if self.fresh is None or self.fresh.shape[2] == 1:
            return self.fresh
        part_fresh = self.fresh[:, :, span]
        return part_fresh if part_fresh.any() else None


class _PartsWork(SpanWork):
    """The parts of a call one after another; the last arguments are the states `names`."""

    def __init__(self, parts: Parts, names: Sequence[str]) -> None:
        super().__init__(len(names), parts.tokens.counts[2])
        self._parts, self._names = parts, names

    def spans(self, arguments: Tensors) -> list[slice]:
        return self._parts.spans()

    def cut(self, arguments: Tensors, span: slice) -> list[Tensor]:
        return cut(self._parts.inputs, self._parts.tokens.having(arguments), span).real

    def run(self, parts: list[Tensor], states: Tensors, span: slice, known: Tensors | None) -> tuple[Tensors, Tensors]:
        tokens = cut(self._parts.inputs, self._parts.tokens, span).having(parts)
        out, last = self._parts.run(tokens, dict(zip(self._names, states, strict=True)), self._parts.fresh_of(span))
        return [out], [last[name] for name in self._names]

    def begun(self, states: Tensors) -> Tensors:
        wide = self._parts.wide
        return [x.double() if name in wide else x for name, x in zip(self._names, states, strict=True)]
