"""Receptive fields: the input tokens that a token knows of after some layers, and the paths by which it does.

A token knows itself, since a layer adds to its input (the residual connection), and everything that the tokens visible
to it knew one layer before. Information flows through any head, so a layer's relation is the union over its heads.
After the layers 1 … l the field of query q is thus row q of

    (1 + A_l) · … · (1 + A_1),

taken as truth values, with A_i the relation of layer i. The product is evaluated from the left, on sets: each token's
row is looked up once for every kind of layer, when the token is first reached (`sights`). No N × N object is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word, simplified
from attnc.compiler.analysis.live_tiles import TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index, fold
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
"""Maximum number of layers to follow until nothing more is reached, even if fewer layers were asked for."""

TILE = 256
MOST_PAIRS = 1 << 26
"""Maximum number of pairs to evaluate when deciding whether a query sees keys ahead."""

BREADTH = 64
"""Maximum number of tokens per layer among which a path chooses."""


# --- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WindowPairs:
    """The relation of one head and layer, and the windows that share it, over queries and keys or units of keys.

    `units`: the number of the unit that each token is in; None where keys are tokens.
    """

    windows: Windows
    relation: Index
    units: Int64 | None
    origins: Mapping[Index, Span]


class Layer:
    """A kind of layer on n tokens: the union of the relations of its heads and branches."""

    def __init__(self, n: int, parts: Iterable[WindowPairs], held: Iterable[Held] = ()) -> None:
        """`held`: the states that tokens read besides the parts."""
        self.n = n
        self._parts = tuple(parts)
        self._held = tuple({state.contents: state for state in held}.values())
        self._sights: dict[tuple[Index, int, int], Sight] = {}

    @classmethod
    def of(cls, n: int, found: Iterable[tuple[Relations, Int64 | None]], held: Iterable[Held] = ()) -> Layer:
        """Return the layer of attentions with the units of their keys; heads of batch entry 0, equal heads merged.

        `held`: the tokens that the states of other branches hold.
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
            for window, queries in _by_window(part.windows, tokens):
                row, key, n_q, n_k = (int(x[window]) for x in (part.windows.row, part.windows.key, *_sizes(part)))
                sight = self._sight(part, n_q, n_k)
                if part.units is None:
                    fresh.append(key + sight.look(queries - row, seen[key : key + n_k]))
                    continue
                units = np.zeros(n_k, dtype=np.bool_)
                sight.look(queries - row, units)
                keys = np.flatnonzero(units[part.units] & ~seen)
                seen[keys] = True
                fresh.append(keys)
        fresh += [state.look(tokens, seen) for state in self._held if len(tokens)]
        return np.sort(np.concatenate(fresh)) if fresh else np.zeros(0, dtype=np.int64)

    def shows(self, tokens: Int64, keys: Int64) -> Mask:
        """Return the visibility of `keys` to `tokens`, both ascending: bool (tokens, keys). Raises EvaluationError."""
        result = np.zeros((len(tokens), len(keys)), dtype=np.bool_)
        for part in self._parts:
            for window, queries in _by_window(part.windows, tokens):
                row, key, n_q, n_k = (int(x[window]) for x in (part.windows.row, part.windows.key, *_sizes(part)))
                local_keys = keys - key if part.units is None else part.units[keys]
                inside = np.flatnonzero((local_keys >= 0) & (local_keys < n_k))
                rows = np.searchsorted(tokens, queries)
                result[np.ix_(rows, inside)] |= self._sight(part, n_q, n_k).shows(queries - row, local_keys[inside])
        for state in self._held:
            result |= state.shows(tokens, keys)
        return result

    def _sight(self, part: WindowPairs, n_q: int, n_k: int) -> Sight:
        name = part.relation, n_q, n_k
        if name not in self._sights:
            self._sights[name] = Sight(*name, part.origins)
        return self._sights[name]

    def looks_back(self) -> bool:
        """Whether no query sees a later key; False also where the analysis cannot tell."""
        return all(state.looks_back for state in self._held) and all(_looks_back(part) for part in self._parts)


