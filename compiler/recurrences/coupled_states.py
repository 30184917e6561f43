"""Coupled states: states that read each other by numeric factors and by corrections of rank one.

With `S_j` the states before a token, every version of a state is `Σ f_j S_j + Σ w_p u_p e_pᵀ`. The factors f and w are
any real numbers that do not depend on states, and `e_p = v_p + Σ rᵀ S` with earlier versions S. A line `M = a * M + P`
after P's step passes P's impulse on to M, and a line with a choice, `M if t % n == 0 else N`, has factors of 0 and 1.
Titans (Behrouz et al. 2024) is an example: momentum, forgetting, and gradients at the first weights of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import cast

from attnc.compiler import ir
from attnc.compiler.ir import StateAt, Step, Value
from attnc.compiler.ir.value_nodes import (
    apply,
    dot,
    number,
    select,
)
from attnc.compiler.recurrences.affine import plus, times
from attnc.compiler.recurrences.derived import Coupled, Impulse, Mix, Mixed, NoFormError
from attnc.compiler.recurrences.monomials import Expansion, Factor, Labels, Monomial, NonlinearError, product_of
from attnc.compiler.recurrences.signs import is_one
from attnc.compiler.recurrences.term_vectors import signed


class ReadEachOtherError(NoFormError):
    """Raised for states that read each other in a way that is not supported. The message says which operation."""


@dataclass(eq=False)
class CoupledTrace:
    """Follows the steps of a group of states: their versions as mixes, the impulses of a token, and the reads."""

    states: tuple[ir.State, ...]
    _versions: dict[tuple[str, int], Mix] = field(default_factory=dict)
    _impulses: list[Impulse] = field(default_factory=list)
    _reads: list[Mixed] = field(default_factory=list)

    def __post_init__(self) -> None:
        first, count = self.states[0], len(self.states)
        for index, state in enumerate(self.states):
            if state.dims != first.dims:
                raise NoFormError(f"different axes of `{first.name}` and `{state.name}`")
            if state.is_complex or state.start or not 1 <= len(state.dims) <= 2:
                raise NoFormError(f"a state other than a real vector or matrix that starts at 0 (`{state.name}`)")
            self._versions[state.name, 0] = Mix(_unit(index, count))

    def of(self, state: StateAt) -> Mix:
        """Return a version of a state as a mix."""
        result = self._versions.get((state.name, state.version))
        if result is None:
            raise NoFormError(f"a read of `{state.name}`, which is computed separately from `{self.states[0].name}`")
        return result

    def take(self, step: Step) -> None:
        """Follow a line: a sum of multiples of versions, and impulses; terms with the same u become one impulse."""
        if step.repeat is not None:
            raise NoFormError(f"a repeated step of `{step.state}`")
        expansion = Expansion()
        labels = expansion.labels(len(self.states[0].dims))
        total, written_by_left = Mix(_zeros(len(self.states))), dict[tuple[bytes, ...], _ImpulseDraft]()
        for term in expansion.of(step.value, labels):
            parts = _split_term(term, labels)
            if parts.read is None and term.state is not None:
                if parts.rows or parts.columns:
                    raise NoFormError(f"a factor of `{term.state.name}` that is not a number")
                total = _sum(total, _multiple(self.of(term.state), parts.number))
                continue
            written_impulse = written_by_left.setdefault(
                tuple(sorted(x.digest for x in parts.rows)), _ImpulseDraft(_product(parts.rows))
            )
            if term.state is None:
                written_impulse.value = plus(written_impulse.value, _product([parts.number, *parts.columns]))
            elif parts.columns:
                raise NoFormError(f"a correction of `{step.state}` that differs between columns")
            else:
                assert parts.read is not None
                written_impulse.add(parts.read, _multiple(self.of(term.state), parts.number))
        for written_impulse in written_by_left.values():
            total = _sum(total, Mix((), _unit(len(self._impulses), len(self._impulses) + 1)))
            self._impulses.append(written_impulse.impulse())
        self._versions[step.state, step.version + 1] = total

    def read(self, state: StateAt, query: Value) -> str:
        """Record a read `qᵀ S` of a state; return the name of its tensor."""
        name = f"#{state.name}.{len(self._reads)}"
        self._reads.append(Mixed(name, query, self.of(state)))
        return name

    def stage(self) -> Coupled:
        """Return the stage of the group. Raises NoFormError if nothing is ever written to its states."""
        if not self._impulses:
            raise NoFormError(f"states that nothing writes to (`{self.states[0].name}`)")
        last = dict(sorted(self._versions))
        after = tuple(self._versions[state.name, last[state.name]] for state in self.states)
        return Coupled(self.states, tuple(self._impulses), after, tuple(self._reads))


def follow(
    states: Sequence[ir.State], lines: Sequence[Step], has_pass: Callable[[ir.State], bool]
) -> dict[str, CoupledTrace]:
    """Return the traces of states that read each other or have no pass, by state name."""
    result: dict[str, CoupledTrace] = {}
    for group in _groups(states, lines):
        if len(group) == 1 and has_pass(group[0]):
            continue
        names = [state.name for state in group]
        try:
            trace = CoupledTrace(group)
            for line in lines:
                if line.state in names:
                    trace.take(line)
        except (NonlinearError, NoFormError) as error:
            if len(group) == 1:
                raise
            listed = " and ".join(f"`{name}`" for name in names)
            raise ReadEachOtherError(f"{listed} read each other, which is not supported with {error}") from error
        result |= dict.fromkeys(names, trace)
    return result


def _groups(states: Sequence[ir.State], lines: Sequence[Step]) -> list[tuple[ir.State, ...]]:
    """Return groups of states that read each other's versions, directly or through other states."""
    group = {state.name: {state.name} for state in states}
    for line in lines:
        for node in cast("tuple[Value, ...]", line.value.below):
            if line.state in group and isinstance(node, StateAt) and node.name in group:
                joined = group[line.state] | group[node.name]
                group |= dict.fromkeys(joined, joined)
    groups = dict.fromkeys(frozenset(group[state.name]) for state in states)
    return [tuple(state for state in states if state.name in names) for names in groups]


