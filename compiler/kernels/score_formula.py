"""A score taken apart for kernels: one product of vectors, terms that are computed beforehand, and a formula of these.

What depends on the query alone, however it is made, is one number a row (`Term`), what depends on the key alone one a
column, and what depends on their distance alone one a diagonal. These are computed before the kernel, as are the
vectors that are multiplied; their gradients come back from it as they went in. The formula that is left is what a
kernel computes of every pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from attnc.compiler import fold
from attnc.compiler.analysis.translation import is_difference
from attnc.compiler.derivatives import Derivative, derivatives
from attnc.compiler.ir import (
    Apply,
    Attend,
    Const,
    Dot,
    Element,
    FloatSelect,
    Index,
    Node,
    Number,
    Position,
    Ratio,
    Scale,
    Softmax,
    Tensor,
    Truth,
    Value,
    ValueReduce,
    Vec,
    VisibleReduce,
    intern,
)
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.node_words import plural
from attnc.compiler.rewrite import replace_values
from attnc.compiler.value_nodes import apply, dot, element, number, rank, reads, vector
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning import float_arithmetic
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault

Side = Literal["query", "key", "distance"]

MOST_SUM = 2.0**28
"""The largest prefix sum that kernels take: up to this, two numbers of 32 bits hold it with errors below 1e-6."""

Kind = Literal["softmax", "share", "sum"]
"""The kind of a weight: e to its score over the sum of these; a formula over its sum; a formula as it is."""


@dataclass(frozen=True, slots=True)
class Term:
    """A number of every query, key or distance of query and key, and the tensor that stands for it in the formula.

    `varies`: it has a gradient. `half`: of a sum over what lies between a key and a query, of which terms are the sums
    up to either; these are kept in two numbers of 32 bits, 1 the larger, 2 the rest.
    """

    tensor: Tensor
    side: Side
    value: Value
    half: Literal[0, 1, 2] = 0

    @property
    def element(self) -> Value:
        """The node that stands for the term in the formula."""
        places: dict[Side, Index] = {
            "query": fold.place("q"),
            "key": fold.place("k"),
            "distance": fold.sub(fold.place("q"), fold.place("k")),
        }
        return element(self.tensor, (fold.head_index("batch"), fold.head_index("head"), places[self.side]))

    @property
    def varies(self) -> bool:
        """Whether it has a gradient."""
        return self.half != 2 and any(isinstance(below, Vec | Element) for below in self.value.below)


LEAST = -1e38
"""The finite score that stands for -inf in kernels, where an extra logit must tell a visible key from a hidden one."""


@dataclass(frozen=True, slots=True)
class ScoreFormula:
    """A score as a kernel computes it: `formula` over `dot(q, k)` and elements of terms and inputs.

    `query`, `key`: the vectors that take the places of q and k, one behind the other; `value`: that of v; empty and
    None for those themselves. `extra`: a logit of every query that takes its share of the weights. `kind`: what weights
    are made of the formula. `grouped`: parts of the formula that are added up by themselves first.
    """

    formula: Value
    query: tuple[Value, ...]
    key: tuple[Value, ...]
    value: Value | None
    terms: tuple[Term, ...]
    extra: Term | None
    kind: Kind = "softmax"
    grouped: frozenset[Value] = frozenset()

    @property
    def has_product(self) -> bool:
        """Whether vectors are multiplied."""
        return any(isinstance(below, Dot) for below in self.formula.below)

    @property
    def by_product(self) -> Derivative | None:
        """How the formula changes with the product."""
        return next((d for d in self.derivatives if isinstance(d.atom, Dot)), None)

    @property
    def derivatives(self) -> tuple[Derivative, ...]:
        """How the formula changes with all that it is made of."""
        return derivatives(self.formula)

    def by_term(self, term: Term) -> Derivative | None:
        """How the formula changes with a term."""
        return next((d for d in self.derivatives if isinstance(d.atom, Element) and d.atom.tensor is term.tensor), None)

    def shifts_rows(self, term: Term) -> bool:
        """Whether a term of the query is added to all scores of a row: then no weight depends on it, but the LSE does.

        So its gradient is that of the LSE, less that of an extra logit.
        """
        derivative = self.by_term(term)
        if self.kind != "softmax" or term.side != "query" or derivative is None:
            return False
        return derivative.by is number(1.0) and derivative.where is fold.truth(True)

    @property
    def has_terms_of_keys(self) -> bool:
        """Whether heads that share keys have numbers of their own for these."""
        return any(term.side == "key" for term in self.terms)

    @property
    def counts_least(self) -> bool:
        """Whether a row whose scores are all -inf has the extra logit for its LSE, and scores may be -inf."""
        return self.extra is not None and (bool(self.terms or self.inputs) or not _is_finite(self.formula))

    @property
    def counts_keys(self) -> bool:
        """Whether it reads how many keys a query sees."""
        return any(isinstance(below, VisibleReduce) for term in self.terms for below in term.value.below)

    @property
    def has_late_values(self) -> bool:
        """Whether there is something to do while values are multiplied, and registers for it."""
        return self.has_product and not self.reads_pairs

    @property
    def reads_pairs(self) -> bool:
        """Whether something is loaded for every pair."""
        return bool(self.inputs) or any(term.side == "distance" for term in self.terms)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The real inputs that are read pair by pair."""
        own = {term.tensor for term in self.terms}
        found = (n.tensor for n in self.formula.below if isinstance(n, Element) and n.tensor not in own)
        return tuple(dict.fromkeys(found))


