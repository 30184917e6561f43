"""Work with a gradient of its own under torch's autograd; differentiable once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from attnc.runtime.executors.cpu.autograd import FirstOrder, once
from attnc.runtime.process.profiling import backward_row, keep_name

Tensors = Sequence[Tensor]


class RecordedWork(Protocol):
    """The forward and backward pass of some work, not recorded by autograd."""

    @property
    def keeps(self) -> int:
        """The number of the last results of `forward` that only the backward pass needs."""

    @property
    def reuses(self) -> bool:
        """Whether the backward pass needs the other results too, after those."""

    def forward(self, tensors: Sequence[Any]) -> Tensors:
        """Compute the results, none of which shares memory with an argument."""

    def backward(
        self, tensors: Sequence[Any], kept: Tensors, grads: Tensors, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of the arguments, from those of the results and what `forward` kept."""


def recorded(work: RecordedWork, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the results of `work` under autograd, without those that only its backward pass needs."""
    results = _Recorded.apply(work, *tensors)  # type: ignore[no-untyped-call]
    return list(results[: len(results) - work.keeps])


class _Recorded(FirstOrder):
    """The work under autograd."""

    @staticmethod
    def forward(work: RecordedWork, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(work.forward(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.work = inputs[0]
        ctx.count = len(output) - ctx.work.keeps
        keep_name(ctx)
        ctx.save_for_backward(*inputs[1:], *output[ctx.count :], *(output[: ctx.count] if ctx.work.reuses else ()))
        ctx.mark_non_differentiable(*output[ctx.count :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (ctx.work, tuple(ctx.needs_input_grad[1:]), ctx.count, *grads[: ctx.count], *ctx.saved_tensors)
        with backward_row(ctx):
            return (None, *once(_gradients, *arguments))


def _gradients(work: RecordedWork, needed: Sequence[bool], count: int, *tensors: Any) -> tuple[Tensor | None, ...]:
    grads, arguments, kept = tensors[:count], tensors[count : count + len(needed)], tensors[count + len(needed) :]
    return tuple(work.backward(arguments, kept, grads, needed))


_KEEPING: ContextVar[bool] = ContextVar("whether the backward pass follows at once", default=False)


@contextmanager
def keeping() -> Iterator[None]:
    """Within this context, a forward pass keeps intermediates for the backward pass that follows at once."""
    token = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(token)


def is_keeping() -> bool:
    """Check whether forward passes keep intermediates for their backward pass."""
    return _KEEPING.get()


class SpanWork(ABC):
    """Work on the tokens of a call in spans, one after another, from the states that the span before has left.

    The arguments are any tensors, then `count` states. The intermediates of a span are dropped after it. The backward
    pass keeps the arguments and the states between spans; it recomputes each span, and differentiates it by autograd
    (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).
    """

    reuses = False

    def __init__(self, count: int, tokens: int, spare: Tensor | None = None) -> None:
        """`spare`: an argument whose memory results may take."""
        self._count, self._tokens, self.spare = count, tokens, spare
        self._ran: list[slice] = []

    @abstractmethod
    def spans(self, arguments: Tensors) -> Iterable[slice]:
        """Return the tokens of each span, in order; each is requested after the span before has run."""

    @abstractmethod
    def cut(self, arguments: Tensors, span: slice) -> list[Tensor]:
        """Return views of the arguments for the tokens of a span."""

    @abstractmethod
    def run(self, parts: list[Tensor], states: Tensors, span: slice, known: Tensors | None) -> tuple[Tensors, Tensors]:
        """Compute (results (B, H, tokens, …), the states after the span).

        `known`: None in the forward pass; in the backward pass, recorded by autograd, the results if it `reuses` them.
        """

    def begun(self, states: Tensors) -> Tensors:
        """Return the states in the dtypes that they have between spans."""
        return states

    @property
    def keeps(self) -> int:
        """The number of states between spans."""
        return self._count * (len(self._ran) - 1)

    def forward(self, tensors: Tensors) -> list[Tensor]:
        """Compute the results of all tokens, the states after them, and the states between spans."""
        arguments, states = tensors[: len(tensors) - self._count], tensors[len(tensors) - self._count :]
        current, kept, outs = self.begun(states), list[Tensor](), list[Tensor]()
        self._ran = []
        for span in self.spans(arguments):
            kept += current if self._ran else []
            self._ran.append(span)
            results, current = self.run(self.cut(arguments, span), current, span, None)
            if span == slice(0, self._tokens):
                outs = [self._own(x, arguments) for x in results]
                break
            outs = outs or [x.new_empty(*x.shape[:2], self._tokens, *x.shape[3:]) for x in results]
            for out, x in zip(outs, results, strict=True):
                out[:, :, span] = x
        ends = [self._own(x.to(before.dtype), states) for x, before in zip(current, states, strict=True)]
        return [*outs, *ends, *kept]

    def backward(
        self, tensors: Tensors, kept: Tensors, grads: Tensors, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Compute the gradients, from the last span to the first."""
        arguments, states = tensors[: len(tensors) - self._count], tensors[len(tensors) - self._count :]
        d_outs, d_states = grads[: len(grads) - self._count], grads[len(grads) - self._count :]
        kept, known = kept[: self.keeps], kept[self.keeps :][: len(d_outs)]
        befores = [self.begun(states), *(kept[i : i + self._count] for i in range(0, len(kept), max(self._count, 1)))]
        is_cut = [x.shape != y.shape for x, y in zip(arguments, self.cut(arguments, self._ran[0]), strict=True)]
        wide = [torch.promote_types(x.dtype, torch.float32) for x in arguments]
        totals: list[Tensor | None] = [
            torch.empty_like(x, dtype=dtype) if cut and need else None
            for x, dtype, cut, need in zip(arguments, wide, is_cut, needed, strict=False)
        ]
        for span, before in reversed(list(zip(self._ran, befores, strict=True))):
            pairs = zip(self.cut(arguments, span), needed, strict=False)
            parts, starts = [x.detach().requires_grad_(need) for x, need in pairs], [x.detach() for x in before]
            for x in starts:
                x.requires_grad_()
            with torch.enable_grad(), keeping():
                outs, ends = self.run(parts, starts, span, [x[:, :, span] for x in known])
            roots = [*zip(outs, (d[:, :, span] for d in d_outs), strict=True), *zip(ends, d_states, strict=True)]
            wanted = [i for i, x in enumerate(parts) if x.requires_grad]
            d_states, gradients = _differentiated(roots, starts, [parts[i] for i in wanted])
            targets = self.cut([x if y is None else y for x, y in zip(arguments, totals, strict=True)], span)
            for i, d in zip(wanted, gradients, strict=True):
                total = totals[i]
                if is_cut[i]:
                    targets[i].copy_(torch.zeros_like(targets[i]) if d is None else d)
                elif d is not None:
                    totals[i] = d.to(wide[i]) if total is None else total + d
        found = zip(totals, arguments, needed, strict=False)
        d_arguments = [(torch.zeros_like(x) if y is None else y.to(x.dtype)) if need else None for y, x, need in found]
        return [*d_arguments, *(d.to(x.dtype) for d, x in zip(d_states, states, strict=True))]

    def _own(self, x: Tensor, arguments: Tensors) -> Tensor:
        """Return a result with memory of its own."""
        memory = {y.untyped_storage().data_ptr() for y in arguments}
        if self.spare is not None:
            memory.discard(self.spare.untyped_storage().data_ptr())
        is_own = x.is_contiguous() and x.untyped_storage().data_ptr() not in memory
        return x if is_own else x.clone(memory_format=torch.contiguous_format)


def _differentiated(
    roots: Sequence[tuple[Tensor, Tensor]], starts: Tensors, wanted: Tensors
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """Return the gradients of the states before a span, and of its tensors, None where results do not depend on one."""
    pairs = [(x, d.to(x.dtype)) for x, d in roots if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in starts], [None] * len(wanted)
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        [x for x, _ in pairs], [*starts, *wanted], [d for _, d in pairs], allow_unused=True
    )
    d_starts = zip(starts, gradients, strict=False)
    return [torch.zeros_like(x) if d is None else d for x, d in d_starts], gradients[len(starts) :]