@dataclass(frozen=True)
class _TermFactors:
    """The factors of a term: numbers as one product, factors along rows, along columns, and along the read axis."""

    number: Value
    rows: list[Value]
    columns: list[Value]
    read: Value | None


def _split_term(term: Monomial, labels: Labels) -> _TermFactors:
    """Split a term into its factors. Raises NoFormError unless it is a multiple of a state or of rank one."""
    bound: Labels = ()
    if term.state is not None and term.labels != labels:
        first, *others = term.labels
        if first in labels or tuple(others) != labels[1:]:
            raise NoFormError(f"a correction by `{term.state.name}` that does not contract its first axis")
        bound = (first,)
    rows, columns, numbers, read = list[Value](), list[Value](), list[Value](), list[Value]()
    factors_by_labels = {(): numbers, labels[:1]: rows, bound: read} if bound else {(): numbers, labels[:1]: rows}
    if labels[1:]:
        factors_by_labels[labels[1:]] = columns
    for factor in _without_inner_axes(term.factors, labels + bound):
        if factor.labels not in factors_by_labels:
            raise NoFormError("a matrix that is not a product of two vectors")
        factors_by_labels[factor.labels].append(factor.value)
    if bound and not read:
        raise NoFormError("a sum over the rows of a state")
    return _TermFactors(signed(_product(numbers), term.negative), rows, columns, _product(read) if bound else None)


def _without_inner_axes(factors: Sequence[Factor], outer: Labels) -> Iterator[Factor]:
    """Yield the factors; products of vectors over axes outside `outer` become numbers."""
    inner = dict.fromkeys(label for factor in factors for label in factor.labels if label not in outer)
    alone = [label for label in inner if all(f.labels == (label,) for f in factors if label in f.labels)]
    for label in alone:
        first, *others = (f.value for f in factors if f.labels == (label,))
        yield Factor(dot(first, _product(others)), ())
    yield from (f for f in factors if not set(f.labels) & set(alone))


@dataclass
class _ImpulseDraft:
    """An impulse of a line, collected term by term."""

    left: Value
    value: Value | None = None
    _reads: dict[Value, Mix] = field(default_factory=dict)

    def add(self, read: Value, of: Mix) -> None:
        """Add a read of a mix by a vector; reads by the same vector are added up."""
        self._reads[read] = _sum(self._reads[read], of) if read in self._reads else of

    def impulse(self) -> Impulse:
        """Return the finished impulse."""
        return Impulse(self.left, self.value, tuple(self._reads.items()))


# --- mixes -----------------------------------------------------------------------------------------------------------


def _zeros(count: int) -> tuple[Value | None, ...]:
    return (None,) * count


def _unit(index: int, count: int) -> tuple[Value | None, ...]:
    return *_zeros(index), number(1.0), *_zeros(count - index - 1)


def _sum(a: Mix, b: Mix) -> Mix:
    states, impulses = (zip_longest(*pair) for pair in ((a.states, b.states), (a.impulses, b.impulses)))
    return Mix(tuple(plus(x, y) for x, y in states), tuple(plus(x, y) for x, y in impulses))


def _multiple(mix: Mix, factor: Value) -> Mix:
    states, impulses = (tuple(times(x, factor) for x in part) for part in (mix.states, mix.impulses))
    return Mix(states, impulses)


def _product(values: Sequence[Value]) -> Value:
    return product_of([value for value in values if not is_one(value)])


def may_be(node: Value | None, known: dict[Value, Value]) -> Value:
    """Return 1 where a factor may be nonzero, 0 where exact conditions select 0 for all real inputs; `known`: cache."""
    if node is None:
        return number(0.0)
    if node not in known:
        known[node] = _may_be(node, known)
    return known[node]


def _may_be(node: Value, known: dict[Value, Value]) -> Value:
    match node:
        case ir.Number(value=value):
            return number(float(value != 0))
        case ir.FloatSelect(condition=condition, then=then, otherwise=otherwise):
            return select(condition, may_be(then, known), may_be(otherwise, known))
        case ir.Apply(op="neg", operands=(inner,)):
            return may_be(inner, known)
        case ir.Apply(op="mul", operands=(a, b)):
            return _product([may_be(a, known), may_be(b, known)])
        case ir.Apply(op="add" | "sub", operands=(a, b)):
            return apply("max", may_be(a, known), may_be(b, known))
    return number(1.0)
