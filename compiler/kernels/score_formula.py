"""A score split for kernels: one product of vectors, terms that are computed beforehand, and a formula over them.

An expression that depends on the query alone is one number per row (`Term`), one that depends on the key alone is one
number per column, and one that depends on their distance alone is one number per diagonal. Terms and the multiplied
vectors are computed before the kernel, and the kernel returns a gradient for each of them. The formula that is left is
computed by the kernel for every pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from attnc.compiler.analysis.translation import is_difference
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
    fold,
    intern,
)
from attnc.compiler.ir.derivatives import Derivative, derivatives
from attnc.compiler.ir.node_words import plural
from attnc.compiler.ir.rewrite import replace_values
from attnc.compiler.ir.value_nodes import (
    apply,
    dot,
    element,
    number,
    rank,
    reads,
    vector,
)
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning import float_arithmetic
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault
from attnc.spec.number_functions import NUMBER_FUNCTIONS

Side = Literal["query", "key", "distance"]

MOST_SUM = 2.0**28
"""Maximum prefix sum for kernels: up to this, two fp32 numbers hold a sum with errors below 1e-6."""

Kind = Literal["softmax", "share", "sum"]
"""The kind of weights: the softmax of scores; a formula divided by its sum over the row; a formula as it is."""


@dataclass(frozen=True, slots=True)
class Term:
    """A number of every query, key, or distance from query to key, and the tensor that holds it in the formula.

    `half`: for a sum over the tokens between a key and a query, whose terms are the prefix sums up to either end. Each
    is held in two fp32 numbers: 1 is the rounded sum, 2 the rest. 0 for all other terms.
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
        """Whether the term has a gradient."""
        return self.half != 2 and any(isinstance(part, Vec | Element) for part in self.value.below)


LEAST = -1e38
"""Finite score that replaces -inf if there is an extra logit, so that visible keys differ from hidden keys."""


@dataclass(frozen=True, slots=True)
class ScoreFormula:
    """A score as a kernel computes it: a `formula` over `dot(q, k)` and the elements of terms and inputs.

    `query`, `key`: the vectors that replace q and k, concatenated; empty for q and k themselves. `value`: the vector
    that replaces v; None for v itself. `extra`: the extra logit of every query. `kind`: how weights are computed from
    the formula. `grouped`: the parts of the formula that are summed separately, before they are added to the rest.
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
        """Whether the formula contains a product of vectors."""
        return any(isinstance(part, Dot) for part in self.formula.below)

    @property
    def by_product(self) -> Derivative | None:
        """The derivative of the formula by the product; None if there is none."""
        return next((d for d in self.derivatives if isinstance(d.atom, Dot)), None)

    @property
    def derivatives(self) -> tuple[Derivative, ...]:
        """The derivatives of the formula by all of its atoms."""
        return derivatives(self.formula)

    def by_term(self, term: Term) -> Derivative | None:
        """Return the derivative of the formula by a term; None if there is none."""
        return next((d for d in self.derivatives if isinstance(d.atom, Element) and d.atom.tensor is term.tensor), None)

    def shifts_rows(self, term: Term) -> bool:
        """Whether a term of the query is added to all scores of a row: the LSE depends on it, and no weight does.

        The term's gradient is then the gradient of the LSE, less that of an extra logit.
        """
        derivative = self.by_term(term)
        if self.kind != "softmax" or term.side != "query" or derivative is None:
            return False
        return derivative.by is number(1.0) and derivative.where is fold.truth(True)

    @property
    def has_terms_of_keys(self) -> bool:
        """Whether query heads that share a kv head have different terms of the keys."""
        return any(term.side == "key" for term in self.terms)

    @property
    def counts_least(self) -> bool:
        """Whether scores may be -inf and there is an extra logit, which is then the LSE of rows with no other score."""
        return self.extra is not None and (bool(self.terms or self.inputs) or not _is_finite(self.formula))

    @property
    def counts_keys(self) -> bool:
        """Whether the score reads the number of keys that a query sees."""
        return any(isinstance(part, VisibleReduce) for term in self.terms for part in term.value.below)

    @property
    def has_late_values(self) -> bool:
        """Whether values can be multiplied one tile late: there is other work to overlap, and registers for it."""
        return self.has_product and not self.reads_pairs

    @property
    def reads_pairs(self) -> bool:
        """Whether the score loads a number for every pair."""
        return bool(self.inputs) or any(term.side == "distance" for term in self.terms)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The real inputs that the score reads pair by pair."""
        term_tensors = {term.tensor for term in self.terms}
        tensors = (n.tensor for n in self.formula.below if isinstance(n, Element) and n.tensor not in term_tensors)
        return tuple(dict.fromkeys(tensors))


