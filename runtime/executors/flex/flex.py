"""Make the arguments of FlexAttention, mask_mod, score_mod and BlockMask, from the relation and score of a call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attnc.compiler.analysis.live_tiles import LiveTiles, TileGrid, find_live_tiles
from attnc.compiler.ir import VALUES, Apply, Element, FloatSelect, Index, Number, Pattern, Ratio, Value
from attnc.compiler.ir.rewrite import replace_values
from attnc.compiler.ir.value_nodes import apply, dot, element, number, rank, vector
from attnc.compiler.ir.value_nodes import scale as factor
from attnc.compiler.lowering.specialise import reads_batch, reads_head
from attnc.compiler.passes.pointwise import NotPointwiseError, Pointwise, pointwise, pointwise_value
from attnc.compiler.planning.build_plan import CallShape, Relations
from attnc.compiler.planning.runs import MAX_CLASS_ELEMENTS, TooManyClassesError, resolve
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.executors.flex.torch_tape import SCORE, MaskMod, ScoreMod, write_mask_mod, write_score_mod
from attnc.runtime.values.functions import FUNCTIONS

HIDDEN, PARTIAL, FULL = 0, 1, 2
"""States of a block of pairs."""

States = NDArray[np.int8]


def make_mask_mod(pattern: Pattern, shape: CallShape, device: torch.device | str) -> MaskMod:
    """Return the relation of a call as a FlexAttention mask_mod; the tables that it reads are on `device`.

    `documents` must have been removed from `pattern`. Raises UnsupportedError.
    """
    return write_mask_mod(_pointwise("mask_mod", pattern, shape), device)


def make_score_mod(
    pattern: Pattern, shape: CallShape, scale: float | None, inputs: Mapping[str, Tensor], device: torch.device | str
) -> ScoreMod:
    """Return the score of a call as a FlexAttention score_mod, whose argument is `scale * dot(q, k)`.

    `scale`: the factor that FlexAttention applies, needed where the pattern reads the product or the scale by itself.
    `inputs`: the real inputs. Raises UnsupportedError, ArgumentError.
    """
    value = _score_value(pattern, scale)
    try:
        lengths = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        return write_score_mod(pointwise_value(pattern, shape, value, lengths), device, inputs)
    except NotPointwiseError as error:
        raise UnsupportedError(f"score_mod: `{pattern.name}` has {error}; call the pattern itself") from error


def _score_value(pattern: Pattern, scale: float | None) -> Value:
    """Return the score of a pattern as a value of `SCORE`. Raises UnsupportedError, ArgumentError."""
    score, (q, k) = element(SCORE, ()), (vector("q"), vector("k"))
    products = [dot(q, k), dot(k, q)]
    scaled = [apply("mul", *pair) for product in products for pair in ((factor(), product), (product, factor()))]
    value = replace_values(pattern.attend.score, dict.fromkeys(scaled, score))
    if scale == 0:
        raise ArgumentError(
            "scale is 0: the scores of flex_attention then contain nothing of dot(q, k); use another scale"
        )
    factor_value = 1.0 if scale is None else scale
    unscaled = score if factor_value == 1 else apply("div", score, number(factor_value))
    replaced = replace_values(value, {**dict.fromkeys(products, unscaled), factor(): number(factor_value)})
    _check_pairwise(pattern, replaced)
    if replaced is not value and scale is None:
        raise UnsupportedError(
            f"score_mod: the score of `{pattern.name}` reads more than `scale * dot(q, k)`; pass the scale=… that "
            f"flex_attention will get, or 1.0 if the pattern uses none"
        )
    return replaced


def _check_pairwise(pattern: Pattern, score: Value) -> None:
    """Raise UnsupportedError for a score with more than numbers, functions of numbers, and entries of inputs."""
    for part in score.below:
        is_pairwise = isinstance(part, _PAIRWISE) and not (isinstance(part, Apply) and part.op not in FUNCTIONS)
        if isinstance(part, VALUES) and (not is_pairwise or rank(part)):
            raise UnsupportedError(
                f"score_mod: `{pattern.name}` has a score of vectors or of sums over keys, which a score_mod cannot "
                f"compute from a pair's score; call the pattern itself"
            )


_PAIRWISE = (Number, Ratio, Element, Apply, FloatSelect)


def make_block_mask(
    pattern: Pattern, shape: CallShape, block: tuple[int, int], device: torch.device | str
) -> BlockMask:
    """Return the relation of a call as a FlexAttention BlockMask with blocks of (queries, keys).

    Its batch size and its number of heads are 1 where the relation does not depend on the batch entry or the head. As
    in `create_block_mask`, blocks that reach past the last token are partial. Raises UnsupportedError, and
    EvaluationError where the relation cannot be evaluated.
    """
    condition = _pointwise("block_mask", pattern, shape)
    states = block_states(pattern, shape, block)
    kv, full_kv, q, full_q = (
        _marked_columns_first(marked, device)
        for oriented in (states, states.swapaxes(-1, -2))
        for marked in (oriented == PARTIAL, oriented == FULL)
    )
    return BlockMask(
        seq_lengths=(shape.n_q, shape.n_k),
        kv_num_blocks=kv[0],
        kv_indices=kv[1],
        full_kv_num_blocks=full_kv[0],
        full_kv_indices=full_kv[1],
        q_num_blocks=q[0],
        q_indices=q[1],
        full_q_num_blocks=full_q[0],
        full_q_indices=full_q[1],
        BLOCK_SIZE=block,
        mask_mod=write_mask_mod(condition, device),
    )


def _pointwise(result: str, pattern: Pattern, shape: CallShape) -> Pointwise:
    try:
        return pointwise(pattern, shape)
    except NotPointwiseError as error:
        raise UnsupportedError(
            f"{result}: `{pattern.name}` has {error}, which FlexAttention would compute for every pair; call the "
            f"pattern itself, or use `sdpa_mask` with SDPA"
        ) from error


def block_states(pattern: Pattern, shape: CallShape, block: tuple[int, int]) -> States:
    """Return the state of each block, full, partial or empty: (batch or 1, heads or 1, rows, columns).

    The states come from the live tiles; the mask is evaluated once for each translation class of partial tiles.
    """
    relations = Relations(pattern, shape)
    relation = pattern.attend.visible
    batches = shape.batch if reads_batch(pattern, relation) else 1
    heads = shape.heads if reads_head(relation) else 1
    grid = TileGrid(shape.n_q, shape.n_k, *block)
    states = np.zeros((batches, heads, grid.rows, grid.columns), dtype=np.int8)
    states_of_relation: dict[Index, States] = {}
    for batch_entries, group_heads, (local,) in relations.groups(cut=False):
        if local.relation not in states_of_relation:
            states_of_relation[local.relation] = _relation_states(local.relation, grid, pattern)
        index = np.ix_(batch_entries if batches > 1 else (0,), group_heads if heads > 1 else (0,))
        states[index] = states_of_relation[local.relation]
    return states


def _relation_states(relation: Index, grid: TileGrid, pattern: Pattern) -> States:
    live_tiles = find_live_tiles(relation, grid, budget=max(1 << 21, 8 * grid.rows * grid.columns))
    states = np.zeros((grid.rows, grid.columns), dtype=np.int8)
    for tiles in _resolved_tiles(relation, live_tiles, pattern):
        within = np.arange(tiles.count.sum()) - np.repeat(np.cumsum(tiles.count) - tiles.count, tiles.count)
        row, column = np.repeat(tiles.row, tiles.count), np.repeat(tiles.column, tiles.count) + within
        states[row, column] = np.where(np.repeat(tiles.kind == 0, tiles.count), FULL, PARTIAL)
    if grid.n_q % grid.q_tile:
        states[-1:] = np.minimum(states[-1:], PARTIAL)
    if grid.n_k % grid.k_tile:
        states[:, -1:] = np.minimum(states[:, -1:], PARTIAL)
    return states


def _resolved_tiles(relation: Index, tiles: LiveTiles, pattern: Pattern) -> Iterator[LiveTiles]:
    """Yield the tiles after evaluating each partial tile or an equal one, in portions where most are unlike."""
    try:
        yield resolve(relation, tiles, pattern.origins).tiles
    except TooManyClassesError:
        portion = max(MAX_CLASS_ELEMENTS // (tiles.grid.q_tile * tiles.grid.k_tile), 1)
        for first in range(0, len(tiles.row), portion):
            part = tiles.take(np.arange(first, min(first + portion, len(tiles.row))))
            yield resolve(relation, part, pattern.origins).tiles


def _marked_columns_first(marked: NDArray[np.bool_], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return each row's number of marked columns, (batch, heads, rows), and its columns, marked ones first; int32."""
    rank_in_row = np.cumsum(marked, axis=-1, dtype=np.int32)
    columns = np.zeros(marked.shape, dtype=np.int32)
    batch, head, row, column = np.nonzero(marked)
    columns[batch, head, row, rank_in_row[marked] - 1] = column
    count = marked.sum(-1, dtype=np.int32)
    return torch.from_numpy(count).to(device), torch.from_numpy(columns).to(device)


def read_block_size(block_size: object) -> tuple[int, int]:
    """Return the queries and keys of a block. Raises ArgumentTypeError, ArgumentError."""
    sizes = tuple(block_size) if isinstance(block_size, Sequence) else (block_size, block_size)
    if len(sizes) != 2 or not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise ArgumentTypeError(f"block_size is {block_size!r}: it must be a whole number or a pair (queries, keys)")
    q_block, k_block = (int(size) for size in sizes)
    if min(q_block, k_block) < 1:
        raise ArgumentError(f"block_size is {block_size!r}: it must be at least 1")
    return q_block, k_block
