"""Packed sequences that the mask maker of Transformers does not get: read from the arguments of a layer's attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnc.runtime.bridges.model_masks import ModelMask, cumulative, refuse_packed_chunks
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError


def with_packing(mask: ModelMask, batch: int, options: Mapping[str, object]) -> ModelMask:
    """Return the mask with the sequences that `cu_seq_lens_q` or `position_ids` among `options` pack.

    Transformers reads position_ids only without an attention_mask and without a cache, so that a mask of ones or an
    empty cache would lose the packing. Masks of encoders show all tokens whatever position_ids are, as in Transformers.

    Raises ArgumentError where packing and padding, or the two kinds of packing, contradict each other, and
    UnsupportedError for packing with a cache that has keys, and for `cu_seq_lens_q` with several batch entries.
    """
    positions = _restarting_positions(mask, options.get("position_ids"))
    cumulative_lengths = options.get("cu_seq_lens_q")
    if cumulative_lengths is not None:
        return _with_cumulative_lengths(
            mask, batch, torch.as_tensor(cumulative_lengths), options.get("cu_seq_lens_k"), positions
        )
    if positions is None or mask.sequences is not None or not mask.layer_mask.causal:
        return mask
    key = id(positions)
    if key not in mask.by_positions:  # one mask serves many layers, with the same position_ids
        mask.by_positions[key] = positions, _sequences_of_positions(mask, batch, positions)
    sequences = mask.by_positions[key][1]
    return mask if sequences is None else replace(mask, sequences=sequences)


def _restarting_positions(mask: ModelMask, position_ids: object) -> Tensor | None:
    """Return position_ids (batch or 1, queries) if they may restart: several queries and one axis of positions."""
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and position_ids.shape[1] == mask.queries > 1:
        return position_ids
    return None


def _sequences_of_positions(mask: ModelMask, batch: int, positions: Tensor) -> tuple[Tensor, ...] | None:
    """Return the cumulative lengths of each batch entry, None where no position restarts."""
    restarts = torch.diff(positions, dim=1, prepend=positions[:, :1] - 1) != 1
    if not bool(restarts.any()):
        return None
    restarts = restarts.expand(batch, -1)
    if mask.shares is not None:
        _refuse_padding(mask, restarts)
        return None
    _refuse_cache(mask, "position_ids that restart")
    refuse_packed_chunks(mask.layer_mask)
    return tuple(map(cumulative, restarts.cumsum(1)))


def _refuse_padding(mask: ModelMask, restarts: Tensor) -> None:
    """Raise ArgumentError where positions restart among the tokens of a batch entry, not only in its padding."""
    for share in mask.shares or ():
        first = max(share.first - mask.stop + mask.queries, 0)
        within = restarts[list(share.entries), first + 1 : max(share.stop - mask.stop + mask.queries, 0)]
        if bool(within.any()):
            entry = share.entries[int(within.any(1).nonzero()[0])]
            raise ArgumentError(
                f"batch entry {entry} has both padding (attention_mask) and packed sequences (position_ids "
                f"restart), which is not supported: remove the padding, or give each sequence its own batch entry"
            )


def _refuse_cache(mask: ModelMask, what: str) -> None:
    if mask.start or mask.queries != mask.stop:
        raise UnsupportedError(
            f"{what} with a cache of {mask.stop - mask.queries} tokens is not supported, because it is unknown to "
            f"which sequence the cached tokens belong; give each sequence its own batch entry"
        )


def _with_cumulative_lengths(
    mask: ModelMask, batch: int, lengths: Tensor, key_lengths: object, positions: Tensor | None
) -> ModelMask:
    """Return the mask with the sequences of `cu_seq_lens_q`, (sequences + 1,) from 0 to the number of tokens."""
    if batch != 1:
        raise UnsupportedError(
            f"`cu_seq_lens_q` with {batch} batch entries is not supported: flatten them into one, as "
            f"DataCollatorWithFlattening does, or pass position_ids that restart and no attention_mask"
        )
    if key_lengths is not None and not torch.equal(lengths, torch.as_tensor(key_lengths).to(lengths)):
        raise UnsupportedError(
            "`cu_seq_lens_k` differs from `cu_seq_lens_q`, which is not supported: use the same lengths for both"
        )
    if mask.shares is not None:
        raise ArgumentError(
            "`cu_seq_lens_q` and an attention_mask with padding contradict each other: use one or the other"
        )
    _refuse_cache(mask, "`cu_seq_lens_q`")
    refuse_packed_chunks(mask.layer_mask)
    position_sequences = (
        mask.sequences
        if positions is None or mask.sequences is not None
        else _sequences_of_positions(mask, 1, positions)
    )
    borders = lengths[:0] if position_sequences is None else position_sequences[0].to(lengths)
    unmatched = borders[~torch.isin(borders, lengths)].tolist()
    if unmatched:
        raise ArgumentError(
            f"position_ids restart at token {unmatched[0]}, where `cu_seq_lens_q` has no border: pass position_ids "
            f"that restart with each sequence, or omit `cu_seq_lens_q`"
        )
    return replace(mask, sequences=(lengths,))