def find_score(node: Attend) -> ScoreFormula:
    """Return the score of an attention over tokens whose weights are computed in one pass over the keys.

    Raises NotInKernelsError if the attention has another form.
    """
    if node.keys is not None or node.stack is not None or node.family is not None:
        raise NotInKernelsError("keys that the pattern computes")
    kind, formula = weights_of(node)
    if needs_keys(formula):
        subject = "scores" if isinstance(node.weights, Softmax) else "weights"
        raise NotInKernelsError(f"{subject} that need all keys of a row")
    return _Taking(node).score(kind, formula)


def weights_of(node: Attend) -> tuple[Kind, Value]:
    """Return the kind of an attention's weights and their formula, which is the score for a softmax."""
    match node.weights:
        case Softmax():
            return "softmax", node.score
        case Apply(op="share", operands=(weight, VisibleReduce(op="sum", condition=Truth(value=True), body=body))) if (
            weight is body
        ):
            if isinstance(weight, Apply) and weight.op == "exp":
                return "softmax", weight.operands[0]
            return "share", weight
        case weights:
            return "sum", weights


def is_count(node: Node) -> bool:
    """Whether a sum over the keys of a row is the number of keys times a constant."""
    match node:
        case VisibleReduce(op="sum", condition=Truth(value=True), body=body):
            return _constant(body) is not None
    return False


def needs_keys(node: Value) -> bool:
    """Whether a value contains a sum over the keys of a row, other than a count of these keys."""
    return any(isinstance(part, VisibleReduce) and not is_count(part) for part in node.below)


_SEVERAL = "several products of vectors that are combined by more than a sum"


class _Taking:
    """Splits a score into products of vectors, terms, and a formula over them."""

    def __init__(self, node: Attend) -> None:
        self._node = node
        self._terms: list[Term] = []
        self._grouped: set[Value] = set()
        self._products: dict[Value, tuple[Value, Value]] = {}

    def score(self, kind: Kind, formula: Value) -> ScoreFormula:
        formula, weights = self._with_one_product(self._formula_of(formula)), self._node.weights
        extra = None
        if isinstance(weights, Softmax) and weights.extra is not None:
            if "k" in reads(weights.extra) or needs_keys(weights.extra):
                raise NotInKernelsError("extra logits that depend on the keys of a row")
            extra = Term(_tensor("extra", "query"), "query", weights.extra)
        query, key = (tuple(pair[i] for pair in self._products.values()) for i in (0, 1))
        return ScoreFormula(
            formula,
            () if query == (vector("q"),) else query,
            () if key == (vector("k"),) else key,
            self._value_vector(),
            tuple(self._terms),
            extra,
            kind,
            frozenset(self._grouped),
        )

    def _value_vector(self) -> Value | None:
        """Return the vector that replaces v; None for v itself."""
        value = self._node.value
        if value is vector("v"):
            return None
        if rank(value) != 1 or _sides(value) - {"k"} or not _is_computable_before(value):
            raise NotInKernelsError("values that depend on both the query and the key")
        return value

    def _formula_of(self, node: Value) -> Value:  # noqa: C901  one case a node kind
        """Return a number's formula, with products and terms taken out of it."""
        if isinstance(node, Dot) and _sides(node) != {"k"}:
            return self._product(node)
        if rank(node):
            raise NotInKernelsError("vectors that depend on both the query and the key")
        if isinstance(node, ValueReduce) and _sides(node) == {"q", "k"}:
            return self._sum_between(node)
        if rank(node) == 0 and not needs_keys(node):
            sides = _sides(node)
            if sides <= {"q"} and not _is_cheap(node):
                return self._add_term(node, "query")
            if sides == {"k"}:
                return self._add_term(node, "key")
            if sides == {"q", "k"} and is_difference(node) and any(isinstance(part, Element) for part in node.below):
                return self._add_term(node, "distance")
        constant = _constant(node)
        if constant is not None:
            return number(constant)
        match node:
            case Number() | Ratio() | Scale() | Element():
                return node
            case Apply(op=op, operands=operands):
                return apply(op, *map(self._formula_of, operands))
            case FloatSelect(condition=condition, then=then, otherwise=otherwise):
                return intern(FloatSelect(condition, self._formula_of(then), self._formula_of(otherwise)))
        raise NotInKernelsError(f"{plural(node)} that depend on both the query and the key")

    def _product(self, node: Dot) -> Value:
        """Return a product with the vector of the query first, and record its vectors."""
        left, right = node.left, node.right
        if _sides(left) <= {"k"} and _sides(right) <= {"q"} and _sides(left):
            left, right = right, left
        if not (
            _sides(left) <= {"q"}
            and _sides(right) <= {"k"}
            and _is_computable_before(left)
            and _is_computable_before(right)
        ):
            raise NotInKernelsError("products of vectors that differ from pair to pair")
        result = dot(left, right)
        self._products[result] = left, right
        return result

    def _with_one_product(self, formula: Value) -> Value:
        """Return the formula over the one product that kernels compute.

        Several products become one product of concatenated vectors if the formula reads only their sum, or their sum
        with constant factors.
        """
        product = next(iter(self._products), None) if len(self._products) < 2 else self._common_product(formula)
        values: dict[Value, Value] = dict.fromkeys(self._products, number(0.0))
        if product is not None:
            values[product] = dot(vector("q"), vector("k"))
        return replace_values(formula, values)

    def _common_product(self, formula: Value) -> Value:
        """Return the product that represents all; relative factors are multiplied into the vectors of the others."""
        derivatives_by_atom = {d.atom: d for d in derivatives(formula) if d.where is fold.truth(True)}
        if any(product not in derivatives_by_atom for product in self._products):
            raise NotInKernelsError(_SEVERAL)
        rates = {product: derivatives_by_atom[product].by for product in self._products}
        common, common_rate = next(iter(rates.items()))
        if len({*rates.values()}) > 1:
            constant_products = [product for product, rate in rates.items() if _constant(rate)]  # and not 0
            if not constant_products or not all(map(_is_cheap, rates.values())):
                raise NotInKernelsError(_SEVERAL)
            common, common_rate = constant_products[0], rates[constant_products[0]]
        for product, rate in rates.items():
            left, right = self._products[product]
            if rate is not common_rate:
                self._products[product] = apply("mul", left, apply("div", rate, common_rate)), right
        return common

    def _add_term(self, node: Value, side: Side, half: Literal[0, 1, 2] = 0) -> Value:
        """Return the element of the term for a number; equal numbers share a term."""
        term = next((t for t in self._terms if (t.value, t.side, t.half) == (node, side, half)), None)
        if term is None:
            term = Term(_tensor(f"{side}_{len(self._terms)}", side), side, node, half)
            self._terms.append(term)
        return term.element

    def _sum_between(self, node: ValueReduce) -> Value:
        """Return a sum over the tokens between a key and a query as the difference of prefix sums up to its ends."""
        low, high = _index_sides(node.low), _index_sides(node.high)
        body = _sides(node.body) | _index_sides(node.condition)
        ordered = fold.conjunction(self._node.visible, fold.negation(fold.less_equal(node.low, node.high)))
        never = ordered is fold.truth(False)
        if node.op != "sum" or body or {*low} == {*high} or len(low) > 1 or len(high) > 1 or not never:
            raise NotInKernelsError("sums that depend on both the query and the key")
        parts = []
        for end in (node.high, node.low):
            upto = intern(ValueReduce("sum", node.var, fold.const(0), end, node.condition, node.body))
            side: Side = "key" if "k" in _index_sides(end) else "query"
            parts.append([self._add_term(upto, side, half) for half in (1, 2)])
        (a, a_rest), (b, b_rest) = parts
        first, rest = apply("sub", a, b), apply("sub", a_rest, b_rest)
        result = apply("add", first, rest)
        self._grouped |= {result, first, rest}  # large sums added to a small score would cost its digits
        return result


