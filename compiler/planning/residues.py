"""Relations that hold only where `q - k` has one remainder: each class of residues is a dense problem of its own.

Substituting q = d·a + s and k = d·b + u makes `(q - k) % d == t` true where u ≡ s - t and false elsewhere, so that a
dilated relation becomes d undilated ones, each on every d-th token. A disjunction is split into parts that do not
overlap: what has no congruence stays in natural order, the rest (without what is covered already) goes by classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from attnc.compiler import fold
from attnc.compiler.ir import Arith, Bool, Compare, Const, Index, Linear, Position
from attnc.compiler.planning.cpu_plan import PlanPiece, Strip, StripAxis
from attnc.compiler.rewrite import substitute, walk
from attnc.compiler.verify_ir import verified

MOST_CLASSES = 1024


@dataclass(frozen=True, slots=True)
class Congruence:
    """`q - k ≡ offset` modulo `divisor`."""

    divisor: int
    offset: int


@dataclass(frozen=True, slots=True)
class CongruentPart:
    """A part of a relation and the congruence that holds wherever it does, None for what stays in natural order."""

    relation: Index
    congruence: Congruence | None


@dataclass(frozen=True, slots=True)
class Residue:
    """One class: rows `row, row + divisor, …`, keys `key, key + divisor, …`, and the relation over their numbers."""

    relation: Index
    divisor: int
    row: int
    key: int
    n_q: int
    n_k: int

    def placed(self, piece: PlanPiece, fresh: bool) -> PlanPiece:
        """A piece over the class's own numbers as one over rows and keys."""
        return replace(
            piece,
            queries=_spread(piece.queries, self.row, self.divisor),
            keys=_spread(piece.keys, self.key, self.divisor),
            fresh=fresh and piece.fresh,
        )


def _spread(strip: Strip, first: int, divisor: int) -> Strip:
    axes = (StripAxis(a.step * divisor, a.count, a.length, a.stride * divisor) for a in strip.axes)
    return Strip(first + strip.start * divisor, tuple(axes))


def split(relation: Index) -> tuple[CongruentPart, ...]:
    """The relation in parts that do not overlap; one part in natural order where no congruence is found."""
    disjuncts = [(d, _congruence(d)) for d in _disjuncts(relation)]
    if all(congruence is None for _, congruence in disjuncts):
        return (CongruentPart(relation, None),)
    covered = [d for d, congruence in disjuncts if congruence is None]
    parts = [CongruentPart(fold.disjunction(*covered), None)] if covered else []
    for disjunct, congruence in disjuncts:
        if congruence is not None:
            rest = fold.conjunction(disjunct, *(_outside(disjunct, other) for other in covered))
            parts.append(CongruentPart(rest, congruence))
            covered.append(disjunct)
    return tuple(parts)


def _outside(relation: Index, other: Index) -> Index:
    """`not other`, where `relation` holds: its conjuncts need not be asked again."""
    known = set(_conjuncts(relation))
    return fold.negation(fold.conjunction(*(o for o in _conjuncts(other) if o not in known)))


def _conjuncts(relation: Index) -> tuple[Index, ...]:
    return relation.operands if isinstance(relation, Bool) and relation.op == "and" else (relation,)


def _disjuncts(relation: Index) -> Iterator[Index]:
    """The alternatives of a relation: `a or b`, and `c and (a or b)` with c in each."""
    if isinstance(relation, Bool) and relation.op == "or":
        yield from relation.operands
        return
    if isinstance(relation, Bool):
        choices = [o for o in relation.operands if isinstance(o, Bool) and o.op == "or"]
        if choices and _congruence(relation) is None:
            for alternative in choices[0].operands:
                yield fold.conjunction(*(alternative if o is choices[0] else o for o in relation.operands))
            return
    yield relation


def _congruence(relation: Index) -> Congruence | None:
    """A congruence of q - k among the conjuncts."""
    return next((c for c in map(_congruence_of, _conjuncts(relation)) if c is not None), None)


def _congruence_of(node: Index) -> Congruence | None:
    """`(±(q - k) + c) % d == r` as a congruence."""
    if not (isinstance(node, Compare) and node.op == "eq"):
        return None
    terms, constant = fold.parts(node.value)
    if len(terms) != 1 or abs(terms[0][1]) != 1:
        return None
    remainder, sign = terms[0]
    if not (isinstance(remainder, Arith) and remainder.op == "mod" and isinstance(remainder.operands[1], Const)):
        return None
    difference, divisor = remainder.operands[0], remainder.operands[1].value
    if not isinstance(difference, Linear) or not 2 <= divisor <= MOST_CLASSES:
        return None
    factors = {term.name: factor % divisor for term, factor in difference.terms if isinstance(term, Position)}
    if set(factors) != {"q", "k"} or len(difference.terms) != 2 or sum(factors.values()) % divisor:
        return None
    wanted = -constant * sign - difference.constant
    if factors["q"] == 1:
        return Congruence(divisor, wanted % divisor)
    return Congruence(divisor, -wanted % divisor) if factors["q"] == divisor - 1 else None


def residues(part: CongruentPart, n_q: int, n_k: int) -> Iterator[Residue]:
    """The classes of a part that have rows and keys."""
    assert part.congruence is not None
    d = part.congruence.divisor
    shared = _reads_differences(part.relation)
    known: dict[object, Index] = {}
    for row in range(min(d, n_q)):
        key = (row - part.congruence.offset) % d
        if key < n_k:
            name = row - key if shared else row
            if name not in known:
                known[name] = _in_class(part.relation, d, row, key)
            yield Residue(known[name], d, row, key, -(-(n_q - row) // d), -(-(n_k - key) // d))


@verified
def _in_class(relation: Index, divisor: int, row: int, key: int) -> Index:
    """The relation over the numbers of a class's rows and keys."""
    q, k = fold.place("q"), fold.place("k")
    rows, keys = fold.add(fold.times(q, divisor), fold.const(row)), fold.add(fold.times(k, divisor), fold.const(key))
    return substitute(relation, {q: rows, k: keys})


def _reads_differences(relation: Index) -> bool:
    """Whether places occur in multiples of q - k only: then classes with one difference of row and key are alike."""
    for node in walk(relation):
        if isinstance(node, Linear):
            factors = {term.name: factor for term, factor in node.terms if isinstance(term, Position)}
            if factors.get("q", 0) + factors.get("k", 0):
                return False
        elif any(isinstance(child, Position) for child in node.children()):
            return False
    return True
