"""From a plan to kernel calls: which batch entries, heads and stretches go into one call, and where its rows lie.

The kernel takes two outer dimensions, a piece has three: batch entries, heads, stretches. Whichever two are chosen, a
call is a pair of `Block`s, and a block is a view of any tensor of that shape, whatever its strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

from attnc.compiler.planning.plan import Group, Piece, Plan, Strip
from attnc.runtime.settings import SETTINGS


class Axis(NamedTuple):
    """`size` entries, each so many batch entries, heads and tokens further."""

    size: int
    batch: int = 0
    head: int = 0
    token: int = 0


class View(NamedTuple):
    """Arguments of `as_strided`; `offset` is relative to the tensor's first element."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Block:
    """`x` × `y` stretches of `length` tokens, `stride` apart, the first at (batch, head, token)."""

    batch: int
    head: int
    token: int
    x: Axis
    y: Axis
    length: int
    stride: int = 1

    def view(self, strides: tuple[int, ...], width: int | None) -> View:
        """The block of a tensor (batch, head, token, width), or (batch, head, token) for width None."""
        b, h, t = strides[:3]
        offset = self.batch * b + self.head * h + self.token * t
        size: tuple[int, ...] = (self.x.size, self.y.size, self.length)
        outer = (a.batch * b + a.head * h + a.token * t for a in (self.x, self.y))
        stride: tuple[int, ...] = (*outer, t * self.stride)
        if width is None:
            return View(size, stride, offset)
        if self.length == 1:  # any stride will do for one token, but the kernel wants one that could be a row's
            stride = (*stride[:2], width)
        return View((*size, width), (*stride, 1), offset)


class ExactWindow(NamedTuple):
    """Arguments of `Plan.exact_mask`."""

    batch: int
    head: int
    row_start: int
    row_stop: int
    key_start: int
    key_stop: int