def _tensor(name: str, side: Side) -> Tensor:
    return intern(Tensor(f"of_{name}", "real", ("batch", "head", side)))


def _sides(node: Value) -> set[str]:
    """Return the positions, of `q` and `k`, that a value depends on."""
    return {"q", "k"} & reads(node)


def _index_sides(node: Index) -> set[str]:
    return {part.name for part in node.below if isinstance(part, Position)}


def _is_computable_before(node: Value) -> bool:
    """Whether a vector can be computed before the kernel."""
    return not needs_keys(node)


def _is_cheap(node: Value) -> bool:
    """Whether a number is computed from constants, the scale and widths, so that the kernel may compute it."""
    leaves = (b for b in node.below if not isinstance(b, Apply | Ratio))
    return all(isinstance(b, Number | Scale | Const) or b in _WIDTHS for b in leaves)


def _constant(node: Value) -> float | None:
    """Return the value of a formula of constants; None if it has other parts, or its evaluation fails."""
    values: dict[Node, Fraction | float] = {}
    for part in node.below:
        match part:
            case Number(value=value):
                values[part] = value
            case Ratio(num=Const(value=num), den=Const(value=den)) if den:
                values[part] = Fraction(num, den)
            case Const():
                pass
            case Apply(op=op, operands=operands) if all(operand in values for operand in operands):
                try:
                    result = float_arithmetic.apply(op, [values[operand] for operand in operands], floating=True)
                except (ArithmeticFault, EvaluationError):
                    return None
                assert isinstance(result, int | float | Fraction)
                values[part] = result
            case _:
                return None
    return float(values[node])


_FINITE = {"add", "sub", "neg", "mul", "min", "max", "clamp"}
_FINITE |= {name for name, function in NUMBER_FUNCTIONS.items() if function.is_finite}
"""Functions that are finite where their operands are."""


def _is_finite(formula: Value) -> bool:
    """Whether a formula is certainly finite if its product of vectors, its terms and its inputs are finite."""
    for part in formula.below:
        match part:
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
