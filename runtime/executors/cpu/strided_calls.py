"""Kernel calls of a plan: the batch entries, heads and stretches of each call, and the views of its rows.

The kernel takes two outer dimensions, a piece has three: batch entries, heads, stretches. For any choice of two, a call
is a pair of `StripBlock`s, and a block is a view of any tensor of that shape, whatever its strides; if a stretch is a
brick of a grid, the view has more dimensions than the kernel takes and is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import prod
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from attnc.compiler.planning.cpu_plan import Group, Plan, PlanPiece, Strip, StripAxis, stretch
from attnc.runtime.settings import SETTINGS


class StridedAxis(NamedTuple):
    """`size` entries, spaced by `batch` batch entries and `head` heads."""

    size: int
    batch: int = 0
    head: int = 0


class StridedView(NamedTuple):
    """Arguments of `as_strided`; `offset` is relative to the tensor's first element.

    `shape`: the shape for the kernel, (x, y, rows[, width]); None if `size` has that shape. `whole`: the view is the
    tensor itself.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    shape: tuple[int, ...] | None = None
    whole: bool = False

    def at(self, x: Tensor) -> Tensor:
        """Return the tokens as a view."""
        return x if self.whole else x.as_strided(self.size, self.stride, self.offset + x.storage_offset())

    def rows(self, x: Tensor) -> Tensor:
        """Return the tokens as the kernel takes them: copied if no strides express them."""
        rows = self.at(x)
        return rows if self.shape is None else rows.reshape(self.shape)

    def like(self, rows: Tensor) -> Tensor:
        """Return the kernel's rows in the dimensions of `at`."""
        return rows if self.shape is None else rows.reshape(self.size)

    def put(self, x: Tensor, tokens: Tensor) -> None:
        """Do nothing: `at` is a view."""

    def add(self, x: Tensor, tokens: Tensor) -> None:
        """Add values in the dimensions of `at`."""
        self.at(x).add_(tokens)


@dataclass(frozen=True, slots=True)
class StripBlock:
    """The stretches of `strip`, whose token 0 is at (batch, head, 0), for each entry of `outer` and of `y`.

    x runs through `outer`, then the stretches.
    """

    batch: int
    head: int
    strip: Strip
    outer: StridedAxis
    y: StridedAxis

    @property
    def rows(self) -> int:
        """Number of tokens, counted for every batch entry and head."""
        return self.outer.size * self.y.size * self.strip.count * self.strip.length

    def view(self, strides: tuple[int, ...], width: int | None) -> StridedView:
        """Return the block of a tensor (batch, head, token, width), or (batch, head, token) for width None."""
        b, h, t = strides[:3]
        offset = self.batch * b + self.head * h + self.strip.start * t
        y = (self.y.size, self.y.batch * b + self.y.head * h)
        x = [(self.outer.size, self.outer.batch * b + self.outer.head * h)]
        x += [(axis.count, axis.step * t) for axis in self.strip.axes]
        x = [(size, stride) for size, stride in x if size > 1] or x[:1]
        rows = [(axis.length, axis.stride * t) for axis in self.strip.axes if axis.length > 1]
        if not rows:  # any stride is valid for one token, but the kernel requires a possible row stride
            rows = [(1, t if width is None else width)]
        shape: tuple[int, ...] = (self.outer.size * self.strip.count, y[0], self.strip.length)
        dims = [*x, y, *rows]
        if width is not None:
            dims.append((width, 1))
            shape = (*shape, width)
        size, stride = zip(*dims, strict=True)
        return StridedView(size, stride, offset, None if size == shape else shape)


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
class KernelCall:
    """One call of the kernel. `fresh` as in `PlanPiece`."""

    queries: StripBlock
    keys: StripBlock
    mask: Mask
    fresh: bool


@dataclass(frozen=True, slots=True)
class Add:
    """A part of a gradient for keys that is added to distinct tokens, at `block`.

    The gradient is viewed as `size` (outer, stretches by axis, y, tokens by axis, width); the part is its slice `at`,
    summed over the dimensions `over`, whose entries lie on the same tokens.
    """

    size: tuple[int, ...]
    at: tuple[slice, ...]
    over: tuple[int, ...]
    block: StripBlock


class EvenRun(NamedTuple):
    """Evenly spaced numbers."""

    start: int
    step: int
    size: int


class HeadRun(NamedTuple):
    """Evenly spaced query heads over evenly spaced kv heads, the same number of query heads for each kv head."""

    queries: EvenRun
    keys: EvenRun


