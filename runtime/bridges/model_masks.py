"""The mask that a Transformers model uses in a layer: its own pattern, padding, packing, and the start of a cache.

The model passes a function of positions to its attention's mask maker (`transformers.masking_utils`), composed from a
few known functions. attnc reads how it is composed and never calls it: no N × N mask is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.api.attention import Attention
from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError

MODULE = "transformers.masking_utils"


@dataclass(frozen=True)
class LayerMask:
    """The pairs that a layer's own mask shows, apart from padding and packing.

    `window`: the number of visible keys including the query's own if `causal`, else the distance to either side.
    `chunk`: the number of tokens of a block that sees only itself.
    """

    causal: bool
    window: int | None = None
    chunk: int | None = None

    @property
    def kind(self) -> str:
        """The name that Transformers uses for such layers in `config.layer_types`."""
        if self.chunk is not None:
            return "chunked_attention"
        return "full_attention" if self.window is None else "sliding_attention"

    @property
    def text(self) -> str:
        """The mask as the text of a pattern."""
        lines = ["k <= q"] if self.causal else []
        if self.window is not None:
            lines.append(f"q - k < {self.window}" if self.causal else f"abs(q - k) <= {self.window}")
        if self.chunk is not None:
            lines.append(f"q // {self.chunk} == k // {self.chunk}")
        return f"pattern own_mask\n    align   end\n    visible {' and '.join(lines) or 'true'}\n"

    @property
    def attention(self) -> Attention:
        """The mask as a compiled pattern."""
        return compile_attention(self.text)

    def __str__(self) -> str:
        parts = ["causal" if self.causal else "bidirectional"]
        if self.window is not None:
            parts.append(f"sliding_window {self.window}")
        if self.chunk is not None:
            parts.append(f"attention_chunk_size {self.chunk}")
        return ", ".join(parts)


@dataclass(frozen=True)
class BatchShare:
    """Batch entries whose tokens are in the columns `first .. stop`; their other columns are padding."""

    entries: tuple[int, ...]
    first: int
    stop: int


@dataclass(frozen=True)
class ModelMask:
    """A stand-in for a mask tensor: the last `queries` of the columns `start .. stop`, which have keys.

    `shares`: None without padding. `sequences`: the cumulative lengths of the sequences packed in each batch entry,
    None where each entry is one sequence.
    """

    layer_mask: LayerMask
    queries: int
    start: int
    stop: int
    shares: tuple[BatchShare, ...] | None = None
    sequences: tuple[Tensor, ...] | None = None
    by_positions: dict[int, tuple[Tensor, tuple[Tensor, ...] | None]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Sequences by the id of the position_ids that they come from; keeping the tensor keeps its id valid."""

    # `generate` reads this attribute of masks that it makes in advance for a cache of fixed size.
    ndim = 4

    def contiguous(self) -> ModelMask:
        """Return the mask unchanged."""
        return self


def read_mask(
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    batch: int,
    queries: int,
    q_offset: int | Tensor,
    kv_offset: int,
) -> ModelMask:
    """Return a layer's mask from the arguments of a mask maker; `attention_mask` (B, columns so far) of 0 and 1.

    Raises UnsupportedError for masks that cannot be compared with a pattern, ArgumentError for padding between tokens.
    """
    stop = int(q_offset) + queries
    layer_mask, packed = _read_mask_function(mask_function)
    mask = ModelMask(layer_mask, queries, int(kv_offset), stop)
    if packed is not None:
        return replace(mask, sequences=tuple(map(cumulative, packed.expand(batch, -1))))
    if attention_mask is None:
        return mask
    if attention_mask.shape[-1] < stop:
        raise ArgumentError(
            f"attention_mask has {attention_mask.shape[-1]} columns, expected {stop}: one for each token, including "
            f"the tokens in the cache"
        )
    return replace(mask, shares=_padding_groups(attention_mask[:, :stop].bool()))


def _padding_groups(real: Tensor) -> tuple[BatchShare, ...] | None:
    """Return the batch entries grouped by their padding, None without padding."""
    if bool(real.all()):
        return None
    count = real.sum(-1)
    first = real.int().argmax(-1)
    last = real.shape[1] - 1 - real.flip(-1).int().argmax(-1)
    gapped = torch.nonzero((count > 0) & (last - first + 1 != count)).flatten().tolist()
    if gapped:
        raise ArgumentError(
            f"attention_mask has zeros between the ones of batch entry {gapped[0]}: tokens must be contiguous, with "
            f"padding at the ends only; for `generate`, pad on the left (tokenizer.padding_side = 'left')"
        )
    entries_by_span: dict[tuple[int, int], list[int]] = {}
    for entry, (begin, n) in enumerate(zip(first.tolist(), count.tolist(), strict=True)):
        entries_by_span.setdefault((begin, begin + n), []).append(entry)
    return tuple(BatchShare(tuple(entries), *span) for span, entries in entries_by_span.items())


def cumulative(ids: Tensor) -> Tensor:
    """Return the cumulative lengths of sequences from each token's sequence number, (tokens,) in order."""
    lengths = torch.unique_consecutive(ids, return_counts=True)[1]
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


# --- reading how a mask function is composed ------------------------------------------------------------------------


def _read_mask_function(function: Callable[..., Any]) -> tuple[LayerMask, Tensor | None]:
    """Return the mask of a mask function, and the number of each token's sequence if several are packed."""
    causal, window, chunk, packed = False, None, None, None
    for name, closed_over in _leaves(function):
        match name:
            case "causal_mask_function":
                causal = True
            case "bidirectional_mask_function":
                pass
            case "sliding_window_overlay" | "sliding_window_bidirectional_overlay":
                window = int(closed_over["sliding_window"])
            case "chunked_overlay":
                chunk = int(closed_over["chunk_size"])
            case "packed_sequence_mask_function":
                packed = closed_over["packed_sequence_mask"]
            case _:
                raise UnsupportedError(
                    f"the model's own mask is made by `{name}`, which attnc cannot compare with a pattern: use another "
                    f"attn_implementation, such as 'sdpa'"
                )
    layer_mask = LayerMask(causal, window, chunk)
    if packed is not None:
        refuse_packed_chunks(layer_mask)
    return layer_mask, packed


def refuse_packed_chunks(layer_mask: LayerMask) -> None:
    """Raise UnsupportedError for packed sequences in a layer of chunks."""
    if layer_mask.chunk is not None:
        raise UnsupportedError(
            "packed sequences (position_ids) in a layer with chunked attention are not supported: use padding instead"
        )


def _leaves(function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the functions of Transformers that `and` joins, each with its name and the variables it closes over."""
    path = getattr(function, "__qualname__", repr(function))
    maker, closed_over = path.split(".")[0], _closed_over(function)
    in_transformers = getattr(function, "__module__", None) == MODULE
    if in_transformers and maker == "and_masks":
        for part in closed_over["mask_functions"]:
            yield from _leaves(part)
    elif in_transformers and maker == "remap_positions_for_packed_sequence":
        yield from _leaves(closed_over["mask_function"])
    else:
        yield (maker if in_transformers else path), closed_over


def _closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the variables that a function closes over, by name."""
    names = function.__code__.co_freevars if hasattr(function, "__code__") else ()
    return {n: cell.cell_contents for n, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True)}
