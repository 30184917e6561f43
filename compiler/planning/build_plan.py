"""The plan of one call shape: relations specialised, heads and batch entries that share one grouped, covers chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.ir import Index, Lookup, Pattern
from attnc.compiler.lowering.specialise import Sizes, Slices, Window, reads_batch, reads_head, specialise
from attnc.compiler.planning.documents import document_windows, whole
from attnc.compiler.planning.pieces import join_pieces
from attnc.compiler.planning.plan import ExactMask, GridMask, Group, Mask, Piece, Plan, TileCounts
from attnc.compiler.planning.rates import AMX, Rates
from attnc.compiler.planning.schedule import Choice, Problem, choose
from attnc.compiler.rewrite import walk


@dataclass(frozen=True)
class CallShape:
    """What a plan depends on besides the pattern: lengths, counts, dtype, sizes by name, and the inputs' data."""

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
    rates: Rates = AMX


@dataclass(frozen=True, slots=True)
class _Local:
    """A window with its relation."""

    window: Window
    relation: Index


class Relations:
    """The relation of every batch entry and head of a call, specialised once for each that differs."""

    def __init__(self, pattern: Pattern, shape: CallShape) -> None:
        self.pattern = pattern
        self.shape = shape
        relation = pattern.attend.visible
        self._sizes = Sizes(shape.sizes)
        self._slices = Slices(shape.inputs)
        self._by_head = reads_head(relation)
        self._by_batch = reads_batch(pattern, relation)
        self._plain = not any(isinstance(n, Lookup) for n in walk(relation))
        self._windows: dict[int, tuple[Window, ...]] = {}
        self._known: dict[tuple[object, ...], Index] = {}
        self._wide: dict[Index, bool] = {}
        self._locals: dict[tuple[int, int], tuple[_Local, ...]] = {}

    def check_documents(self) -> None:
        """Raise DocumentsNotContiguousError where the ids of a batch entry are not in contiguous runs."""
        if self.pattern.documents is not None:
            for batch in range(self.shape.batch if self._by_batch else 1):
                self._windows_of(batch)

    def locals(self, batch: int, head: int) -> tuple[_Local, ...]:
        """The windows of a batch entry with their relations for a head."""
        key = (batch if self._by_batch else 0, head if self._by_head else 0)
        if key not in self._locals:
            self._locals[key] = tuple(_Local(w, self._specialised(w, *key)) for w in self._windows_of(key[0]))
        return self._locals[key]

    def _windows_of(self, batch: int) -> tuple[Window, ...]:
        if batch not in self._windows:
            self._windows[batch] = self._find_windows(batch)
        return self._windows[batch]

    def _find_windows(self, batch: int) -> tuple[Window, ...]:
        documents, shape = self.pattern.documents, self.shape
        if documents is None:
            return (whole(shape.n_q, shape.n_k, self.pattern.align),)
        ids = shape.inputs[documents.name]
        row = ids[batch if ids.shape[0] > 1 else 0] if "batch" in documents.dims else ids
        return document_windows(row, shape.n_q, self.pattern.align)

    def _specialised(self, window: Window, batch: int, head: int) -> Index:
        key: tuple[object, ...] = (window, batch, head)
        if self._plain:
            key = (window.n_q, window.n_k, window.shift, batch, head)
        if key not in self._known:
            group = max(self.shape.heads // max(self.shape.kv_heads, 1), 1)
            relation = self.pattern.attend.visible
            self._known[key] = specialise(
                relation, self._sizes, self._slices, window, batch=batch, head=head, group=group
            )
        return self._known[key]

    def groups(self) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[_Local, ...]]]:
        """(batch entries, heads, windows with relations): heads whose relations are equal stand together."""
        batches = range(self.shape.batch) if self._by_batch else [0]
        heads = range(self.shape.heads) if self._by_head else [0]
        found: dict[tuple[object, ...], tuple[list[int], list[int], tuple[_Local, ...]]] = {}
        for batch in batches:
            by_head: dict[tuple[_Local, ...], list[int]] = {}
            for head in heads:
                by_head.setdefault(self.locals(batch, head), []).append(head)
            for windows, members in by_head.items():
                entry = found.setdefault((windows, tuple(members)), ([], members, windows))
                entry[0].append(batch)
        return [
            (
                tuple(b) if self._by_batch else tuple(range(self.shape.batch)),
                tuple(h) if self._by_head else tuple(range(self.shape.heads)),
                windows,
            )
            for b, h, windows in found.values()
        ]

    def conditions(self, condition: Index) -> list[Index]:
        """Another condition over the sizes and inputs of the call, for every batch entry and head that differ."""
        by_batch = range(self.shape.batch) if reads_batch(self.pattern, condition) else [0]
        by_head = range(self.shape.heads) if reads_head(condition) else [0]
        window = whole(self.shape.n_q, self.shape.n_k, self.pattern.align)
        group = max(self.shape.heads // max(self.shape.kv_heads, 1), 1)
        return [
            specialise(condition, self._sizes, self._slices, window, batch=b, head=h, group=group)
            for b in by_batch
            for h in by_head
        ]

    def mask(self, batch: int, head: int, row: int, row_stop: int, key: int, key_stop: int) -> Mask:
        """The relation on rows and keys of the call: bool (rows, keys)."""
        result = np.zeros((row_stop - row, key_stop - key), dtype=np.bool_)
        for local in self.locals(batch, head):
            w = local.window
            r0, r1 = max(row, w.row), min(row_stop, w.row + w.n_q)
            k0, k1 = max(key, w.key), min(key_stop, w.key + w.n_k)
            if r0 < r1 and k0 < k1:
                inside = exact.mask(
                    local.relation,
                    (r0 - w.row, r1 - w.row),
                    (k0 - w.key, k1 - w.key),
                    self.pattern.origins,
                    wide=self._is_wide(local),
                )
                result[r0 - row : r1 - row, k0 - key : k1 - key] = inside
        return result

    def _is_wide(self, local: _Local) -> bool:
        if local.relation not in self._wide:
            window = local.window
            self._wide[local.relation] = not fits_word(local.relation, (0, window.n_q), (0, window.n_k))
        return self._wide[local.relation]

    @property
    def exact_mask(self) -> ExactMask:
        """`mask` as the plan wants it."""
        return self.mask


Choose = Callable[[Problem], Choice]


def build_plan(relations: Relations, choose: Choose = choose) -> Plan:
    """The plan for the cpu executor; `choose` picks the cover of each relation.

    Raises EvaluationError where the relation faults, DocumentsNotContiguousError.
    """
    return _Planner(relations, choose).plan()


class _Planner:
    """Collects groups, masks and counts over the distinct relations of a call."""

    def __init__(self, relations: Relations, choose: Choose) -> None:
        self._relations = relations
        self._choose_cover = choose
        self._shape = relations.shape
        self._choices: dict[tuple[object, ...], Choice] = {}
        self._masks: list[GridMask] = []
        self._mask_at: dict[int, int] = {}

    def plan(self) -> Plan:
        shape = self._shape
        groups: list[Group] = []
        chosen: list[tuple[Choice, int]] = []
        for batches, heads, windows in self._relations.groups():
            lanes = len(batches) * len(heads)
            choices = [self._choose(local, lanes) for local in windows]
            chosen.extend((choice, lanes) for choice in choices)
            groups.append(Group(batches, heads, self._pieces(windows, choices)))
        grid = max((c.grid for c, _ in chosen), key=lambda g: g.n_q * g.n_k, default=None)
        q_tile, k_tile = (grid.q_tile, grid.k_tile) if grid else (128, 128)
        dense = any(choice.schedule != "pieces" for choice, _ in chosen)
        return Plan(
            n_q=shape.n_q,
            n_k=shape.n_k,
            batch=shape.batch,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            q_tile=q_tile,
            k_tile=k_tile,
            tiles=_counts(chosen, shape, q_tile, k_tile),
            visible=_visible(chosen),
            groups=tuple(groups),
            masks=tuple(self._masks),
            executor="cpu",
            schedule="dense by row blocks" if dense else "pieces",
            reasons=_reasons(chosen),
            fallback=next((choice.fallback for choice, _ in chosen if choice.fallback), None),
            exact_mask=self._relations.exact_mask,
        )

    def _choose(self, local: _Local, lanes: int) -> Choice:
        shape, window = self._shape, local.window
        key = (local.relation, window.n_q, window.n_k, lanes)
        if key not in self._choices:
            problem = Problem(
                local.relation,
                window.n_q,
                window.n_k,
                shape.dtype,
                max(shape.dk, shape.dv),
                lanes,
                self._relations.pattern.origins,
                shape.rates,
            )
            self._choices[key] = self._choose_cover(problem)
        return self._choices[key]

    def _pieces(self, windows: tuple[_Local, ...], choices: list[Choice]) -> tuple[Piece, ...]:
        placed = [
            self._placed(piece, local.window, choice)
            for local, choice in zip(windows, choices, strict=True)
            for piece in choice.cover.pieces
        ]
        return join_pieces(placed)

    def _placed(self, piece: Piece, window: Window, choice: Choice) -> Piece:
        mask = piece.mask
        if isinstance(mask, int):
            mask = self._index(choice.cover.masks[mask])
        return replace(piece, queries=piece.queries.moved(window.row), keys=piece.keys.moved(window.key), mask=mask)

    def _index(self, mask: GridMask) -> int:
        if id(mask) not in self._mask_at:
            self._mask_at[id(mask)] = len(self._masks)
            self._masks.append(mask)
        return self._mask_at[id(mask)]


def _counts(chosen: list[tuple[Choice, int]], shape: CallShape, q_tile: int, k_tile: int) -> TileCounts:
    full = sum(choice.cover.full_tiles * lanes for choice, lanes in chosen)
    partial = sum(choice.cover.partial_tiles * lanes for choice, lanes in chosen)
    total = sum(choice.tiles * lanes for choice, lanes in chosen)
    inside = sum(choice.grid.n_q * choice.grid.n_k * lanes for choice, lanes in chosen)
    between = shape.n_q * shape.n_k * shape.batch * shape.heads - inside  # pairs of different documents, by area
    total += -(-between // (q_tile * k_tile))
    return TileCounts(total, full + partial, full, partial)


def _visible(chosen: list[tuple[Choice, int]]) -> int | None:
    counts = [None if c.cover.visible is None else c.cover.visible * lanes for c, lanes in chosen]
    known = [n for n in counts if n is not None]
    return sum(known) if len(known) == len(counts) else None


def _reasons(chosen: list[tuple[Choice, int]]) -> tuple[str, ...]:
    sizes = sorted({(choice.grid.q_tile, choice.grid.k_tile) for choice, _ in chosen})
    mixed = [f"tiles of several sizes, counted each in its own: {', '.join(f'{q}×{k}' for q, k in sizes)}"]
    reasons = [reason for choice, _ in chosen for reason in choice.reasons]
    return tuple(dict.fromkeys([*(mixed if len(sizes) > 1 else []), *reasons]))
