"""Folding constructors, which build every exact expression in normal form.

Sums are `Linear`; comparisons are `Compare` of a difference; `//` and `%` by a positive constant are simplified by
terms that the constant divides; conjunctions and disjunctions are flat. All rules hold for unbounded integers and for
`//` and `%` that round down.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd
from typing import Literal

from attnc.compiler.ir.integer_operations import INTEGER_FUNCTIONS
from attnc.compiler.ir.nodes import (
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    Data,
    DataRead,
    ExactSelect,
    Extent,
    HeadIndex,
    Index,
    Linear,
    Lookup,
    Not,
    Position,
    TableRead,
    Tensor,
    Truth,
    UnitCondition,
    Var,
    intern,
    is_truth,
)
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault

WORD = 1 << 63

# --- leaves ----------------------------------------------------------------------------------------------------------


def const(value: int) -> Index:
    """Return an integer constant."""
    return intern(Const(value))


def truth(value: bool) -> Index:
    """Return a constant truth value."""
    return intern(Truth(value))


def place(name: Literal["q", "k"]) -> Index:
    """Return the position of the current query or key."""
    return _PLACES[name]


def head_index(name: str) -> Index:
    """Return the index of the current `head`, `kv_head` or `batch` entry."""
    return _HEAD_INDICES.get(name) or intern(HeadIndex(name))


def extent(name: str) -> Index:
    """Return a size known at the call."""
    return _EXTENTS.get(name) or intern(Extent(name))


# Leaves that are asked for in every call, and are never dropped.
_PLACES: dict[str, Position] = {name: intern(Position(name)) for name in ("q", "k")}
_HEAD_INDICES = {name: intern(HeadIndex(name)) for name in ("head", "kv_head", "batch")}
_EXTENTS = {name: intern(Extent(name)) for name in ("queries", "keys", "heads", "kv_heads", "group")}


def var(name: str, serial: int) -> Var:
    """Return the variable of an aggregate."""
    return intern(Var(name, serial))


def lookup(tensor: Tensor, indices: tuple[Index, ...]) -> Index:
    """Return an element of an input."""
    return intern(Lookup(tensor, indices))


def data_read(data: Data, indices: tuple[Index, ...]) -> Index:
    """Return an element of an array; an element at constant indices within bounds is read at once."""
    values = [i.value for i in indices if isinstance(i, Const)]
    is_constant = data.cut is None and len(values) == len(indices)
    if is_constant and all(0 <= i < n for i, n in zip(values, data.array.shape, strict=True)):
        item = data.array[tuple(values)].item()
        return truth(item) if isinstance(item, bool) else const(item)
    return intern(DataRead(data, indices))


def coord(position: Index, offset: Index, stride: Index, modulus: Index | None, name: str) -> Index:
    """Return a coordinate of a position; see `ir.Coord`."""
    return intern(Coord(position, offset, stride, modulus, name))


def table_read(values: tuple[int, ...], index: Index) -> Index:
    """Return an entry of a constant table; a table of equal entries by head becomes that entry."""
    if isinstance(index, Const) and 0 <= index.value < len(values):
        return const(values[index.value])
    if isinstance(index, HeadIndex) and len(set(values)) == 1:
        return const(values[0])
    return intern(TableRead(values, index))


# --- sums ------------------------------------------------------------------------------------------------------------


def parts(node: Index) -> tuple[tuple[tuple[Index, int], ...], int]:
    """Split a node into terms with coefficients, and a constant."""
    match node:
        case Const():
            return (), node.value
        case Linear():
            return node.terms, node.constant
        case _:
            return ((node, 1),), 0


def linear(terms: Iterable[tuple[Index, int]], constant: int) -> Index:
    """Return `Σ coefficient · term + constant` in normal form; `c · (x // c) + x % c` becomes x."""
    total: dict[Index, int] = {}
    for term, coefficient in terms:
        total[term] = total.get(term, 0) + coefficient
    _join_quotients(total)
    kept = sorted(((t, c) for t, c in total.items() if c), key=lambda item: item[0].digest)
    if not kept:
        return const(constant)
    if len(kept) == 1 and kept[0][1] == 1 and constant == 0:
        return kept[0][0]
    return intern(Linear(tuple(kept), constant))


def _join_quotients(total: dict[Index, int]) -> None:
    remainders = [t for t, c in total.items() if c and isinstance(t, Arith) and t.op == "mod"]
    for remainder in remainders:
        assert isinstance(remainder, Arith)
        value, divisor = remainder.operands
        if not isinstance(divisor, Const):
            continue
        coefficient = total[remainder]
        quotient = floordiv(value, divisor)
        value_terms, value_constant = parts(value)
        if value_constant or len(value_terms) != 1 or total.get(quotient) != coefficient * divisor.value:
            continue
        total[remainder] = total[quotient] = 0
        term, factor = value_terms[0]
        total[term] = total.get(term, 0) + coefficient * factor


def add(*nodes: Index) -> Index:
    """Return the sum of any number of nodes."""
    terms: list[tuple[Index, int]] = []
    constant = 0
    for node in nodes:
        node_terms, c = parts(node)
        terms.extend(node_terms)
        constant += c
    return linear(terms, constant)


def times(node: Index, factor: int) -> Index:
    """Return a node times an integer."""
    terms, constant = parts(node)
    return linear([(t, c * factor) for t, c in terms], constant * factor)


def sub(a: Index, b: Index) -> Index:
    """Return `a - b`."""
    return add(a, times(b, -1))


def mul(a: Index, b: Index) -> Index:
    """Return `a * b`."""
    if isinstance(a, Const):
        return times(b, a.value)
    if isinstance(b, Const):
        return times(a, b.value)
    first, second = sorted((a, b), key=lambda node: node.digest)
    return intern(Arith("mul", (first, second)))


# --- division --------------------------------------------------------------------------------------------------------


def _split(node: Index, divisor: int) -> tuple[Index, Index]:
    """Split a node by its coefficients into `divisor · whole + rest`, and return `whole` and `rest`."""
    terms, constant = parts(node)
    whole = [(t, c // divisor) for t, c in terms if c % divisor == 0]
    rest = [(t, c) for t, c in terms if c % divisor]
    return linear(whole, constant // divisor), linear(rest, constant % divisor)


def floordiv(a: Index, b: Index) -> Index:
    """Return `a // b`, rounded down."""
    if not isinstance(b, Const) or b.value <= 0:
        if isinstance(a, Const) and isinstance(b, Const) and b.value:
            return const(a.value // b.value)
        return intern(Arith("floordiv", (a, b)))
    if b.value == 1:
        return a
    whole, rest = _split(a, b.value)
    if isinstance(rest, Const):
        return whole  # 0 <= rest < divisor
    if isinstance(rest, Arith) and rest.op == "floordiv" and isinstance(rest.operands[1], Const):
        inner, divisor = rest.operands
        assert isinstance(divisor, Const)
        if divisor.value > 0:
            return add(whole, floordiv(inner, const(divisor.value * b.value)))
    if isinstance(rest, Arith) and rest.op == "mod" and isinstance(rest.operands[1], Const):
        divisor = rest.operands[1]
        assert isinstance(divisor, Const)
        if 0 < divisor.value <= b.value:
            return whole
    return add(whole, intern(Arith("floordiv", (rest, b))))


def mod(a: Index, b: Index) -> Index:
    """Return `a % b`, with the sign of b."""
    if not isinstance(b, Const) or b.value <= 0:
        if isinstance(a, Const) and isinstance(b, Const) and b.value:
            return const(a.value % b.value)
        return intern(Arith("mod", (a, b)))
    _, rest = _split(a, b.value)
    if isinstance(rest, Const):
        return rest
    if isinstance(rest, Arith) and rest.op == "mod" and isinstance(rest.operands[1], Const):
        inner = rest.operands[1]
        assert isinstance(inner, Const)
        if 0 < inner.value <= b.value:
            return rest
    return intern(Arith("mod", (rest, b)))


def power(base: Index, exponent: Index) -> Index:
    """Return `base ** exponent` for an exponent ≥ 0. A constant beyond 64 bits is kept, and faults when evaluated."""
    if isinstance(exponent, Const) and exponent.value in (0, 1):
        return const(1) if exponent.value == 0 else base
    if isinstance(base, Const) and base.value == 1:
        return base
    if isinstance(base, Const) and isinstance(exponent, Const) and 0 <= exponent.value < 64:
        value = base.value**exponent.value
        if -WORD <= value < WORD:
            return const(value)
    return intern(Arith("pow", (base, exponent)))


# --- other integer functions -----------------------------------------------------------------------------------------


def _extreme(op: Literal["min", "max"], nodes: Iterable[Index]) -> Index:
    flat: list[Index] = []
    for node in nodes:
        flat.extend(node.operands if isinstance(node, Arith) and node.op == op else (node,))
    kept: list[Index] = []
    for node in flat:
        if not any(_beats(op, other, node) for other in kept):
            kept = [other for other in kept if not _beats(op, node, other)] + [node]
    if len(kept) == 1:
        return kept[0]
    return intern(Arith(op, tuple(sorted(kept, key=lambda node: node.digest))))


def _beats(op: str, a: Index, b: Index) -> bool:
    """Whether a is provably at least as extreme as b, because they differ by a constant."""
    difference = sub(a, b)
    if not isinstance(difference, Const):
        return False
    return difference.value <= 0 if op == "min" else difference.value >= 0


def minimum(*nodes: Index) -> Index:
    """Return the least node; of two nodes that differ by a constant, only the smaller is kept."""
    return _extreme("min", nodes)


def maximum(*nodes: Index) -> Index:
    """Return the greatest node; of two nodes that differ by a constant, only the larger is kept."""
    return _extreme("max", nodes)


def absolute(node: Index) -> Index:
    """Return the absolute value of a node."""
    if isinstance(node, Const):
        return const(abs(node.value))
    opposite = times(node, -1)  # |x| = |-x|: a single normal form for both
    return intern(Arith("abs", (min(node, opposite, key=lambda n: n.digest),)))


def function(op: str, *operands: Index) -> Index:
    """Return a function of `INTEGER_FUNCTIONS` of operands. Constants outside the domain fault when evaluated."""
    values = [n.value for n in operands if isinstance(n, Const)]
    if len(values) == len(operands):
        try:
            return const(int(INTEGER_FUNCTIONS[op].evaluate(*values)))
        except ArithmeticFault:
            pass
    return intern(Arith(op, operands))


# --- truth values ----------------------------------------------------------------------------------------------------


def nonnegative(node: Index) -> Index:
    """Return the condition `node >= 0`."""
    terms, constant = parts(node)
    if not terms:
        return truth(constant >= 0)
    divisor = gcd(*(c for _, c in terms))
    return intern(Compare("ge", linear([(t, c // divisor) for t, c in terms], constant // divisor)))


def zero(node: Index) -> Index:
    """Return the condition `node == 0`."""
    terms, constant = parts(node)
    if not terms:
        return truth(constant == 0)
    divisor = gcd(*(c for _, c in terms))
    if constant % divisor:
        return truth(False)
    if terms[0][1] < 0:
        divisor = -divisor
    return intern(Compare("eq", linear([(t, c // divisor) for t, c in terms], constant // divisor)))


def less_equal(a: Index, b: Index) -> Index:
    """Return the condition `a <= b`."""
    return nonnegative(sub(b, a))


def less(a: Index, b: Index) -> Index:
    """Return the condition `a < b`."""
    return nonnegative(add(b, times(a, -1), const(-1)))


def equal(a: Index, b: Index) -> Index:
    """Return the condition `a == b` of two integers or two truth values."""
    if is_truth(a):
        return choice(a, b, negation(b))
    return zero(sub(a, b))


def negation(node: Index) -> Index:
    """Return `not node`."""
    match node:
        case Truth():
            return truth(not node.value)
        case Not():
            return node.operand
        case Compare(op="ge"):
            return nonnegative(add(times(node.value, -1), const(-1)))
        case _:
            return intern(Not(node))


def _junction(op: Literal["and", "or"], nodes: Iterable[Index]) -> Index:
    neutral = op == "and"
    kept: dict[Index, None] = {}
    for node in nodes:
        for operand in node.operands if isinstance(node, Bool) and node.op == op else (node,):
            if isinstance(operand, Truth):
                if operand.value != neutral:
                    return operand  # this drops faults of earlier operands
            else:
                kept[operand] = None
    operands = _tightened(op, tuple(kept))
    if not operands:
        return truth(neutral)
    return operands[0] if len(operands) == 1 else intern(Bool(op, operands))


def _tightened(op: Literal["and", "or"], operands: tuple[Index, ...]) -> tuple[Index, ...]:
    """Keep the tightest bound of each sum at the place of its first bound, so that it still guards later operands."""
    bounds: dict[tuple[tuple[Index, int], ...], list[Compare]] = {}
    for operand in operands:
        if isinstance(operand, Compare) and operand.op == "ge":
            bounds.setdefault(parts(operand.value)[0], []).append(operand)
    if any(_crosses(op, terms, same, bounds) for terms, same in bounds.items()):
        return (truth(op == "or"),)
    extreme = min if op == "and" else max
    deciding = {terms: extreme(same, key=lambda sign: parts(sign.value)[1]) for terms, same in bounds.items()}
    result: dict[Index, None] = {}
    for operand in operands:
        if isinstance(operand, Compare) and operand.op == "ge":
            result[deciding[parts(operand.value)[0]]] = None
        else:
            result[operand] = None
    return tuple(result)


_Terms = tuple[tuple[Index, int], ...]


def _crosses(op: str, terms: _Terms, same: list[Compare], bounds: dict[_Terms, list[Compare]]) -> bool:
    """Whether lower and upper bounds of a sum exclude every value (`and`), or together allow every value (`or`)."""
    opposite = bounds.get(tuple((term, -factor) for term, factor in terms), [])
    extreme = min if op == "and" else max
    if not opposite:
        return False
    room = extreme(parts(s.value)[1] for s in same) + extreme(parts(s.value)[1] for s in opposite)
    return room < 0 if op == "and" else room >= -1


def product(factors: Iterable[Index]) -> Index:
    """Return the product of factors, left to right."""
    result: Index = const(1)
    for factor in factors:
        result = mul(result, factor)
    return result


def conjunction(*nodes: Index) -> Index:
    """Return the `and` of any number of nodes, left to right."""
    return _junction("and", nodes)


def disjunction(*nodes: Index) -> Index:
    """Return the `or` of any number of nodes, left to right."""
    return _junction("or", nodes)


def choice(condition: Index, then: Index, otherwise: Index) -> Index:
    """Return `then if condition else otherwise`."""
    if isinstance(condition, Truth):
        return then if condition.value else otherwise
    if then is otherwise:
        return then
    if isinstance(condition, Not):
        return choice(condition.operand, otherwise, then)
    if isinstance(then, Truth):
        return disjunction(condition, otherwise) if then.value else conjunction(negation(condition), otherwise)
    if isinstance(otherwise, Truth):
        return disjunction(negation(condition), then) if otherwise.value else conjunction(condition, then)
    return intern(ExactSelect(condition, then, otherwise))


# --- blocks ----------------------------------------------------------------------------------------------------------


def rounded(
    q_vars: tuple[Var, ...],
    q_units: tuple[Index, ...],
    k_vars: tuple[Var, ...],
    k_units: tuple[Index, ...],
    keep: Index,
) -> Index:
    """Return a condition on blocks; see `ir.UnitCondition`."""
    return keep if isinstance(keep, Truth) else intern(UnitCondition(q_vars, q_units, k_vars, k_units, keep))
