"""The mask that a Transformers model asks of a layer: its own pattern, padding, packing, the begin of a cache.

The model hands a function of positions to its attention's mask maker (`transformers.masking_utils`), built by joining a
few known ones. It is read for what it was made of, and never called: no N × N mask is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.attention import Attention, compile_attention
from attnc.runtime.call_errors import ArgumentError, UnsupportedError

MODULE = "transformers.masking_utils"


@dataclass(frozen=True)
class LayerMask:
    """The pairs that a layer's own mask shows, but for padding and packing. `window`: keys, the query's own included,
    or, unless `causal`, the distance to either side. `chunk`: tokens of a block that sees nothing but itself.
    """

    causal: bool
    window: int | None = None
    chunk: int | None = None

    @property
    def kind(self) -> str:
        """As Transformers calls such layers in `config.layer_types`."""
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
    """Batch entries whose tokens are those of the columns `first .. stop`; the others are padding."""

    entries: tuple[int, ...]
    first: int
    stop: int


@dataclass(frozen=True)
class ModelMask:
    """A stand-in for a mask tensor: the last `queries` of the columns `start .. stop`, which have keys.

    `shares`: None without padding. `sequences`: the cumulative lengths of the sequences that a batch entry packs, None
    where it is one.
    """

    asked: LayerMask
    queries: int
    start: int
    stop: int
    shares: tuple[BatchShare, ...] | None = None
    sequences: tuple[Tensor, ...] | None = None
    by_positions: dict[int, tuple[Tensor, tuple[Tensor, ...] | None]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Sequences by the id of the position_ids that they are read from, which are kept so that the id stays theirs."""

    # What `generate` asks of a mask that it made in advance, for a cache of fixed size.
    ndim = 4

    def contiguous(self) -> ModelMask:
        """Itself."""
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

    Raises UnsupportedError for masks that no pattern stands beside, ArgumentError for padding amid tokens.
    """
    stop = int(q_offset) + queries
    asked, packed = _read(mask_function)
    mask = ModelMask(asked, queries, int(kv_offset), stop)
    if packed is not None:
        return replace(mask, sequences=tuple(map(cumulative, packed.expand(batch, -1))))
    if attention_mask is None:
        return mask
    if attention_mask.shape[-1] < stop:
        raise ArgumentError(
            f"attention_mask has {attention_mask.shape[-1]} columns, and there are {stop} tokens with those in the "
            f"cache: give it a column for each"
        )
    return replace(mask, shares=_shares(attention_mask[:, :stop].bool()))


def _shares(real: Tensor) -> tuple[BatchShare, ...] | None:
    """The batch entries with the same padding, None without any."""
    if bool(real.all()):
        return None
    count = real.sum(-1)
    first = real.int().argmax(-1)
    last = real.shape[1] - 1 - real.flip(-1).int().argmax(-1)
    torn = torch.nonzero((count > 0) & (last - first + 1 != count)).flatten().tolist()
    if torn:
        raise ArgumentError(
            f"attention_mask has zeros between the ones of batch entry {torn[0]}: tokens must stand together, padding "
            f"on one side of them; for `generate` pad on the left (tokenizer.padding_side = 'left')"
        )
    found: dict[tuple[int, int], list[int]] = {}
    for entry, (begin, n) in enumerate(zip(first.tolist(), count.tolist(), strict=True)):
        found.setdefault((begin, begin + n), []).append(entry)
    return tuple(BatchShare(tuple(entries), *span) for span, entries in found.items())


def cumulative(ids: Tensor) -> Tensor:
    """Numbers of sequences, (tokens,) in order, as cumulative lengths."""
    lengths = torch.unique_consecutive(ids, return_counts=True)[1]
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


# --- reading what a mask function was made of ------------------------------------------------------------------------


def _read(function: Callable[..., Any]) -> tuple[LayerMask, Tensor | None]:
    """Return the mask of a mask function, and the number of each token's sequence where several are packed."""
    causal, window, chunk, packed = False, None, None, None
    for name, held in _leaves(function):
        match name:
            case "causal_mask_function":
                causal = True
            case "bidirectional_mask_function":
                pass
            case "sliding_window_overlay" | "sliding_window_bidirectional_overlay":
                window = int(held["sliding_window"])
            case "chunked_overlay":
                chunk = int(held["chunk_size"])
            case "packed_sequence_mask_function":
                packed = held["packed_sequence_mask"]
            case _:
                raise UnsupportedError(
                    f"the model's own mask is made by `{name}`, which no pattern can be held against: use another "
                    f"attn_implementation for it, such as 'sdpa'"
                )
    asked = LayerMask(causal, window, chunk)
    if packed is not None:
        refuse_packed_chunks(asked)
    return asked, packed


def refuse_packed_chunks(asked: LayerMask) -> None:
    """Raise UnsupportedError for packed sequences in a layer of chunks."""
    if asked.chunk is not None:
        raise UnsupportedError(
            "packed sequences (position_ids) in a layer of chunks are not supported: pad them instead"
        )


def _leaves(function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The functions of Transformers that all must hold, by name, with what each closes over."""
    path = getattr(function, "__qualname__", repr(function))
    maker, held = path.split(".")[0], _held(function)
    known = getattr(function, "__module__", None) == MODULE
    if known and maker == "and_masks":
        for part in held["mask_functions"]:
            yield from _leaves(part)
    elif known and maker == "remap_positions_for_packed_sequence":
        yield from _leaves(held["mask_function"])
    else:
        yield (maker if known else path), held


def _held(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the variables that a function closes over, by name."""
    names = function.__code__.co_freevars if hasattr(function, "__code__") else ()
    return {n: cell.cell_contents for n, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True)}
