"""Build the plan of a call shape: specialise relations, group heads and batch entries, and choose covers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.analysis.pooled import pooled_keys
from attnc.compiler.ir import BOUNDARIES, Extent, Index, Lookup, Pattern, Truth
from attnc.compiler.ir.aggregates import counted
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.ir.value_nodes import (
    additive,
    is_plain,
    is_scored,
    passes,
)
from attnc.compiler.lowering.specialise import CallSizes, Slices, Window, reads_batch, reads_head, specialise
from attnc.compiler.planning.cpu_plan import ExactMask, GridMask, Group, Mask, Plan, PlanPiece, TileCounts, stretch
from attnc.compiler.planning.documents import Windows, alike, document_windows, packed_windows, whole, windows_of_ids
from attnc.compiler.planning.formulas import diagonal_shift
from attnc.compiler.planning.placing import ClosedWindows, Costs, Packs, closed_windows, cover_closed, pack, place
from attnc.compiler.planning.rates import AMX, PieceWork, Rates
from attnc.compiler.planning.schedule import CoverChoice, CoverProblem, choose, tile_sizes, visible_pairs

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class CallShape:
    """Everything besides the pattern on which a plan depends: lengths, counts, dtype, sizes by name, and input data.

    `shift`: the position of query 0; None: it follows from the lengths. Set where keys are not tokens.
    """

    n_q: int
    n_k: int
    batch: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    dtype: str
    sizes: Mapping[str, int]
    inputs: Mapping[str, NDArray[Any]]
    shift: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Local:
    """The windows that share one specialised relation."""

    windows: Windows
    relation: Index

    @property
    def name(self) -> Hashable:
        """A hashable value that is equal for equal windows with equal relations."""
        return self.relation, self.windows.contents


def is_ids_alone(pattern: Pattern) -> bool:
    """Whether documents are given by ids that no expression reads, so that only the runs of equal ids matter."""
    documents = pattern.documents
    if documents is None or BOUNDARIES in documents.dims:
        return False
    roots = [root for node in pattern.nodes for root in (node.visible, node.keys) if root is not None]
    roots += [condition for condition, _ in pattern.requirements]
    read = {node.tensor.name for root in roots for node in walk(root) if isinstance(node, Lookup)}
    return documents.name not in read and pattern.recur is None and not pattern.stateful and not pattern.selections


def conditions(pattern: Pattern, shape: CallShape, condition: Index) -> list[Index]:
    """Return a condition over sizes and inputs, specialised for every batch entry and head on which it depends."""
    by_batch = range(shape.batch) if reads_batch(pattern, condition) else [0]
    by_head = range(shape.heads) if reads_head(condition) else [0]
    window = whole(shape.n_q, shape.n_k, pattern.align)
    group, sizes, slices = (
        max(shape.heads // max(shape.kv_heads, 1), 1),
        CallSizes(shape.sizes),
        Slices(shape.inputs, shape.n_k),
    )
    return [
        specialise(condition, sizes, slices, window, batch=b, head=h, group=group) for b in by_batch for h in by_head
    ]


class Relations:
    """The relations of a call, specialised once for each batch entry and head whose relations may differ."""

    def __init__(self, pattern: Pattern, shape: CallShape) -> None:
        self.pattern = pattern
        self.shape = shape
        relation = pattern.attend.visible
        self.sizes = CallSizes(shape.sizes)
        self.slices = Slices(shape.inputs, shape.n_k)
        self._by_head = reads_head(relation)
        self._by_batch = reads_batch(pattern, relation)
        self._plain = not any(isinstance(n, Lookup) and _WINDOWED & set(n.tensor.dims) for n in walk(relation))
        self._reads_lengths = any(isinstance(n, Extent) and n.name in ("queries", "keys") for n in walk(relation))
        self._windows: dict[int, Windows] = {}
        self._wide: dict[tuple[Index, int, int], bool] = {}
        self._locals: dict[tuple[int, int, bool], tuple[_Local, ...]] = {}
        self._owners: dict[tuple[int, int], tuple[Windows, Int64]] = {}

    def settle(self) -> int:
        """Drop caches that only planning needs, and return the bytes of inputs that masks read."""
        self.slices.settle()
        return sum(0 if x.ndim and not any(x.strides) else x.nbytes for x in self.shape.inputs.values())

    def check_documents(self) -> None:
        """Find the documents.

        Raises DocumentsNotContiguousError where ids are not in contiguous runs, BoundariesError for wrong lengths.
        """
        documents = self.pattern.documents
        if documents is None:
            return
        for batch in range(self.shape.batch if self._by_batch else 1):
            self._batch_windows(batch)
        if is_ids_alone(self.pattern):  # the windows replace the ids, whose memory is released
            ids = self.shape.inputs[documents.name]
            blank = np.broadcast_to(np.zeros((), dtype=ids.dtype), ids.shape)
            self.shape = replace(self.shape, inputs={**self.shape.inputs, documents.name: blank})
            self.slices = Slices(self.shape.inputs, self.shape.n_k)

    def locals(self, batch: int, head: int, *, cut: bool = True) -> tuple[_Local, ...]:
        """Return the windows of a batch entry with their relations for a head.

        `cut`: also split windows at ids that the relation requires to be equal.
        """
        key = (batch if self._by_batch else 0, head if self._by_head else 0, cut)
        if key not in self._locals:
            self._locals[key] = self._find_locals(*key)
        return self._locals[key]

    def _find_locals(self, batch: int, head: int, cut: bool) -> tuple[_Local, ...]:
        """Return the windows grouped by relation, specialising once per size, or per shift if no length is read.

        `cut`: split a single window whose relation requires equal ids into one window for each id.
        """
        windows = self._batch_windows(batch)
        if len(windows) == 1:
            (window,) = windows
            relation = self._specialised(window, batch, head)
            id_windows = (
                windows_of_ids(relation, window.n_q, window.n_k) if cut and not (window.row or window.key) else None
            )
            return tuple(_Local(*part) for part in id_windows or [(windows, relation)])
        members: dict[Index, list[Int64]] = {}
        for numbers in self._groups_of_equal(windows):
            members.setdefault(self._specialised(_longest(windows.take(numbers)), batch, head), []).append(numbers)
        return tuple(_Local(windows.take(np.sort(np.concatenate(n))), relation) for relation, n in members.items())

    def _groups_of_equal(self, windows: Windows) -> list[Int64]:
        """Return groups of windows, by number, whose relations are certainly equal."""
        if not self._plain:
            return list(np.arange(len(windows))[:, None])
        return windows.by_size() if self._reads_lengths else alike(windows.shift)

    def windows(self, batch: int) -> Iterator[Window]:
        """Yield the windows of a batch entry."""
        yield from self._batch_windows(batch if self._by_batch else 0)

    def _batch_windows(self, batch: int) -> Windows:
        if batch not in self._windows:
            self._windows[batch] = self._find_windows(batch)
        return self._windows[batch]

    def _find_windows(self, batch: int) -> Windows:
        """Return the windows of a batch entry: its documents, or all tokens as one window."""
        documents, shape = self.pattern.documents, self.shape
        if documents is None:
            window = whole(shape.n_q, shape.n_k, self.pattern.align)
            return Windows.of(window if shape.shift is None else replace(window, shift=shape.shift))
        ids = shape.inputs[documents.name]
        if BOUNDARIES in documents.dims:
            return packed_windows(ids, shape.n_q, shape.n_k, self.pattern.align)
        row = ids[batch if ids.shape[0] > 1 else 0] if "batch" in documents.dims else ids
        return document_windows(row, shape.n_q, self.pattern.align)

    def _specialised(self, window: Window, batch: int, head: int) -> Index:
        group = max(self.shape.heads // max(self.shape.kv_heads, 1), 1)
        relation = self.pattern.attend.visible
        return specialise(relation, self.sizes, self.slices, window, batch=batch, head=head, group=group)

    def groups(self, *, cut: bool = True) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[_Local, ...]]]:
        """Return (batch entries, heads, windows with relations) for each group of heads with equal relations.

        A caller that ignores the windows must pass `cut=False`: a relation that was cut at equal ids no longer contains
        the condition that they are equal. Without documents there is then one window of all tokens.
        """
        batches = range(self.shape.batch) if self._by_batch else [0]
        heads = range(self.shape.heads) if self._by_head else [0]
        entries: dict[Hashable, tuple[list[int], list[int], tuple[_Local, ...]]] = {}
        for batch in batches:
            by_head: dict[Hashable, tuple[list[int], tuple[_Local, ...]]] = {}
            for head in heads:
                windows = self.locals(batch, head, cut=cut)
                by_head.setdefault(tuple(w.name for w in windows), ([], windows))[0].append(head)
            for name, (members, windows) in by_head.items():
                entry = entries.setdefault((name, tuple(members)), ([], members, windows))
                entry[0].append(batch)
        return [
            (
                tuple(group_batches) if self._by_batch else tuple(range(self.shape.batch)),
                tuple(group_heads) if self._by_head else tuple(range(self.shape.heads)),
                windows,
            )
            for group_batches, group_heads, windows in entries.values()
        ]

    def conditions(self, condition: Index) -> list[Index]:
        """Return a further condition, specialised for every batch entry and head of the call on which it depends."""
        return conditions(self.pattern, self.shape, condition)

    def mask(self, batch: int, head: int, row: int, row_stop: int, key: int, key_stop: int) -> Mask:
        """Return the relation on a rectangle of rows and keys of the call: bool (rows, keys)."""
        result = np.zeros((row_stop - row, key_stop - key), dtype=np.bool_)
        windows, owner = self._owner(batch, head)
        low = np.searchsorted(windows.row + windows.n_q, row, side="right")
        high = np.searchsorted(windows.row, row_stop)
        overlapping, owner = windows.take(np.arange(low, high)), owner[low:high]
        for number, local in enumerate(self.locals(batch, head)) if len(owner) else ():
            local_windows = overlapping.take(np.flatnonzero(owner == number))
            if len(local_windows):
                result |= self._local_mask(_Local(local_windows, local.relation), (row, row_stop), (key, key_stop))
        return result

    def _owner(self, batch: int, head: int) -> tuple[Windows, Int64]:
        """Return all windows sorted by row, and for each the index of its entry in `locals(batch, head)`."""
        name = (batch if self._by_batch else 0, head if self._by_head else 0)
        if name not in self._owners:
            local_parts = self.locals(*name)
            windows = Windows.joined([local.windows for local in local_parts])
            order = np.argsort(windows.row)
            owner = np.repeat(np.arange(len(local_parts)), [len(local.windows) for local in local_parts])
            self._owners[name] = windows.take(order), owner[order]
        return self._owners[name]

    def _local_mask(self, local: _Local, rows: tuple[int, int], keys: tuple[int, int]) -> Mask:
        """Return the relation of some windows on a rectangle of the call's rows and keys."""
        windows = local.windows
        row_windows, q = _inside(windows.row, windows.n_q, rows)
        key_windows, k = _inside(windows.key, windows.n_k, keys)
        active = (row_windows[:, None] == key_windows[None, :]) & (row_windows >= 0)[:, None]
        return exact_evaluation.mask_at(
            local.relation, q, k, active, self.pattern.origins, wide=self._is_wide(local.relation, windows)
        )

    def _is_wide(self, relation: Index, windows: Windows) -> bool:
        name = relation, int(windows.n_q.max()), int(windows.n_k.max())
        if name not in self._wide:
            self._wide[name] = not fits_word(relation, (0, name[1]), (0, name[2]))
        return self._wide[name]

    @property
    def exact_mask(self) -> ExactMask:
        """The method `mask`, as the callable that a plan holds."""
        return self.mask