def find_score(node: Attend) -> ScoreFormula:
    """The score of an attention over tokens whose weights are made in one pass.

    Raises NotInKernelsError where it has another form.
    """
    if node.keys is not None or node.stack is not None or node.family is not None:
        raise NotInKernelsError("keys of its own")
    kind, formula = weights_of(node)
    if needs_keys(formula):
        what = "scores" if isinstance(node.weights, Softmax) else "weights"
        raise NotInKernelsError(f"{what} that need all keys of a row")
    return _Taking(node).score(kind, formula)


def weights_of(node: Attend) -> tuple[Kind, Value]:
    """How weights are made of a formula, and the formula: of a softmax the score."""
    match node.weights:
        case Softmax():
            return "softmax", node.score
        case Apply(op="share", operands=(own, VisibleReduce(op="sum", condition=Truth(value=True), body=body))) if (
            own is body
        ):
            if isinstance(own, Apply) and own.op == "exp":
                return "softmax", own.operands[0]
            return "share", own
        case weights:
            return "sum", weights


def is_count(node: Node) -> bool:
    """Whether a sum over the keys of a row is how many there are, times a number."""
    match node:
        case VisibleReduce(op="sum", condition=Truth(value=True), body=body):
            return _constant(body) is not None
    return False


def needs_keys(node: Value) -> bool:
    """Whether something is added up over the keys of a row that depends on more than which these are."""
    return any(isinstance(below, VisibleReduce) and not is_count(below) for below in node.below)


_SEVERAL = "several products of vectors, of which more is made than a sum"


