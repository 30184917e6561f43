"""The tensors of a recurrence call, its documents, and cuts of the call into runs of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import Index, Pattern, Recur, Value, fold
from attnc.compiler.lowering.specialise import CallSizes, Slices
from attnc.compiler.planning.documents import Windows
from attnc.compiler.recurrences.call_constants import BY_TOKEN
from attnc.runtime.planning.plans import documents_of_call
from attnc.spec.source import Span

TOKEN = fold.place("q")
"""The token's own position."""


@dataclass(frozen=True)
class CallTokens:
    """The tensors of one call: q (B, H, T, dk); k and v with kv heads, or with one head per head of q once `computed`.

    `inputs`: the floating-point inputs by name. `before`: the number of tokens before the call, for each batch entry or
    one number for all. `constants`: precomputed values that are the same for all tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Mapping[str, Tensor]
    sizes: CallSizes
    slices: Slices
    scale: float
    group: int
    origins: Mapping[Index, Span]
    before: tuple[int, ...] = (0,)
    constants: Mapping[Value, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, int, int]:
        """The sizes (batch, heads, tokens)."""
        b, h, t, _ = self.q.shape
        return b, h, t

    @property
    def real(self) -> list[Tensor]:
        """The differentiable tensors: q, k, v, the floating-point inputs and the constants."""
        return [self.q, self.k, self.v, *self.inputs.values(), *self.constants.values()]

    def having(self, real: Sequence[Tensor]) -> CallTokens:
        """Return the call with its tensors replaced; `real` has the order of the property `real`."""
        q, k, v, *others = real
        inputs = dict(zip(self.inputs, others, strict=False))
        constants = dict(zip(self.constants, others[len(inputs) :], strict=True))
        return replace(self, q=q, k=k, v=v, inputs=inputs, constants=constants)

    def computed(self) -> CallTokens:
        """Return the call in fp32, or in fp64 for fp64 queries, with keys and values repeated for grouped heads."""
        dtype = computed_in(self.q.dtype)
        dtypes = [dtype.to_complex() if x.is_complex() else dtype for x in self.real]
        q, k, v, *others = (x.to(target) for x, target in zip(self.real, dtypes, strict=True))
        if self.group > 1:
            k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        return self.having([q, k, v, *others])


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values are computed for queries of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Arrays = Mapping[str, NDArray[Any]]


def documents_of(pattern: Pattern, inputs: Arrays, count: int) -> list[Windows] | None:
    """Return the documents of each batch entry, or one list for all; None without documents. Raises ArgumentError."""
    documents = pattern.documents
    return None if documents is None else documents_of_call(pattern, inputs[documents.name], count, count)


def first_tokens(documents: list[Windows], count: int) -> NDArray[np.bool_]:
    """Return a mask of the first tokens of documents, (B or 1, 1, T)."""
    fresh = np.zeros((len(documents), 1, count), dtype=np.bool_)
    for row, windows in zip(fresh, documents, strict=True):
        row[0, windows.key] = True
    return fresh


def reads_later_tokens(recur: Recur) -> bool:
    """Check whether results depend on later tokens: by a `scan` order, or a line that reads the number of tokens."""
    lengths = (n for root in _roots(recur) for n in root.below if isinstance(n, ir.Extent))
    return recur.order is not None or any(n.name in ("queries", "keys") for n in lengths)


def reads_positions(recur: Recur) -> bool:
    """Check whether results depend on the positions of tokens, not only on their order."""
    cache: dict[Index, bool] = {}
    return reads_later_tokens(recur) or any(_reads_position(root, cache) for root in _roots(recur))


def _roots(recur: Recur) -> list[Any]:
    """Return every expression of a recurrence."""
    ends = [end for step in recur.steps if step.repeat is not None for end in step.repeat[1:]]
    clauses = [node for node in (recur.order, recur.reset) if node is not None]
    return [recur.read, *(step.value for step in recur.steps), *ends, *clauses]


def _reads_position(node: Index, cache: dict[Index, bool]) -> bool:
    if node not in cache:
        cache[node] = node is TOKEN or any(_reads_position(child, cache) for child in _index_operands(node))
    return cache[node]


def _index_operands(node: Any) -> Iterator[Index]:
    """Yield the indices that a node reads, except the token's own position in inputs by token."""
    match node:
        case ir.Vec(at=at):
            yield from () if at is TOKEN else (at,)
        case ir.Element(tensor=tensor, indices=indices) | ir.Lookup(tensor=tensor, indices=indices):
            for dim, index in zip(tensor.dims, indices, strict=False):
                if not (dim in BY_TOKEN and index is TOKEN):
                    yield index
        case _:
            yield from node.children()


def cut(inputs: Sequence[ir.Tensor], tokens: CallTokens, span: slice, entries: slice = slice(None)) -> CallTokens:
    """Return the tokens `span` of the batch entries `entries` as a call that continues after the tokens before them."""
    named = {tensor.name: tensor for tensor in inputs}
    arrays = {name: x[_slices(named[name], x.shape, entries, span)] for name, x in tokens.slices.tensors.items()}
    real = {name: x[_slices(named[name], x.shape, entries, span)] for name, x in tokens.inputs.items()}
    count = span.stop - span.start
    before = tokens.before if len(tokens.before) == 1 else tokens.before[entries]
    return replace(
        tokens,
        q=tokens.q[entries, :, span],
        k=tokens.k[entries, :, span],
        v=tokens.v[entries, :, span],
        inputs=real,
        sizes=CallSizes({**tokens.sizes.values, "queries": count, "keys": count}),
        slices=Slices(arrays),
        before=tuple(count_before + span.start for count_before in before),
    )


def _slices(tensor: ir.Tensor, shape: tuple[int, ...], entries: slice, span: slice) -> tuple[slice, ...]:
    """Return the slices that cut an input of `shape` to some batch entries and tokens."""
    return tuple(
        (entries if size > 1 else slice(None)) if dim == "batch" else span if dim in BY_TOKEN else slice(None)
        for dim, size in zip(tensor.dims, shape, strict=True)
    )
