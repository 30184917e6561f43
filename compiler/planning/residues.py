"""Relations that hold only where `q - k` has one remainder: each residue class is a separate dense problem.

Substituting q = d·a + s and k = d·b + u makes `(q - k) % d == t` true where u ≡ s - t and false elsewhere, so that a
dilated relation becomes d undilated ones, each on every d-th token. A disjunction is split into disjoint parts: parts
without a congruence stay in natural order; parts with a congruence, minus the parts before them, go by residue class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from attnc.compiler.ir import Arith, Bool, Compare, Const, Index, Linear, Position, fold
from attnc.compiler.ir.rewrite import substitute, walk
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.planning.cpu_plan import PlanPiece, Strip, StripAxis

MOST_CLASSES = 1024
"""Maximum number of residue classes; a congruence with a larger divisor is ignored."""


@dataclass(frozen=True, slots=True)
class Congruence:
    """The congruence `q - k ≡ offset` modulo `divisor`."""

    divisor: int
    offset: int


@dataclass(frozen=True, slots=True)
class CongruentPart:
    """A part of a relation and a congruence that it implies; None: the part stays in natural order."""

    relation: Index
    congruence: Congruence | None


@dataclass(frozen=True, slots=True)
class Residue:
    """A residue class: rows `row, row + divisor, …`, keys `key, key + divisor, …`, and their relation by index."""

    relation: Index
    divisor: int
    row: int
    key: int
    n_q: int
    n_k: int

    def placed(self, piece: PlanPiece, fresh: bool) -> PlanPiece:
        """Return a piece over indices within the class as a piece over rows and keys."""
        return replace(
            piece,
            queries=_spread(piece.queries, self.row, self.divisor),
            keys=_spread(piece.keys, self.key, self.divisor),
            fresh=fresh and piece.fresh,
        )


def _spread(strip: Strip, first: int, divisor: int) -> Strip:
    """Return the strip with token i moved to `first + i * divisor`."""
    axes = (StripAxis(a.step * divisor, a.count, a.length, a.stride * divisor) for a in strip.axes)
    return Strip(first + strip.start * divisor, tuple(axes))


def split(relation: Index) -> tuple[CongruentPart, ...]:
    """Split a relation into disjoint parts; without a congruence it is a single part in natural order."""
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
    """Return a condition equal to `not other` where `relation` holds, without the conjuncts of `relation`."""
    stated = set(conjuncts(relation))
    return fold.negation(fold.conjunction(*(o for o in conjuncts(other) if o not in stated)))


def conjuncts(relation: Index) -> tuple[Index, ...]:
    """Return the operands of an `and`, or the relation alone."""
    return relation.operands if isinstance(relation, Bool) and relation.op == "and" else (relation,)


def _disjuncts(relation: Index) -> Iterator[Index]:
    """Yield the alternatives of a relation: a and b for `a or b`; `c and a` and `c and b` for `c and (a or b)`."""
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
    """Return the first congruence of q - k among the conjuncts of a relation, else None."""
    return next((c for c in map(_stated_congruence, conjuncts(relation)) if c is not None), None)


def _stated_congruence(node: Index) -> Congruence | None:
    """Return the congruence stated by a comparison `(±(q - k) + c) % d == r`, None for any other node."""
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
    target = -constant * sign - difference.constant
    if factors["q"] == 1:
        return Congruence(divisor, target % divisor)
    return Congruence(divisor, -target % divisor) if factors["q"] == divisor - 1 else None


def residues(part: CongruentPart, n_q: int, n_k: int) -> Iterator[Residue]:
    """Yield the residue classes of a part that have rows and keys."""
    assert part.congruence is not None
    d = part.congruence.divisor
    shared = _reads_differences(part.relation)
    relations: dict[object, Index] = {}
    for row in range(min(d, n_q)):
        key = (row - part.congruence.offset) % d
        if key < n_k:
            name = row - key if shared else row
            if name not in relations:
                relations[name] = _in_class(part.relation, d, row, key)
            yield Residue(relations[name], d, row, key, -(-(n_q - row) // d), -(-(n_k - key) // d))


@verified
def _in_class(relation: Index, divisor: int, row: int, key: int) -> Index:
    """Return the relation over the indices of a class's rows and keys."""
    q, k = fold.place("q"), fold.place("k")
    rows, keys = fold.add(fold.times(q, divisor), fold.const(row)), fold.add(fold.times(k, divisor), fold.const(key))
    return substitute(relation, {q: rows, k: keys})


def _reads_differences(relation: Index) -> bool:
    """Whether positions occur only in multiples of q - k: then classes with equal `row - key` have equal relations."""
    for node in walk(relation):
        if isinstance(node, Linear):
            factors = {term.name: factor for term, factor in node.terms if isinstance(term, Position)}
            if factors.get("q", 0) + factors.get("k", 0):
                return False
        elif any(isinstance(child, Position) for child in node.children()):
            return False
    return True
