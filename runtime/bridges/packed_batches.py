"""Packed sequences that the mask maker of Transformers does not see: read from what a layer's attention is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnc.runtime.bridges.model_masks import ModelMask, cumulative, refuse_packed_chunks
from attnc.runtime.call_errors import ArgumentError, UnsupportedError


def with_packing(mask: ModelMask, batch: int, options: Mapping[str, object]) -> ModelMask:
    """Return the mask with the sequences that `cu_seq_lens_q` or `position_ids` among `options` pack.

    Transformers reads position_ids only without an attention_mask and without a cache, so a mask of ones or an empty
    cache would lose the packing. Masks of encoders show all tokens whatever position_ids are, as in Transformers.

    Raises ArgumentError where packing and padding, or the two kinds of packing, contradict each other, and
    UnsupportedError for packing beside a cache that has keys, and for `cu_seq_lens_q` of several batch entries.
    """
    positions = _positions(mask, options.get("position_ids"))
    cumulative_lengths = options.get("cu_seq_lens_q")
    if cumulative_lengths is not None:
        return _by_lengths(mask, batch, torch.as_tensor(cumulative_lengths), options.get("cu_seq_lens_k"), positions)
    if positions is None or mask.sequences is not None or not mask.asked.causal:
        return mask
    key = id(positions)
    if key not in mask.by_positions:  # one mask serves many layers, which are given the same position_ids
        mask.by_positions[key] = positions, _by_positions(mask, batch, positions)
    sequences = mask.by_positions[key][1]
    return mask if sequences is None else replace(mask, sequences=sequences)


def _positions(mask: ModelMask, given: object) -> Tensor | None:
    """position_ids (batch or 1, queries) that may begin anew; None for one query, and for positions of several axes."""
    if isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] == mask.queries > 1:
        return given
    return None


def _by_positions(mask: ModelMask, batch: int, positions: Tensor) -> tuple[Tensor, ...] | None:
    """The cumulative lengths of each batch entry, None where no position begins anew."""
    begins = torch.diff(positions, dim=1, prepend=positions[:, :1] - 1) != 1
    if not bool(begins.any()):
        return None
    begins = begins.expand(batch, -1)
    if mask.shares is not None:
        _refuse_padding(mask, begins)
        return None
    _refuse_cache(mask, "position_ids that begin anew")
    refuse_packed_chunks(mask.asked)
    return tuple(map(cumulative, begins.cumsum(1)))


def _refuse_padding(mask: ModelMask, begins: Tensor) -> None:
    """Raise ArgumentError where positions begin anew among the tokens of an entry, apart from its padding."""
    for share in mask.shares or ():
        first = max(share.first - mask.stop + mask.queries, 0)
        within = begins[list(share.entries), first + 1 : max(share.stop - mask.stop + mask.queries, 0)]
        if bool(within.any()):
            entry = share.entries[int(within.any(1).nonzero()[0])]
            raise ArgumentError(
                f"batch entry {entry} has padding (attention_mask) and packs several sequences (position_ids begin "
                f"anew), which is not supported: leave the padding out, or give each sequence a batch entry"
            )


def _refuse_cache(mask: ModelMask, what: str) -> None:
    if mask.start or mask.queries != mask.stop:
        raise UnsupportedError(
            f"{what} beside a cache of {mask.stop - mask.queries} tokens: which of these belong to the same sequence "
            f"is not known; give each sequence a batch entry"
        )


def _by_lengths(mask: ModelMask, batch: int, lengths: Tensor, of_keys: object, positions: Tensor | None) -> ModelMask:
    """The sequences of `cu_seq_lens_q`, (sequences + 1,) from 0 to the tokens of one batch entry."""
    if batch != 1:
        raise UnsupportedError(
            f"`cu_seq_lens_q` with {batch} batch entries is not supported: flatten them into one, as "
            f"DataCollatorWithFlattening does, or give position_ids that begin anew and no attention_mask"
        )
    if of_keys is not None and not torch.equal(lengths, torch.as_tensor(of_keys).to(lengths)):
        raise UnsupportedError("`cu_seq_lens_k` differs from `cu_seq_lens_q`, which is not supported: give the same")
    if mask.shares is not None:
        raise ArgumentError("`cu_seq_lens_q` and an attention_mask with padding contradict: leave one of them out")
    _refuse_cache(mask, "`cu_seq_lens_q`")
    refuse_packed_chunks(mask.asked)
    own = mask.sequences if positions is None or mask.sequences is not None else _by_positions(mask, 1, positions)
    borders = lengths[:0] if own is None else own[0].to(lengths)
    strange = borders[~torch.isin(borders, lengths)].tolist()
    if strange:
        raise ArgumentError(
            f"position_ids begin anew at token {strange[0]}, where `cu_seq_lens_q` has no border: give position_ids "
            f"that begin anew with each sequence, or leave `cu_seq_lens_q` out"
        )
    return replace(mask, sequences=(lengths,))
