"""Receptive fields: which tokens of the input a token knows of after some layers, and through which others.

A token knows itself, since a layer adds to what was there (the residual connection), and what the tokens that it sees
knew one layer before. Information flows through any head, so a layer shows what one of its heads shows. After the
layers 1 … l the field of query q is thus row q of

    (1 + A_l) · … · (1 + A_1),

taken as truth values, with A_i the relation of layer i. It is found from the left, by sets: each token's row is looked
at once for every kind of layer, when the token is first reached (`sights`). No N × N object is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word, simplified
from attnc.compiler.analysis.live_tiles import TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.documents import Windows
from attnc.compiler.receptive.held import Held
from attnc.compiler.receptive.piece_ranges import AT_ONCE
from attnc.compiler.receptive.sights import Sight, alternatives
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

MOST_LAYERS = 4096
"""Layers up to which it is looked for the one where nothing more is reached, however few were asked about."""

TILE = 256
MOST_PAIRS = 1 << 26
"""Pairs of queries and units of keys that are looked at to decide whether a query sees what is ahead."""

BREADTH = 64
"""Tokens of a layer that a path may choose from."""


# --- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WindowPairs:
    """Visible pairs of one head and layer in windows that share a relation: of a query and a key, or a unit of keys.

    `units` is the number of the unit that each token is in, None where keys are tokens.
    """

    windows: Windows
    relation: Index
    units: Int64 | None
    origins: Mapping[Index, Span]


class Layer:
    """A kind of layer on n tokens: what its heads and branches show together."""

    def __init__(self, n: int, parts: Iterable[WindowPairs], held: Iterable[Held] = ()) -> None:
        """`held`: the states that tokens read beside the parts."""
        self.n = n
        self._parts = tuple(parts)
        self._held = tuple({state.contents: state for state in held}.values())
        self._sights: dict[tuple[Index, int, int], Sight] = {}

    @classmethod
    def of(cls, n: int, found: Iterable[tuple[Relations, Int64 | None]], held: Iterable[Held] = ()) -> Layer:
        """The heads of the first batch entry of some attentions, with the units of their keys; equal ones are one.

        `held`: what the states of other branches hold.
        """
        parts: dict[object, WindowPairs] = {}
        for relations, units in found:
            for head in range(relations.shape.heads):
                for local in relations.locals(0, head):
                    name = (local.name, None if units is None else units.tobytes())
                    part = WindowPairs(local.windows, local.relation, units, relations.pattern.origins)
                    parts.setdefault(name, part)
        return cls(n, parts.values(), held)

    def look(self, tokens: Int64, seen: Mask) -> Int64:
        """Return the tokens visible to `tokens` (ascending) and not in `seen`, and add them to `seen`; ascending.

        Raises EvaluationError.
        """
        fresh = []
        for part in self._parts:
            for number, mine in _by_window(part.windows, tokens):
                row, key, n_q, n_k = (int(x[number]) for x in (part.windows.row, part.windows.key, *_sizes(part)))
                sight = self._sight(part, n_q, n_k)
                if part.units is None:
                    fresh.append(key + sight.look(mine - row, seen[key : key + n_k]))
                    continue
                units = np.zeros(n_k, dtype=np.bool_)
                sight.look(mine - row, units)
                found = np.flatnonzero(units[part.units] & ~seen)
                seen[found] = True
                fresh.append(found)
        fresh += [state.look(tokens, seen) for state in self._held if len(tokens)]
        return np.sort(np.concatenate(fresh)) if fresh else np.zeros(0, dtype=np.int64)

    def shows(self, tokens: Int64, keys: Int64) -> Mask:
        """Return the visibility of `keys` to `tokens`, both ascending: bool (tokens, keys). Raises EvaluationError."""
        result = np.zeros((len(tokens), len(keys)), dtype=np.bool_)
        for part in self._parts:
            for number, mine in _by_window(part.windows, tokens):
                row, key, n_q, n_k = (int(x[number]) for x in (part.windows.row, part.windows.key, *_sizes(part)))
                places = keys - key if part.units is None else part.units[keys]
                inside = np.flatnonzero((places >= 0) & (places < n_k))
                rows = np.searchsorted(tokens, mine)
                result[np.ix_(rows, inside)] |= self._sight(part, n_q, n_k).shows(mine - row, places[inside])
        for state in self._held:
            result |= state.shows(tokens, keys)
        return result

    def _sight(self, part: WindowPairs, n_q: int, n_k: int) -> Sight:
        name = part.relation, n_q, n_k
        if name not in self._sights:
            self._sights[name] = Sight(*name, part.origins)
        return self._sights[name]

    def looks_back(self) -> bool:
        """Whether analysis shows that no query sees a key after it; false also where it cannot tell."""
        return all(state.looks_back for state in self._held) and all(_looks_back(part) for part in self._parts)


def _sizes(part: WindowPairs) -> tuple[Int64, Int64]:
    return part.windows.n_q, part.windows.n_k


def _by_window(windows: Windows, tokens: Int64) -> list[tuple[int, Int64]]:
    """Numbers of the windows that tokens are in, with these tokens."""
    if not len(windows) or not len(tokens):
        return []
    number = np.searchsorted(windows.row, tokens, side="right") - 1
    inside = (number >= 0) & (tokens < (windows.row + windows.n_q)[number])
    tokens, number = tokens[inside], number[inside]
    cuts = np.flatnonzero(np.diff(number)) + 1
    return [(int(number[a]), tokens[a:b]) for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True) if b > a]


def _looks_back(part: WindowPairs) -> bool:
    n_q, n_k = (int(x.max(initial=0)) for x in _sizes(part))
    if part.units is not None:
        return _units_look_back(part, n_q, n_k)
    try:
        return _are_nowhere_ahead(alternatives(part.relation), n_q, n_k)
    except EvaluationError:  # a part may be asked where another one guards it
        return _are_nowhere_ahead([(part.relation,)], n_q, n_k)


def _are_nowhere_ahead(found: Iterable[tuple[Index, ...]], n_q: int, n_k: int) -> bool:
    """Whether no alternative of a relation holds for a key after the query."""
    ahead = fold.less(fold.place("q"), fold.place("k"))
    left = (simplified(fold.conjunction(*conjuncts, ahead), (0, n_q), (0, n_k)) for conjuncts in found)
    return all(_is_nowhere(node, n_q, n_k) for node in left if node is not fold.truth(False))


def _is_nowhere(node: Index, n_q: int, n_k: int) -> bool:
    """Whether a relation is shown to hold on no pair: by tiles, of which one of each class is evaluated."""
    grid = TileGrid(n_q, n_k, TILE, TILE)
    try:
        live = find_live_tiles(node, grid)
    except TooManyTilesError:
        return False
    _, first = np.unique(live.kind, return_index=True)
    if live.full or len(first) * TILE * TILE > MOST_PAIRS:
        return False
    tiles = live.take(first)
    ends = ((grid.row_range(row), grid.key_range(column)) for row, column in zip(tiles.row, tiles.column, strict=True))
    return not any(exact_evaluation.mask(node, rows, keys).any() for rows, keys in ends)


def _units_look_back(part: WindowPairs, n_q: int, n_k: int) -> bool:
    if n_q * n_k > MOST_PAIRS:
        return False
    assert part.units is not None
    last = np.full(n_k, -1, dtype=np.int64)
    np.maximum.at(last, part.units, np.arange(len(part.units)))
    wide = not fits_word(part.relation, (0, n_q), (0, n_k))
    step = max(1, AT_ONCE // max(n_k, 1))
    for start in range(0, n_q, step):
        rows = np.arange(start, min(start + step, n_q))
        ahead = last > rows[:, None]
        if exact_evaluation.mask_at(part.relation, rows, np.arange(n_k), ahead, wide=wide).any():
            return False
    return True


# --- reach -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class After:
    """A query's receptive field after a number of layers: how many tokens, the distance of the furthest, and how far
    it knows all that it should."""

    layer: int
    tokens: int
    furthest: int
    within: int


@dataclass(frozen=True)
class ReceptiveField:
    """The receptive field of a query among n tokens, layer by layer, as far as it was looked at.

    `looks_back`: no layer shows what is ahead, so that it should see `k <= q`, else everything: `wanted` tokens.
    `complete`: the first layer after which it sees all of it, None if there is none up to the last one looked at.
    `final`: the first layer after which nothing more is ever reached, None where that lies beyond. `known`: the first
    layer after which it knows of a token, for each one asked about; None as before.
    """

    n: int
    query: int
    looks_back: bool
    wanted: int
    after: tuple[After, ...]
    complete: int | None
    final: int | None
    known: tuple[int | None, ...]


Tell = Callable[[int, int], None]
"""(layers, tokens reached) → nothing: says how far it is."""


def find_reach(
    kinds: Sequence[Layer],
    order: Sequence[int],
    query: int,
    least: int,
    tokens: Sequence[int] = (),
    tell: Tell = lambda layers, tokens: None,
) -> ReceptiveField:
    """The reach of a query through layers of some kinds: layer i is of kind `order[i - 1]`, and so on in circles.

    It is followed until nothing more is reached, for at least `least` layers or `MOST_LAYERS` if that takes longer.
    `tokens`: those to say of when they are known. Raises EvaluationError.
    """
    n, order = kinds[0].n, _period(order)
    looks_back = all(kinds[kind].looks_back() for kind in set(order))
    wanted = query + 1 if looks_back else n
    # Before the layers 1 … p that come last, the layers p + 1 … l are what the layers 1 … l - p were.
    walks = [_Walk(kinds, order, query, looks_back) for _ in order]
    after = [walks[0].after(0)]
    known: list[int | None] = [0 if token == query else None for token in tokens]
    layer, idle = 0, False
    while not idle and after[-1].tokens < wanted and layer < max(least, MOST_LAYERS):
        layer += 1
        walk = walks[layer % len(order)]
        for i in reversed(range(min(layer, len(order)))):
            walk.step(order[i])
        after.append(walk.after(layer))
        known = [
            layer if first is None and walk.seen[token] else first for token, first in zip(tokens, known, strict=True)
        ]
        idle = walk.is_idle
        tell(layer, after[-1].tokens)
    most = after[-1].tokens
    first = next(item.layer for item in after if item.tokens == most)
    complete = first if most == wanted else None
    final = first if idle or most == wanted else None
    return ReceptiveField(n, query, looks_back, wanted, tuple(after), complete, final, tuple(known))


def _period(order: Sequence[int]) -> Sequence[int]:
    """The shortest list that gives the same layers when it is repeated."""
    n = len(order)
    return next(order[:p] for p in range(1, n + 1) if n % p == 0 and list(order) == list(order[:p]) * (n // p))


class _Walk:
    """The set of tokens that a query knows of, and for each kind of layer those whose rows were not looked at."""

    def __init__(self, kinds: Sequence[Layer], order: Sequence[int], query: int, looks_back: bool) -> None:
        self.seen = np.zeros(kinds[0].n, dtype=np.bool_)
        self.seen[query] = True
        self._kinds = kinds
        self._waiting = {kind: [np.array([query], dtype=np.int64)] for kind in order}
        self._query = query
        self._tokens = 1
        self._first = self._last = query
        self._gap_before = _Gap(self.seen[: query + 1][::-1])
        self._gap_after = None if looks_back else _Gap(self.seen[query:])

    @property
    def is_idle(self) -> bool:
        """Whether no layer of any kind would add something."""
        return not any(self._waiting.values())

    def step(self, kind: int) -> Int64:
        """Put a layer below: what it adds."""
        rows, self._waiting[kind] = self._waiting[kind], []
        if not rows:
            return np.zeros(0, dtype=np.int64)
        fresh = self._kinds[kind].look(np.sort(np.concatenate(rows)), self.seen)
        if len(fresh):
            for waiting in self._waiting.values():
                waiting.append(fresh)
            self._tokens += len(fresh)
            self._first, self._last = min(self._first, int(fresh[0])), max(self._last, int(fresh[-1]))
        return fresh

    def after(self, layer: int) -> After:
        """Return the receptive field after `layer` layers."""
        furthest = max(self._query - self._first, self._last - self._query)
        gaps = [gap for gap in (self._gap_before, self._gap_after) if gap is not None]
        found = [gap.find() for gap in gaps]
        open_ends = [at - 1 for at, gap in zip(found, gaps, strict=True) if at < gap.length]
        within = min(open_ends) if open_ends else max(found) - 1
        return After(layer, self._tokens, furthest, within)


class _Gap:
    """The first token of a view that is not marked; marks are only ever added."""

    def __init__(self, seen: Mask) -> None:
        self._seen = seen
        self.length = len(seen)
        self._at = 0

    def find(self) -> int:
        """Its place, or the length."""
        while self._at < self.length:
            missing = np.flatnonzero(~self._seen[self._at : self._at + TILE * TILE])
            if len(missing):
                self._at += int(missing[0])
                break
            self._at = min(self._at + TILE * TILE, self.length)
        return self._at


# --- paths -----------------------------------------------------------------------------------------------------------


def find_path(kinds: Sequence[Layer], order: Sequence[int], query: int, token: int, layer: int) -> tuple[int, ...]:
    """A way from a token to the query through layers 1 … `layer`, the first after which it is known of.

    The tokens that hold it in the input and after each layer. Of all ways through some tokens of each layer it is one
    that changes from token to token least often. Raises EvaluationError.
    """
    import networkx  # it takes as long to import as all of the language

    steps = [order[i % len(order)] for i in reversed(range(layer))]
    depths = _Depths(kinds, steps, query)
    graph = networkx.DiGraph()
    graph.add_node((layer, token))
    here = np.array([token], dtype=np.int64)
    for step in range(layer, 0, -1):
        before = []
        for at, holders in depths.holders(here, step, max(1, BREADTH // len(here))):
            stays = bool(len(holders) == 1 and holders[0] == at)
            graph.add_edges_from((((step - 1, t), (step, at)) for t in holders.tolist()), changes=int(not stays))
            before.append(holders)
        here = np.unique(np.concatenate(before))
    way = networkx.shortest_path(graph, (0, query), (layer, token), weight="changes")
    return tuple(t for _, t in reversed(way))


class _Depths:
    """The step at which each token is first reached, a layer put below a step."""

    def __init__(self, kinds: Sequence[Layer], steps: Sequence[int], query: int) -> None:
        self._kinds, self._steps = kinds, steps
        walk = _Walk(kinds, steps, query, looks_back=True)
        self._reached = [np.array([query], dtype=np.int64), *(walk.step(kind) for kind in steps)]
        self._depth = np.full(kinds[0].n, len(steps) + 1, dtype=np.int32)
        for step, tokens in enumerate(self._reached):
            self._depth[tokens] = step

    def holders(self, tokens: Int64, step: int, most: int) -> Iterator[tuple[int, Int64]]:
        """For each of some tokens, those of the step before that it can be known through: itself, if it was known then,
        else at most so many that see it."""
        known = self._depth[tokens] < step
        yield from ((at, np.array([at])) for at in tokens[known].tolist())
        fresh = tokens[~known]
        if len(fresh):
            # Those that came before the last step of this kind do not see it, as that would have been a way to it.
            kind = self._steps[step - 1]
            since = next((i for i in range(step - 1, 0, -1) if self._steps[i - 1] == kind), 0)
            rows = np.sort(np.concatenate(self._reached[since:step]))
            seen = self._kinds[kind].shows(rows, fresh)
            yield from ((at, _spread(rows[seen[:, i]], most)) for i, at in enumerate(fresh.tolist()))


def _spread(tokens: Int64, most: int) -> Int64:
    """At most so many of some tokens, evenly chosen."""
    return tokens if len(tokens) <= most else tokens[np.linspace(0, len(tokens) - 1, most).astype(np.int64)]