def _sizes(part: WindowPairs) -> tuple[Int64, Int64]:
    return part.windows.n_q, part.windows.n_k


def _by_window(windows: Windows, tokens: Int64) -> list[tuple[int, Int64]]:
    """The number of each window that holds some of the tokens, with these tokens."""
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
    except EvaluationError:  # a conjunct may be evaluated where another conjunct would guard it
        return _are_nowhere_ahead([(part.relation,)], n_q, n_k)


def _are_nowhere_ahead(conjunct_lists: Iterable[tuple[Index, ...]], n_q: int, n_k: int) -> bool:
    """Whether no alternative of a relation holds for a key later than the query."""
    ahead = fold.less(fold.place("q"), fold.place("k"))
    simpler = (simplified(fold.conjunction(*conjuncts, ahead), (0, n_q), (0, n_k)) for conjuncts in conjunct_lists)
    return all(_is_nowhere(node, n_q, n_k) for node in simpler if node is not fold.truth(False))


def _is_nowhere(node: Index, n_q: int, n_k: int) -> bool:
    """Whether a relation provably holds on no pair; evaluates one tile of each class of live tiles."""
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
    """A query's receptive field after `layer` layers.

    `tokens`: its number of tokens; `furthest`: the distance of its furthest token; `within`: the distance up to which
    it holds every token that it should.
    """

    layer: int
    tokens: int
    furthest: int
    within: int