Choose = Callable[[CoverProblem], CoverChoice]


@counted()
def build_plan(relations: Relations, choose: Choose = choose, rates: Rates = AMX) -> Plan:
    """Build the plan for the cpu executor; `choose` picks the cover of each relation, by costs at these rates.

    Raises EvaluationError if a relation faults, and DocumentsNotContiguousError.
    """
    return _Planner(relations, choose, rates).plan()


class _Planner:
    """Collects the groups, masks and counts of a plan over the distinct relations of a call."""

    def __init__(self, relations: Relations, choose: Choose, rates: Rates) -> None:
        self._relations = relations
        self._choose_cover = choose
        self._rates = rates
        self._shape = relations.shape
        self._choices: dict[tuple[object, ...], CoverChoice] = {}
        self._masks: list[GridMask] = []
        self._mask_at: dict[int, int] = {}
        self._counts = _Counts()

    def plan(self) -> Plan:
        shape = self._shape
        groups = []
        for batches, heads, windows in self._relations.groups():
            first, lanes = (batches[:1], heads[:1]), len(batches) * len(heads)
            pieces = [piece for local in windows for piece in self._pieces(local, lanes, first)]
            groups.append(Group(batches, heads, tuple(sorted(pieces, key=lambda p: not p.fresh))))
        counts = self._counts
        grid = max(counts.grids, key=lambda g: g.n_q * g.n_k, default=None)
        q_tile, k_tile = (grid.q_tile, grid.k_tile) if grid else (128, 128)
        return Plan(
            n_q=shape.n_q,
            n_k=shape.n_k,
            batch=shape.batch,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            q_tile=q_tile,
            k_tile=k_tile,
            tiles=counts.tiles(shape.n_q * shape.n_k * shape.batch * shape.heads, q_tile * k_tile),
            visible=counts.visible,
            groups=tuple(groups),
            masks=tuple(self._masks),
            executor="cpu",
            schedule="dense by row blocks" if counts.dense else "pieces",
            reasons=(*_scores(self._relations.pattern), *counts.reasons()),
            fallback=counts.fallback,
            exact_mask=self._relations.exact_mask,
            pattern=self._relations.pattern.name,
            data=self._relations.settle(),
        )

    def _pieces(self, local: _Local, lanes: int, first: tuple[tuple[int, ...], tuple[int, ...]]) -> Iterator[PlanPiece]:
        """Yield the pieces of all windows of a relation; `first`: a batch entry and head to evaluate masks for."""
        windows, relation = local.windows, local.relation
        if len(windows) > 1:
            windows = yield from self._joint_pieces(local, lanes, first)
        for numbers in windows.by_size():
            alike_windows = windows.take(numbers)
            choice = self._choose(relation, alike_windows, lanes)
            self._counts.add(choice, lanes * len(numbers))
            for piece in choice.cover.pieces:
                yield from place(self._with_mask(piece, choice), alike_windows)

    def _joint_pieces(
        self, local: _Local, lanes: int, first: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> Generator[PlanPiece, None, Windows]:
        """Yield the pieces of windows covered by packs and formulas, and return the remaining windows."""
        windows, relation = local.windows, local.relation
        packs = self._packs(local, lanes)
        if packs is not None:
            yield from self._packed_pieces(local, packs, lanes, first)
            windows = windows.take(packs.alone)
        closed = closed_windows(relation, windows)
        if len(closed) > 1:
            tile = tile_sizes(self._problem(relation, windows, lanes))[0]
            closed_cover = cover_closed(relation, windows.take(closed), tile)
            self._counts.add_closed(closed_cover, lanes)
            yield from closed_cover.pieces
            windows = windows.take(np.setdiff1d(np.arange(len(windows)), closed))
        return windows

    def _problem(self, relation: Index, windows: Windows, lanes: int) -> CoverProblem:
        """Return the problem of covering a relation over windows of one size."""
        shape = self._shape
        return CoverProblem(
            relation,
            int(windows.n_q.max()),
            int(windows.n_k.max()),
            shape.dtype,
            max(shape.dk, shape.dv),
            lanes,
            self._relations.pattern.origins,
            self._rates,
        )

    def _choose(self, relation: Index, windows: Windows, lanes: int) -> CoverChoice:
        problem = self._problem(relation, windows, lanes)
        key = (relation, problem.n_q, problem.n_k, lanes)
        if key not in self._choices:
            self._choices[key] = self._with_pairs(self._choose_cover(problem), problem)
        return self._choices[key]

    def _with_pairs(self, choice: CoverChoice, problem: CoverProblem) -> CoverChoice:
        """Return the choice with its visible pairs counted, where its tiles left them uncounted."""
        if choice.cover.visible is not None or choice.schedule != "pieces":
            return choice
        visible = visible_pairs(problem.relation, problem.n_q, problem.n_k, problem.origins)
        return choice if visible is None else replace(choice, cover=replace(choice.cover, visible=visible))

    def _packs(self, local: _Local, lanes: int) -> Packs | None:
        """Return packs of short documents, None if they are no cheaper than a piece for each document."""
        shape, relation = self._shape, local.relation
        document_mask: Literal["full", "causal"] | int = 0
        if isinstance(relation, Truth):
            document_mask = "full"
        elif diagonal_shift(relation) == 0:
            document_mask = "causal"
        nodes = sum(1 for _ in walk(relation)) + 1  # one more node compares the documents
        return pack(
            local.windows,
            Costs(self._rates, PieceWork(shape.dtype, max(shape.dk, shape.dv), lanes, nodes), document_mask),
        )

    def _packed_pieces(
        self, local: _Local, packs: Packs, lanes: int, first: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> Iterator[PlanPiece]:
        """Yield a masked piece for each pack; equal shared masks are stored once."""
        mask_numbers: dict[bytes, int] = {}
        visible = 0
        areas = list(zip(*(x.tolist() for x in packs.areas(local.windows)), strict=True))
        for row, row_stop, key, key_stop in areas:
            queries, keys = stretch(row, row_stop), stretch(key, key_stop)
            if packs.masks == "exact" or not (first[0] and first[1]):
                yield PlanPiece(queries, keys, "exact")
                continue
            mask = self._relations.mask(first[0][0], first[1][0], row, row_stop, key, key_stop)
            visible += int(mask.sum())
            name = repr(mask.shape).encode() + mask.tobytes()
            if name not in mask_numbers:
                mask_numbers[name] = self._index(GridMask((mask,)))
            yield PlanPiece(queries, keys, mask_numbers[name])
        self._counts.add_packs(areas, packs, visible if packs.masks == "shared" else None, lanes)

    def _with_mask(self, piece: PlanPiece, choice: CoverChoice) -> PlanPiece:
        """Return the piece with the index of its mask in the plan instead of in the cover."""
        if not isinstance(piece.mask, int):
            return piece
        number = self._index(choice.cover.masks[piece.mask])
        return piece if number == piece.mask else replace(piece, mask=number)

    def _index(self, mask: GridMask) -> int:
        """Return the index of a mask in the plan, to which it is added if it is new."""
        if id(mask) not in self._mask_at:
            self._mask_at[id(mask)] = len(self._masks)
            self._masks.append(mask)
        return self._mask_at[id(mask)]


def _scores(pattern: Pattern) -> tuple[str, ...]:
    """Return how an attention is computed, as a reason; nothing for a plain softmax of `scale * dot(q, k)`."""
    node = pattern.attend
    if is_plain(node):
        return ()
    if pooled_keys(node) is not None:
        return ("key vectors and values are computed once for all rows",)
    if not is_scored(node):
        number = passes(node)
        return (f"computed row by row in torch, in {number} pass{'es' if number > 1 else ''} over the keys of a row",)
    terms = additive(node.score)
    if terms is None:
        return ("scores are computed tile by tile in torch: they are more than a multiple of dot(q, k) plus a bias",)
    return (
        "the bias is passed as the kernel's mask"
        if terms.bias
        else "the kernel computes the scores; extra logits join at the end",
    )


class _Counts:
    """Totals of tiles, pairs and reasons over the covers of a plan."""

    def __init__(self) -> None:
        self.grids: list[TileGrid] = []
        self.dense = False
        self.fallback: str | None = None
        self.visible: int | None = 0
        self._full = self._partial = self._total = self._area = 0
        self._reasons: dict[str, None] = {}

    def add(self, choice: CoverChoice, times: int) -> None:
        """Count a choice `times` times."""
        self.grids.append(choice.grid)
        self.dense = self.dense or choice.schedule != "pieces"
        self.fallback = self.fallback or choice.fallback
        self._reasons.update(dict.fromkeys(choice.reasons))
        area = choice.grid.n_q * choice.grid.n_k
        self._add(
            (choice.cover.full_tiles, choice.cover.partial_tiles, choice.tiles, area), choice.cover.visible, times
        )

    def add_closed(self, closed: ClosedWindows, times: int) -> None:
        """Count windows covered by a formula `times` times."""
        self.grids.append(closed.grid)
        self._reasons[closed.reason] = None
        self._add((closed.full, closed.partial, closed.total, closed.area), closed.visible, times)

    def add_packs(self, areas: list[tuple[int, ...]], packs: Packs, visible: int | None, times: int) -> None:
        """Count packs as tiles of at most `packs.rows` rows and keys."""
        rows, keys = max(b - a for a, b, _, _ in areas), max(d - c for _, _, c, d in areas)
        self.grids.append(TileGrid(rows, keys, packs.rows, packs.rows))
        self._reasons[
            f"{len(areas)} packs of short documents, of at most {packs.rows} rows, with "
            f"{'shared masks' if packs.masks == 'shared' else 'masks evaluated as they run'}"
        ] = None
        tiles = sum(-(-(b - a) // packs.rows) * -(-(d - c) // packs.rows) for a, b, c, d in areas)
        self._add((0, tiles, tiles, sum((b - a) * (d - c) for a, b, c, d in areas)), visible, times)

    def _add(self, counts: tuple[int, int, int, int], visible: int | None, times: int) -> None:
        full, partial, total, area = (n * times for n in counts)
        self._full += full
        self._partial += partial
        self._total += total
        self._area += area
        self.visible = None if visible is None or self.visible is None else self.visible + visible * times

    def tiles(self, pairs: int, tile: int) -> TileCounts:
        """Return the tiles of all covers plus the tiles between documents, which are estimated from their area."""
        between = -(-(pairs - self._area) // tile)
        return TileCounts(self._total + between, self._full + self._partial, self._full, self._partial)

    def reasons(self) -> tuple[str, ...]:
        """Return the reasons for the covers, each once."""
        sizes = sorted({(grid.q_tile, grid.k_tile) for grid in self.grids})
        several = f"tiles of several sizes, each counted at its own size: {', '.join(f'{q}×{k}' for q, k in sizes)}"
        return (*([several] if len(sizes) > 1 else []), *self._reasons)


_WINDOWED = {"token", "query", "key"}


def _longest(windows: Windows) -> Window:
    """Return the first window extended to the longest, so that tables of its relation fit every window."""
    first = next(iter(windows))
    return replace(first, n_q=int(windows.n_q.max()), n_k=int(windows.n_k.max()))


def _inside(start: Int64, length: Int64, span: tuple[int, int]) -> tuple[Int64, Int64]:
    """Return the index of the window of each token in a span (-1: none), and the token's position in that window."""
    tokens = np.arange(*span, dtype=np.int64)
    window = np.searchsorted(start, tokens, side="right") - 1
    position = tokens - start[window]
    outside = (window < 0) | (position >= length[window])
    return np.where(outside, -1, window), np.where(outside, 0, position)