class _Taking:
    """Takes a score apart."""

    def __init__(self, node: Attend) -> None:
        self._node = node
        self._terms: list[Term] = []
        self._grouped: set[Value] = set()
        self._products: dict[Value, tuple[Value, Value]] = {}

    def score(self, kind: Kind, formula: Value) -> ScoreFormula:
        formula, weights = self._as_one(self._taken(formula)), self._node.weights
        extra = None
        if isinstance(weights, Softmax) and weights.extra is not None:
            if "k" in reads(weights.extra) or needs_keys(weights.extra):
                raise NotInKernelsError("extra logits that need the keys of a row")
            extra = Term(_tensor("extra", "query"), "query", weights.extra)
        query, key = (tuple(pair[i] for pair in self._products.values()) for i in (0, 1))
        return ScoreFormula(
            formula,
            () if query == (vector("q"),) else query,
            () if key == (vector("k"),) else key,
            self._values(),
            tuple(self._terms),
            extra,
            kind,
            frozenset(self._grouped),
        )

    def _values(self) -> Value | None:
        value = self._node.value
        if value is vector("v"):
            return None
        if rank(value) != 1 or _sides(value) - {"k"} or not _is_alone(value):
            raise NotInKernelsError("values of pairs of queries and keys")
        return value

    def _taken(self, node: Value) -> Value:  # noqa: C901  one case a node kind
        """The formula of a number."""
        if isinstance(node, Dot) and _sides(node) != {"k"}:
            return self._multiplied(node)
        if rank(node):
            raise NotInKernelsError("vectors of pairs of queries and keys")
        if isinstance(node, ValueReduce) and _sides(node) == {"q", "k"}:
            return self._between(node)
        if _is_term(node):
            sides = _sides(node)
            if sides <= {"q"} and not _is_cheap(node):
                return self._term(node, "query")
            if sides == {"k"}:
                return self._term(node, "key")
            if sides == {"q", "k"} and is_difference(node) and _has_inputs(node):
                return self._term(node, "distance")
        constant = _constant(node)
        if constant is not None:
            return number(constant)
        match node:
            case Number() | Ratio() | Scale() | Element():
                return node
            case Apply(op=op, operands=operands):
                return apply(op, *map(self._taken, operands))
            case FloatSelect(condition=condition, then=then, otherwise=otherwise):
                return intern(FloatSelect(condition, self._taken(then), self._taken(otherwise)))
        raise NotInKernelsError(f"{plural(node)} of pairs of queries and keys")

    def _multiplied(self, node: Dot) -> Value:
        left, right = node.left, node.right
        if _sides(left) <= {"k"} and _sides(right) <= {"q"} and _sides(left):
            left, right = right, left
        if not (_sides(left) <= {"q"} and _sides(right) <= {"k"} and _is_alone(left) and _is_alone(right)):
            raise NotInKernelsError("products of vectors that differ from pair to pair")
        result = dot(left, right)
        self._products[result] = left, right
        return result

    def _as_one(self, formula: Value) -> Value:
        """The formula of the one product that kernels compute: of vectors one behind the other, where several are added
        up with constant factors, or nothing else is made of them than their sum.
        """
        one = next(iter(self._products), None) if len(self._products) < 2 else self._joined(formula)
        values: dict[Value, Value] = dict.fromkeys(self._products, number(0.0))
        if one is not None:
            values[one] = dot(vector("q"), vector("k"))
        return replace_values(formula, values)

    def _joined(self, formula: Value) -> Value:
        """The product that stands for all, of which the others' vectors have the factors."""
        found = {d.atom: d for d in derivatives(formula) if d.where is fold.truth(True)}
        if any(product not in found for product in self._products):
            raise NotInKernelsError(_SEVERAL)
        rates = {product: found[product].by for product in self._products}
        one, whole = next(iter(rates.items()))
        if len({*rates.values()}) > 1:
            known = [product for product, rate in rates.items() if _constant(rate)]  # and not 0
            if not known or not all(map(_is_cheap, rates.values())):
                raise NotInKernelsError(_SEVERAL)
            one, whole = known[0], rates[known[0]]
        for product, rate in rates.items():
            left, right = self._products[product]
            if rate is not whole:
                self._products[product] = apply("mul", left, apply("div", rate, whole)), right
        return one

    def _term(self, node: Value, side: Side, half: Literal[0, 1, 2] = 0) -> Value:
        known = next((t for t in self._terms if (t.value, t.side, t.half) == (node, side, half)), None)
        if known is None:
            known = Term(_tensor(f"{side}_{len(self._terms)}", side), side, node, half)
            self._terms.append(known)
        return known.element

    def _between(self, node: ValueReduce) -> Value:
        """A sum over what lies between a key and a query: the sum up to one end less that up to the other."""
        low, high = _index_sides(node.low), _index_sides(node.high)
        body = _sides(node.body) | _index_sides(node.condition)
        ordered = fold.conjunction(self._node.visible, fold.negation(fold.less_equal(node.low, node.high)))
        never = ordered is fold.truth(False)
        if node.op != "sum" or body or {*low} == {*high} or len(low) > 1 or len(high) > 1 or not never:
            raise NotInKernelsError("sums of pairs of queries and keys")
        parts = []
        for end in (node.high, node.low):
            upto = intern(ValueReduce("sum", node.var, fold.const(0), end, node.condition, node.body))
            side: Side = "key" if "k" in _index_sides(end) else "query"
            parts.append([self._term(upto, side, half) for half in (1, 2)])
        (a, a_rest), (b, b_rest) = parts
        first, rest = apply("sub", a, b), apply("sub", a_rest, b_rest)
        result = apply("add", first, rest)
        self._grouped |= {result, first, rest}  # beside a score, which is small, large sums have few digits
        return result