def calls_of(plan: Plan, merged: bool) -> tuple[KernelCall, ...]:
    """Return the calls of `plan`, in order. `merged`: in every tensor, entry b + 1 starts one head after entry b."""
    _check(plan)
    return tuple(
        KernelCall(queries, keys, mask, piece.fresh)
        for group in plan.groups
        for piece in group.pieces
        for heads in head_runs(group.heads, plan.heads // plan.kv_heads)
        for batches in batch_runs(group.batches)
        for part, mask in _parts(group, piece)
        for queries, keys in _blocks(part, heads, batches, merged and len(group.heads) == plan.heads)
    )


def _check(plan: Plan) -> None:
    """Check the plan once: a view outside a tensor silently reads other memory."""
    for piece in (p for group in plan.groups for p in group.pieces if not _is_empty(p)):
        for strip, n in ((piece.queries, plan.n_q), (piece.keys, plan.n_k)):
            for axis in strip.axes:
                assert min(axis.length, axis.stride) > 0 and axis.step * (axis.count - 1) >= 0, strip
            assert strip.start >= 0 and strip.last < n, f"{strip} of {n} tokens"
        assert [a.count for a in piece.queries.axes] == [a.count for a in piece.keys.axes], piece
        assert all(axis.apart for axis in piece.queries.axes), piece
        assert piece.mask != "causal" or piece.queries.length == piece.keys.length, piece


def _is_empty(piece: PlanPiece) -> bool:
    return min(piece.queries.count, piece.queries.length, piece.keys.length) <= 0


def head_runs(heads: tuple[int, ...], per_kv: int) -> Iterator[HeadRun]:
    """Cut `heads` into runs, each as long as possible. `per_kv` query heads share a kv head."""
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


def batch_runs(batches: tuple[int, ...]) -> Iterator[EvenRun]:
    """Cut `batches` into runs, each as long as possible."""
    rest = tuple(sorted(batches))
    while rest:
        run = next(r for n in range(len(rest), 0, -1) if (r := _run(rest[:n])))
        yield run
        rest = rest[run.size :]


def _run(numbers: tuple[int, ...]) -> EvenRun | None:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 0
    even = all(b - a == step for a, b in pairwise(numbers))
    return EvenRun(numbers[0], step, len(numbers)) if even else None


def _parts(group: Group, piece: PlanPiece) -> Iterator[tuple[PlanPiece, Mask]]:
    """Yield the piece in parts whose mask has a bounded size; nothing for an empty piece."""
    if _is_empty(piece) or not group.batches or not group.heads:
        return
    if piece.mask != "exact":
        yield piece, piece.mask
        return
    assert piece.queries.is_plain and piece.keys.is_plain, piece
    rows, keys = piece.queries.length, stretch(0, piece.keys.length)
    chunk = max(1, SETTINGS.exact_elements // piece.keys.length)
    for row, key in zip(piece.queries.starts().tolist(), piece.keys.starts().tolist(), strict=True):
        for r in range(row, row + rows, chunk):
            stop = min(r + chunk, row + rows)
            window = ExactWindow(group.batches[0], group.heads[0], r, stop, key, key + keys.length)
            yield replace(piece, queries=stretch(r, stop), keys=keys.moved(key)), window


def _blocks(piece: PlanPiece, heads: HeadRun, batches: EvenRun, flat: bool) -> Iterator[tuple[StripBlock, StripBlock]]:
    """Yield the blocks of queries and keys of as few calls as possible.

    `flat`: all heads and batch entries may be counted as one dimension.
    """
    queries, keys = piece.queries.flat(), piece.keys.flat()
    if queries is None or keys is None:
        yield from _gathered(piece, heads, batches)
        return
    yield from _viewed(queries, keys, heads, batches, flat and batches.step == 1)


def _viewed(
    queries: Strip, keys: Strip, heads: HeadRun, batches: EvenRun, flat: bool
) -> Iterator[tuple[StripBlock, StripBlock]]:
    """Yield blocks that are views: a call takes two of stretches, heads and batch entries; the third is looped over."""
    single, entries = StridedAxis(1), StridedAxis(batches.size, batch=batches.step)
    y_queries, y_keys = (StridedAxis(r.size, head=r.step) for r in heads)
    head, key_head = heads.queries.start, heads.keys.start
    count = queries.count
    if flat:
        q_axis, k_axis = (StridedAxis(batches.size * r.size, head=1) for r in heads)
        yield (
            StripBlock(batches.start, head, queries, single, q_axis),
            StripBlock(batches.start, key_head, keys, single, k_axis),
        )
    elif batches.size > count:
        for i in range(count):
            q_one, k_one = _one(queries, i), _one(keys, i)
            yield (
                StripBlock(batches.start, head, q_one, entries, y_queries),
                StripBlock(batches.start, key_head, k_one, entries, y_keys),
            )
    elif heads.queries.size == heads.keys.size < batches.size:
        for i in range(heads.queries.size):
            yield (
                StripBlock(batches.start, head + i * heads.queries.step, queries, single, entries),
                StripBlock(batches.start, key_head + i * heads.keys.step, keys, single, entries),
            )
    else:
        for i in range(batches.size):
            batch = batches.start + i * batches.step
            yield StripBlock(batch, head, queries, single, y_queries), StripBlock(batch, key_head, keys, single, y_keys)


def _one(strip: Strip, i: int) -> Strip:
    """Return stretch i of a strip along one axis."""
    (axis,) = strip.axes
    return Strip(strip.start + i * axis.step, (replace(axis, step=0, count=1),))


def _gathered(piece: PlanPiece, heads: HeadRun, batches: EvenRun) -> Iterator[tuple[StripBlock, StripBlock]]:
    """Yield blocks of bricks of a grid, which are copied: as many in one call as the memory limit allows."""
    y_queries, y_keys = (StridedAxis(r.size, head=r.step) for r in heads)
    for i in range(batches.size):
        batch = batches.start + i * batches.step
        room = SETTINGS.gathered_tokens // (max(piece.keys.length, piece.queries.length) * heads.keys.size)
        for part in _bricks(piece, max(room, 1)):
            yield (
                StripBlock(batch, heads.queries.start, part.queries, StridedAxis(1), y_queries),
                StripBlock(batch, heads.keys.start, part.keys, StridedAxis(1), y_keys),
            )


def _bricks(piece: PlanPiece, max_stretches: int, axis: int = 0) -> Iterator[PlanPiece]:
    """Yield the piece cut along its axes from `axis` on, into parts of at most `max_stretches` stretches."""
    if piece.queries.count <= max_stretches:
        yield piece
        return
    inside = prod(a.count for a in piece.queries.axes[axis + 1 :])
    chunk, count = max(1, max_stretches // inside), piece.queries.axes[axis].count
    for first in range(0, count, chunk):
        part_count = min(chunk, count - first)
        part = replace(
            piece,
            queries=_some(piece.queries, axis, first, part_count),
            keys=_some(piece.keys, axis, first, part_count),
        )
        yield from _bricks(part, max_stretches, axis + 1)


def _some(strip: Strip, axis: int, first: int, count: int) -> Strip:
    """Return `count` of the stretches along an axis, from number `first` on."""
    steps = strip.axes[axis]
    axes = (*strip.axes[:axis], replace(steps, count=count), *strip.axes[axis + 1 :])
    return Strip(strip.start + first * steps.step, axes)


def adds_of(keys: StripBlock) -> tuple[Add, ...]:
    """Return the parts in which the gradient of `keys` is added: within a part all tokens are distinct."""
    axes = keys.strip.axes
    size = (keys.outer.size, *(a.count for a in axes), keys.y.size, *(a.length for a in axes), -1)
    adds = []
    for parts in product(*map(_disjoint, axes)):
        entries, tokens = tuple(p.entries for p in parts), tuple(p.tokens for p in parts)
        start = keys.strip.start + sum(p.start for p in parts)
        block = replace(keys, strip=Strip(start, tuple(p.steps for p in parts)))
        over = tuple(i + 1 for i, p in enumerate(parts) if p.summed)
        adds.append(Add(size, (slice(None), *entries, slice(None), *tokens), over, block))
    return tuple(adds)


class _AxisPart(NamedTuple):
    """Stretches and tokens of an axis that do not overlap, or that all overlap and are summed."""

    entries: slice
    tokens: slice
    start: int
    steps: StripAxis
    summed: bool = False


def _disjoint(axis: StripAxis) -> list[_AxisPart]:
    """Split an axis into parts without overlap."""
    everything = slice(None)
    if axis.apart:
        return [_AxisPart(everything, everything, 0, axis)]
    if axis.step == 0:
        return [_AxisPart(everything, everything, 0, replace(axis, count=1), summed=True)]
    shift, between = divmod(axis.step, axis.stride)
    if between or axis.count <= -(-axis.length // shift):
        single = replace(axis, step=0, count=1)
        return [_AxisPart(slice(i, i + 1), everything, i * axis.step, single) for i in range(axis.count)]
    return [
        _AxisPart(everything, slice(c, c + n), c * axis.stride, replace(axis, length=n))
        for c in range(0, axis.length, shift)
        for n in (min(shift, axis.length - c),)
    ]