@dataclass(frozen=True)
class ReceptiveField:
    """The receptive field of a query among n tokens, layer by layer.

    `looks_back`: no layer shows later keys, so the field should hold `k <= q`, else all tokens: `wanted` tokens.
    `complete`: the first layer after which the field holds all wanted tokens. `final`: the first layer after which the
    field never grows again. `known`: for each token asked about, the first layer after which the field holds it. All
    three are None where the layers that were followed do not reach that point.
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
"""A progress callback: (layers, tokens reached) → None."""


def find_reach(
    kinds: Sequence[Layer],
    order: Sequence[int],
    query: int,
    least: int,
    tokens: Sequence[int] = (),
    tell: Tell = lambda layers, tokens: None,
) -> ReceptiveField:
    """Find the receptive field of a query through layers: layer i is of kind `order[i - 1]`, repeated cyclically.

    The field is followed until it no longer grows, for at most max(`least`, `MOST_LAYERS`) layers. `tokens`: the tokens
    for which to report the first layer that reaches them. Raises EvaluationError.
    """
    n, order = kinds[0].n, _period(order)
    looks_back = all(kinds[kind].looks_back() for kind in set(order))
    wanted = query + 1 if looks_back else n
    # With a period of p layers, layers p + 1 … l repeat layers 1 … l - p, so one walk for each l modulo p serves all l.
    walks = [_Walk(kinds, order, query, looks_back) for _ in order]
    fields = [walks[0].after(0)]
    first_layers: list[int | None] = [0 if token == query else None for token in tokens]
    layer, is_idle = 0, False
    while not is_idle and fields[-1].tokens < wanted and layer < max(least, MOST_LAYERS):
        layer += 1
        walk = walks[layer % len(order)]
        for i in reversed(range(min(layer, len(order)))):
            walk.step(order[i])
        fields.append(walk.after(layer))
        first_layers = [
            layer if first is None and walk.seen[token] else first
            for token, first in zip(tokens, first_layers, strict=True)
        ]
        is_idle = walk.is_idle
        tell(layer, fields[-1].tokens)
    reached = fields[-1].tokens
    first = next(item.layer for item in fields if item.tokens == reached)
    complete = first if reached == wanted else None
    final = first if is_idle or reached == wanted else None
    return ReceptiveField(n, query, looks_back, wanted, tuple(fields), complete, final, tuple(first_layers))


def _period(order: Sequence[int]) -> Sequence[int]:
    """The shortest prefix that gives the same layers when it is repeated."""
    n = len(order)
    return next(order[:p] for p in range(1, n + 1) if n % p == 0 and list(order) == list(order[:p]) * (n // p))


class _Walk:
    """The tokens that a query knows of, and for each kind of layer the tokens whose rows are still to look up."""

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
        """Whether no further layer of any kind would add a token."""
        return not any(self._waiting.values())

    def step(self, kind: int) -> Int64:
        """Put a layer of a kind below the others, and return the tokens that it adds."""
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
        ends = [gap.find() for gap in gaps]
        short = [end - 1 for end, gap in zip(ends, gaps, strict=True) if end < gap.length]
        within = min(short) if short else max(ends) - 1
        return After(layer, self._tokens, furthest, within)


class _Gap:
    """The first unmarked token of a view; marks are only ever added, so the search resumes where it ended."""

    def __init__(self, seen: Mask) -> None:
        self._seen = seen
        self.length = len(seen)
        self._at = 0

    def find(self) -> int:
        """Return the index of the first unmarked token, or the length."""
        while self._at < self.length:
            missing = np.flatnonzero(~self._seen[self._at : self._at + TILE * TILE])
            if len(missing):
                self._at += int(missing[0])
                break
            self._at = min(self._at + TILE * TILE, self.length)
        return self._at


# --- paths -----------------------------------------------------------------------------------------------------------


def find_path(kinds: Sequence[Layer], order: Sequence[int], query: int, token: int, layer: int) -> tuple[int, ...]:
    """Find a path from a token to the query through layers 1 … `layer`, the first layer after which it is reached.

    Returns the tokens that hold the information, in the input and after each layer. Among the paths through up to
    `BREADTH` tokens per layer, the result moves between tokens least often. Raises EvaluationError.
    """
    import networkx  # importing networkx takes as long as importing the whole language

    steps = [order[i % len(order)] for i in reversed(range(layer))]
    depths = _Depths(kinds, steps, query)
    graph = networkx.DiGraph()
    graph.add_node((layer, token))
    tokens_here = np.array([token], dtype=np.int64)
    for step in range(layer, 0, -1):
        tokens_before = []
        for token_here, holders in depths.holders(tokens_here, step, max(1, BREADTH // len(tokens_here))):
            stays = bool(len(holders) == 1 and holders[0] == token_here)
            graph.add_edges_from(
                (((step - 1, position), (step, token_here)) for position in holders.tolist()), changes=int(not stays)
            )
            tokens_before.append(holders)
        tokens_here = np.unique(np.concatenate(tokens_before))
    path = networkx.shortest_path(graph, (0, query), (layer, token), weight="changes")
    return tuple(position for _, position in reversed(path))


class _Depths:
    """The step at which each token is first reached; every step puts one layer below."""

    def __init__(self, kinds: Sequence[Layer], steps: Sequence[int], query: int) -> None:
        self._kinds, self._steps = kinds, steps
        walk = _Walk(kinds, steps, query, looks_back=True)
        self._reached = [np.array([query], dtype=np.int64), *(walk.step(kind) for kind in steps)]
        self._depth = np.full(kinds[0].n, len(steps) + 1, dtype=np.int32)
        for step, tokens in enumerate(self._reached):
            self._depth[tokens] = step

    def holders(self, tokens: Int64, step: int, limit: int) -> Iterator[tuple[int, Int64]]:
        """Yield, for each token, the holders one step before: the token itself, if it was reached by then, else at most
        `limit` tokens that see it."""
        is_reached = self._depth[tokens] < step
        yield from ((token, np.array([token])) for token in tokens[is_reached].tolist())
        fresh = tokens[~is_reached]
        if len(fresh):
            # Tokens reached before the last step of this kind do not see the fresh tokens, or they would not be fresh.
            kind = self._steps[step - 1]
            since = next((i for i in range(step - 1, 0, -1) if self._steps[i - 1] == kind), 0)
            rows = np.sort(np.concatenate(self._reached[since:step]))
            seen = self._kinds[kind].shows(rows, fresh)
            yield from ((token, _spread(rows[seen[:, i]], limit)) for i, token in enumerate(fresh.tolist()))


def _spread(tokens: Int64, limit: int) -> Int64:
    """Choose at most `limit` of the tokens, evenly spread."""
    return tokens if len(tokens) <= limit else tokens[np.linspace(0, len(tokens) - 1, limit).astype(np.int64)]