def _tensor(name: str, side: Side) -> Tensor:
    return intern(Tensor(f"of_{name}", "real", ("batch", "head", side)))


def _sides(node: Value) -> set[str]:
    """Return the positions, of `q` and `k`, that a value depends on."""
    return {"q", "k"} & reads(node)


def _index_sides(node: Index) -> set[str]:
    return {below.name for below in node.below if isinstance(below, Position)}


def _is_alone(node: Value) -> bool:
    """Whether a vector can be computed beforehand."""
    return not needs_keys(node)


def _is_term(node: Value) -> bool:
    return rank(node) == 0 and not needs_keys(node)


def _is_cheap(node: Value) -> bool:
    """Whether a number that is the same for all is as well computed by the kernel."""
    leaves = (b for b in node.below if not isinstance(b, Apply | Ratio))
    return all(isinstance(b, Number | Scale | Const) or b in _WIDTHS for b in leaves)


def _constant(node: Value) -> float | None:
    """The value of a formula of constants alone."""
    known: dict[Node, Fraction | float] = {}
    for below in node.below:
        match below:
            case Number(value=value):
                known[below] = value
            case Ratio(num=Const(value=num), den=Const(value=den)) if den:
                known[below] = Fraction(num, den)
            case Const():
                pass
            case Apply(op=op, operands=operands) if all(operand in known for operand in operands):
                try:
                    found = float_arithmetic.apply(op, [known[operand] for operand in operands], floating=True)
                except (ArithmeticFault, EvaluationError):
                    return None
                assert isinstance(found, int | float | Fraction)
                known[below] = found
            case _:
                return None
    return float(known[node])


_FINITE = frozenset(
    (
        "add",
        "sub",
        "neg",
        "mul",
        "abs",
        "min",
        "max",
        "clamp",
        "tanh",
        "sigmoid",
        "softplus",
        "relu",
        "elu",
        "silu",
        "sin",
        "cos",
    )
)
"""Functions that are finite where their operands are."""


def _is_finite(formula: Value) -> bool:
    """Whether a formula is surely finite where its product of vectors, terms and inputs are."""
    for below in formula.below:
        match below:
            case Number(value=value) if not math.isfinite(value):
                return False
            case Apply(op="div", operands=(_, divisor)) if _constant(divisor):
                pass
            case Apply(op=op) if op not in _FINITE:
                return False
            case Ratio(den=den) if not isinstance(den, Const):
                return False
            case _:
                pass
    return True


_WIDTHS = (fold.extent("dk"), fold.extent("dv"))


def _has_inputs(node: Value) -> bool:
    return any(isinstance(below, Element) for below in node.below)