Mask: TypeAlias = "Literal['full', 'causal'] | int | ExactWindow"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the kernel. `fresh` as in `Piece`."""

    queries: Block
    keys: Block
    mask: Mask
    fresh: bool


@dataclass(frozen=True, slots=True)
class Add:
    """Part of a gradient for keys that goes to tokens met once: entries `x` and tokens `tokens` of it, to `block`.

    With `over_x` the entries of x lie on the same tokens and are summed first.
    """

    x: slice
    tokens: slice
    block: Block
    over_x: bool = False


class Run(NamedTuple):
    """Evenly spaced numbers."""

    start: int
    step: int
    size: int


class HeadRun(NamedTuple):
    """Evenly spaced query heads over evenly spaced key heads, the same number of query heads for each key head."""

    queries: Run
    keys: Run


class Pair(NamedTuple):
    """One dimension of a piece, as it runs through the queries and through the keys."""

    queries: Axis
    keys: Axis


def calls_of(plan: Plan, merged: bool) -> tuple[Call, ...]:
    """The calls of `plan`, in its order. `merged`: in every tensor, batch entry b + 1 starts one head after entry b."""
    _check(plan)
    return tuple(
        Call(queries, keys, mask, piece.fresh)
        for group in plan.groups
        for piece in group.pieces
        for heads in head_runs(group.heads, plan.heads // plan.kv_heads)
        for batches in batch_runs(group.batches)
        for part, mask in _parts(group, piece)
        for queries, keys in _blocks(part, heads, batches, merged and len(group.heads) == plan.heads)
    )


def _check(plan: Plan) -> None:
    """A view outside a tensor reads other memory without a word: be sure of the plan once."""
    for piece in (p for group in plan.groups for p in group.pieces if not _is_empty(p)):
        for strip, n in ((piece.queries, plan.n_q), (piece.keys, plan.n_k)):
            ends = (strip.start, strip.start + (strip.count - 1) * strip.step)
            assert min(ends) >= 0 and max(ends) + (strip.length - 1) * strip.stride < n, f"{strip} of {n} tokens"
        assert piece.queries.count == piece.keys.count, piece
        assert _apart(piece.queries.count, abs(piece.queries.step), piece.queries.length, piece.queries.stride), piece
        assert piece.mask != "causal" or piece.queries.length == piece.keys.length, piece


def _apart(count: int, step: int, length: int, stride: int) -> bool:
    """Whether stretches share no token: each ends before the next, or all lie between two tokens of the first."""
    return count <= 1 or step >= length * stride or 0 < step * count <= stride


def _is_empty(piece: Piece) -> bool:
    return min(piece.queries.count, piece.queries.length, piece.keys.length) <= 0


def head_runs(heads: tuple[int, ...], per_kv: int) -> Iterator[HeadRun]:
    """Cut `heads` into runs, each as long as it can be. `per_kv` query heads share a key head."""
    rest = tuple(sorted(heads))
    while rest:
        run = next(r for n in range(len(rest), 0, -1) if (r := _head_run(rest[:n], per_kv)))
        yield run
        rest = rest[run.queries.size :]


def _head_run(heads: tuple[int, ...], per_kv: int) -> HeadRun | None:
    kv = tuple(sorted({h // per_kv for h in heads}))
    each, left = divmod(len(heads), len(kv))
    if left or any(h // per_kv != kv[i // each] for i, h in enumerate(heads)):
        return None
    queries, keys = _run(heads), _run(kv)
    return HeadRun(queries, keys) if queries and keys else None


def batch_runs(batches: tuple[int, ...]) -> Iterator[Run]:
    """Cut `batches` into runs, each as long as it can be."""
    rest = tuple(sorted(batches))
    while rest:
        run = next(r for n in range(len(rest), 0, -1) if (r := _run(rest[:n])))
        yield run
        rest = rest[run.size :]


def _run(numbers: tuple[int, ...]) -> Run | None:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 0
    even = all(b - a == step for a, b in pairwise(numbers))
    return Run(numbers[0], step, len(numbers)) if even else None


def _parts(group: Group, piece: Piece) -> Iterator[tuple[Piece, Mask]]:
    """The piece in parts that a strided view can express and whose mask is bounded; nothing where it is empty."""
    queries, keys = piece.queries, piece.keys
    if _is_empty(piece) or not group.batches or not group.heads:
        return
    if piece.mask != "exact" and min(queries.step, keys.step) >= 0:
        yield piece, piece.mask
        return
    for i in range(queries.count):
        rows, row, key = queries.length, queries.start + i * queries.step, keys.start + i * keys.step
        columns = Strip(key, 0, 1, keys.length)
        if piece.mask != "exact":
            row_strip = Strip(row, 0, 1, rows, queries.stride)
            yield replace(piece, queries=row_strip, keys=replace(columns, stride=keys.stride)), piece.mask
            continue
        chunk = max(1, SETTINGS.exact_elements // keys.length)
        for r in range(row, row + rows, chunk):
            stop = min(r + chunk, row + rows)
            window = ExactWindow(group.batches[0], group.heads[0], r, stop, key, key + keys.length)
            yield replace(piece, queries=Strip(r, 0, 1, stop - r), keys=columns), window


def _blocks(piece: Piece, heads: HeadRun, batches: Run, flat: bool) -> Iterator[tuple[Block, Block]]:
    """The blocks of queries and keys of as few calls as possible: two dimensions go in, the third is looped over.

    `flat`: batch entries and heads (all of them) may be counted as one dimension.
    """
    one = Pair(Axis(1), Axis(1))
    tile = Pair(*(Axis(s.count, token=s.step) for s in (piece.queries, piece.keys)))
    head = Pair(*(Axis(r.size, head=r.step) for r in heads))
    batch = Pair(*(Axis(batches.size, batch=batches.step),) * 2)
    choices = [(tile, head, batch), (batch, head, tile)]
    if heads.queries.size == heads.keys.size:
        choices.append((tile, batch, head))
    if flat and batches.step == 1:
        choices.append((tile, Pair(*(Axis(batches.size * r.size, head=1) for r in heads)), one))
    x, y, loop = min(choices, key=lambda c: c[2].queries.size)
    for i in range(loop.queries.size):
        yield (
            _block(piece.queries, heads.queries, batches, Pair(x.queries, y.queries), loop.queries, i),
            _block(piece.keys, heads.keys, batches, Pair(x.keys, y.keys), loop.keys, i),
        )


def _block(strip: Strip, heads: Run, batches: Run, xy: tuple[Axis, Axis], loop: Axis, i: int) -> Block:
    return Block(
        batches.start + i * loop.batch,
        heads.start + i * loop.head,
        strip.start + i * loop.token,
        *xy,
        strip.length,
        strip.stride,
    )


def adds_of(keys: Block) -> tuple[Add, ...]:
    """The parts in which the gradient of `keys` is added: within a part no token is met twice."""
    everything = Add(slice(None), slice(None), keys)
    x = keys.x
    if x.batch or x.head or _apart(x.size, x.token, keys.length, keys.stride):
        return (everything,)
    if x.token == 0:
        return (replace(everything, block=replace(keys, x=Axis(1)), over_x=True),)
    shift, between = divmod(x.token, keys.stride)
    if between or x.size <= -(-keys.length // shift):
        return tuple(
            Add(slice(i, i + 1), slice(None), replace(keys, token=keys.token + i * x.token, x=Axis(1)))
            for i in range(x.size)
        )
    return tuple(
        Add(slice(None), slice(c, stop), replace(keys, token=keys.token + c * keys.stride, length=stop - c))
        for c in range(0, keys.length, shift)
        for stop in (min(c + shift, keys.length),)
    )
