"""A recurrence as passes over its states, each of which is computed chunk by chunk.

Every line that is linear in its state is `S ← D ⊙ S + Σ u (rᵀ S) + Σ k vᵀ`. Lines stay a product: a decay and a
correction after it are one step in which the correction sees the decayed state; a repeated line is several. What a
token reads is taken apart into reads `qᵀ S` that are linear in one state, and a formula of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from attnc.compiler import fold, ir
from attnc.compiler.ir import Loop, Recur, StateAt, Step, Value
from attnc.compiler.recurrences.monomials import (
    Expansion,
    Factor,
    Labels,
    Monomial,
    NonlinearError,
    product_of,
    reads_state,
)
from attnc.compiler.recurrences.signs import is_one, sign_of
from attnc.compiler.rewrite import replace_values
from attnc.compiler.values import apply, axes, element, number, state_at

Side = Literal["scalar", "rows", "columns"]


class NoFormError(Exception):
    """A recurrence that is run token by token. The message says why."""


@dataclass(frozen=True)
class Decay:
    """`D`: its logarithm, at most 0, of each row, of each column, or one for all."""

    log: Value
    side: Side


@dataclass(frozen=True)
class Correction:
    """`u (rᵀ S)`, of the decayed state or of the one before. `merged`: u is minus the write's key (delta rules)."""

    left: Value
    read: Value
    sees: Literal["decayed", "old"]
    merged: bool


@dataclass(frozen=True)
class Micro:
    """One step of a state: decay, correction and write `k vᵀ`; so often as `repeat` says, the decay the first time."""

    decay: Decay | None = None
    correction: Correction | None = None
    write: tuple[Value, Value] | None = None
    repeat: Loop | None = None


@dataclass(frozen=True)
class Taken:
    """`qᵀ S` of every token, before its steps or after them, as the tensor `name`."""

    name: str
    query: Value
    before: bool


@dataclass(frozen=True)
class Pass:
    """A state with its steps, and what is read of it. A vector is a matrix of one column."""

    state: ir.State
    steps: tuple[Micro, ...]
    reads: tuple[Taken, ...]


@dataclass(frozen=True)
class LogSum:
    """A state that becomes `logaddexp(state, x)`: before and after each token, as the tensors of these names."""

    state: ir.State
    added: Value
    before: str
    after: str


@dataclass(frozen=True)
class Derived:
    """Passes in their order, and what a token gets of their reads."""

    stages: tuple[Pass | LogSum, ...]
    result: Value

    def __str__(self) -> str:
        from attnc.compiler.recurrences.print_derived import print_derived

        return print_derived(self)


def derive(recur: Recur) -> Derived:
    """The passes of a recurrence. Raises NoFormError where it has no such form."""
    try:
        return _Deriving(recur).derive()
    except NonlinearError as error:
        raise NoFormError(str(error)) from error


@dataclass
class _Deriving:
    recur: Recur
    _known: dict[Value, Value] = field(default_factory=dict)
    """States and reads that are computed before, as elements of tensors."""

    def derive(self) -> Derived:
        recur = self.recur
        last = {state.name: sum(step.state == state.name for step in recur.steps) for state in recur.states}
        stages: list[Pass | LogSum] = [
            found for state in recur.states if (found := self._log_sum(state, self._steps(state))) is not None
        ]
        others = [state for state in recur.states if state not in [stage.state for stage in stages]]
        steps = {state.name: self._passed(state) for state in others}
        result, taken = self._result(last)
        stages += [Pass(state, steps[state.name], tuple(taken.get(state.name, ()))) for state in others]
        return Derived(self._in_order(stages, taken), result)

    def _steps(self, state: ir.State) -> list[Step]:
        return [step for step in self.recur.steps if step.state == state.name]

    def _in_order(self, stages: list[Pass | LogSum], taken: dict[str, list[Taken]]) -> tuple[Pass | LogSum, ...]:
        """Those whose reads others use first."""
        names = {one.name: state for state, many in taken.items() for one in many}
        order, waiting = list[Pass | LogSum](), list(stages)
        while waiting:
            done = {stage.state.name for stage in order}
            ready = next(
                (s for s in waiting if isinstance(s, LogSum) or _needs(s, names) <= done | {s.state.name}), None
            )
            if ready is None:
                raise NoFormError("states that read each other")
            waiting.remove(ready)
            order.append(ready)
        return tuple(order)

    # --- named sums --------------------------------------------------------------------------------------------------

    def _log_sum(self, state: ir.State, steps: Sequence[Step]) -> LogSum | None:
        if len(steps) != 1 or steps[0].repeat is not None:
            return None
        value, own = steps[0].value, state_at(state.name, 0, state.dims)
        if not (isinstance(value, ir.Apply) and value.op == "logaddexp" and own in value.operands):
            return None
        (added,) = (operand for operand in value.operands if operand is not own)
        if reads_state(added):
            return None
        before, after = f"#{state.name}.before", f"#{state.name}.after"
        self._known[own] = _tensor(before, state.dims)
        self._known[value] = self._known[state_at(state.name, 1, state.dims)] = _tensor(after, state.dims)
        self._bounded.add((self._known[own], self._known[value]))
        return LogSum(state, added, before, after)

    _bounded: set[tuple[Value, Value]] = field(default_factory=set)
    """Pairs of values of which the first is at most the second."""

    # --- steps -------------------------------------------------------------------------------------------------------

    def _passed(self, state: ir.State) -> tuple[Micro, ...]:
        """The steps of a state, a decay together with what follows it."""
        found: list[Micro] = []
        for step in self._steps(state):
            micro = self._micro(state, step)
            before = found[-1] if found else None
            alone = before is not None and before.correction is None and before.write is None and before.repeat is None
            if alone and before is not None and micro.decay is None:
                found[-1] = Micro(before.decay, micro.correction, micro.write, micro.repeat)
            else:
                found.append(micro)
        for micro in found[1:]:
            if micro.decay is not None:
                raise NoFormError(f"a decay of `{state.name}` after its correction")
        return tuple(found)

    def _micro(self, state: ir.State, step: Step) -> Micro:
        value = replace_values(step.value, self._known)
        expansion = Expansion()
        labels = expansion.labels(len(state.dims))
        if len(labels) > 2:
            raise NoFormError(f"the state `{state.name}` has {len(labels)} axes")
        decays: list[Monomial] = []
        corrections: list[tuple[Value, Value, Monomial]] = []
        writes: list[tuple[Value, Value, Monomial]] = []
        for term in expansion.of(value, labels):
            if term.state is None:
                writes.append((*_write(term, labels), term))
            elif term.state.name != state.name:
                raise NoFormError(f"a step of `{state.name}` reads `{term.state.name}`")
            elif term.labels == labels:
                decays.append(term)
            else:
                corrections.append((*_correction(term, labels, state), term))
        decay = self._decay(decays, labels, state)
        if len(writes) > 1 or len(corrections) > 1:
            raise NoFormError(f"several writes or corrections in one step of `{state.name}`")
        write = None if not writes else writes[0][:2]
        correction = None
        if corrections:
            left, read, term = corrections[0]
            merged = bool(writes) and decay is None and _is_merged(term, writes[0][2], labels)
            correction = Correction(left, read, "old" if decay is not None else "decayed", merged)
        if step.repeat is not None and decay is not None:
            raise NoFormError(f"a repeated step of `{state.name}` with a decay")
        return Micro(decay, correction, write, step.repeat)

    def _decay(self, terms: list[Monomial], labels: Labels, state: ir.State) -> Decay | None:
        if not terms:
            raise NoFormError(f"a step that forgets `{state.name}` whole")
        if len(terms) == 1 and not terms[0].factors and not terms[0].negative:
            return None
        used = {label for term in terms for factor in term.factors for label in factor.labels}
        if not used <= set(labels):
            raise NoFormError(f"a decay of `{state.name}` that sums over an axis")
        if used == set(labels) and len(labels) == 2:
            raise NoFormError(f"a decay of its own for every entry of `{state.name}`")
        parts = [_signed(product_of([f.value for f in term.factors]), term.negative) for term in terms]
        whole = parts[0]
        for part in parts[1:]:
            whole = apply("add", whole, part)
        side: Side = "scalar" if not used else "rows" if used == {labels[0]} else "columns"
        return Decay(self._log(whole, state), side)

    def _log(self, decay: Value, state: ir.State) -> Value:
        """The logarithm of a decay, which is known to be at most 0."""
        if isinstance(decay, ir.Apply) and decay.op == "exp":
            gate = decay.operands[0]
            bounded = isinstance(gate, ir.Apply) and gate.op == "sub" and gate.operands in self._bounded
            if not bounded and sign_of(gate) != "negative" and not _is_constant(gate):
                raise NoFormError(f"the decay of `{state.name}` may be above 1: declare its gate `log_decay`")
            return gate
        if _is_constant(decay) or _is_share(decay):
            return apply("log", decay)
        raise NoFormError(f"the decay of `{state.name}` may be above 1: declare its gate `unit`, or write `exp(g)`")

    # --- reads -------------------------------------------------------------------------------------------------------

    def _result(self, last: dict[str, int]) -> tuple[Value, dict[str, list[Taken]]]:
        """What a token gets, each read of a state as the element of a tensor, and these reads by state."""
        taken: dict[str, list[Taken]] = {}
        value = replace_values(self.recur.read, self._known)
        while reads_state(value):
            nodes = cast("tuple[Value, ...]", value.below)
            found = next((node for node in nodes if _is_read(node)), None)
            if found is None:
                raise NoFormError("a read that is not linear in a state")
            value = replace_values(value, {found: self._taken(found, taken, last)})
        return value, taken

    def _taken(self, node: Value, taken: dict[str, list[Taken]], last: dict[str, int]) -> Value:
        """A node that is linear in the states as the sum of its reads."""
        expansion = Expansion()
        labels = expansion.labels(len(axes(node)))
        total: Value | None = None
        for term in expansion.of(node, labels):
            part = self._term(term, labels, taken, last)
            total = part if total is None else apply("add", total, part)
        assert total is not None
        return total

    def _term(self, term: Monomial, labels: Labels, taken: dict[str, list[Taken]], last: dict[str, int]) -> Value:
        state = term.state
        if state is None:
            return _summed(term, labels)
        if state.version not in (0, last[state.name]):
            raise NoFormError(f"a read of `{state.name}` between its steps")
        row, *rest = term.labels
        if row in labels or any(label not in labels for label in rest):
            raise NoFormError(f"a read of `{state.name}` that is not over its first axis")
        query = [f.value for f in term.factors if f.labels == (row,)]
        others = [f for f in term.factors if f.labels != (row,)]
        if not query or any(row in f.labels for f in others):
            raise NoFormError(f"a read of `{state.name}` by a matrix")
        scalars = [f.value for f in others if not f.labels]
        after = [f.value for f in others if f.labels]
        many = taken.setdefault(state.name, [])
        name = f"#{state.name}.{len(many)}"
        many.append(Taken(name, _signed(product_of([*scalars, *query]), term.negative), state.version == 0))
        return product_of([_tensor(name, state.dims[1:]), *after])


# --- terms -----------------------------------------------------------------------------------------------------------


def _write(term: Monomial, labels: Labels) -> tuple[Value, Value]:
    """(k, v) of a term without a state."""
    rows, columns, scalars = _sides(term.factors, labels)
    key = _signed(product_of([*scalars, *rows]), term.negative)
    return key, product_of(columns)


def _correction(term: Monomial, labels: Labels, state: ir.State) -> tuple[Value, Value]:
    """(u, r) of a term that reads the state's rows."""
    first, *rest = term.labels
    if first in labels or tuple(rest) != labels[1:]:
        raise NoFormError(f"a correction of `{state.name}` that is not of its first axis")
    read = [f.value for f in term.factors if f.labels == (first,)]
    others = tuple(f for f in term.factors if f.labels != (first,))
    if not read or any(first in f.labels for f in others):
        raise NoFormError(f"a correction of `{state.name}` by a matrix")
    rows, columns, scalars = _sides(others, labels)
    if columns:
        raise NoFormError(f"a correction of `{state.name}` that differs from column to column")
    return _signed(product_of([*scalars, *rows]), term.negative), product_of(read)


def _sides(factors: Sequence[Factor], labels: Labels) -> tuple[list[Value], list[Value], list[Value]]:
    """Factors of rows, of columns, and of neither. Raises NoFormError for one of both, or of another axis."""
    found: tuple[list[Value], list[Value], list[Value]] = ([], [], [])
    for factor in factors:
        if not factor.labels:
            found[2].append(factor.value)
        elif factor.labels == labels[:1]:
            found[0].append(factor.value)
        elif factor.labels == labels[1:]:
            found[1].append(factor.value)
        else:
            raise NoFormError("a matrix that is no product of two vectors")
    return found


def _is_merged(correction: Monomial, write: Monomial, labels: Labels) -> bool:
    """Whether a correction writes minus what the state holds, by the key and the factor of the write."""

    def by_row(term: Monomial) -> list[bytes]:
        return sorted(f.value.digest for f in term.factors if f.labels in ((), labels[:1]))

    return correction.negative and not write.negative and by_row(correction) == by_row(write)


def _summed(term: Monomial, labels: Labels) -> Value:
    """A term without a state, summed over the axes that it has beside `labels`."""
    inner = {label for f in term.factors for label in f.labels} - set(labels)
    if len(inner) > 1 or any(len(f.labels) > 1 and inner & set(f.labels) for f in term.factors):
        raise NoFormError("a product over several axes")
    summed = [f.value for f in term.factors if inner & set(f.labels)]
    rest = [f.value for f in term.factors if not inner & set(f.labels)]
    if summed:
        from attnc.compiler.values import dot

        first, *others = summed
        rest.insert(0, dot(first, product_of(others) if others else number(1.0)))
    return _signed(product_of(rest), term.negative)


def _signed(value: Value, negative: bool) -> Value:
    return apply("neg", value) if negative else value


def _is_constant(node: Value) -> bool:
    """Whether a value is a number of each head, and no more."""
    return not any(
        isinstance(below, ir.Vec | ir.Element | StateAt | ir.Lookup) or below is fold.place("q") for below in node.below
    )


def _is_share(node: Value) -> bool:
    """Whether a value lies between 0 and 1."""
    if isinstance(node, ir.Element):
        return node.tensor.refinement == "unit"
    if isinstance(node, ir.Apply):
        if node.op == "sigmoid":
            return True
        if node.op == "mul":
            return all(_is_share(operand) or is_one(operand) for operand in node.operands)
        if node.op == "sub":
            return is_one(node.operands[0]) and _is_share(node.operands[1])
        if node.op == "add":  # 1 - f, expanded
            a, b = node.operands
            inner = b.operands[0] if isinstance(b, ir.Apply) and b.op == "neg" else None
            return is_one(a) and inner is not None and _is_share(inner)
    return False


def _is_read(node: Value) -> bool:
    """Whether a node takes a vector or a number of a state: a product with what reads none, and none inside."""
    if not isinstance(node, ir.Contract | ir.Dot) or reads_state(node.left) == reads_state(node.right):
        return False
    inside = node.right if reads_state(node.right) else node.left
    return not any(map(_is_read, cast("tuple[Value, ...]", inside.below)))


def _tensor(name: str, dims: Sequence[str | int]) -> Value:
    """The element of a tensor (batch, head, token, …) that is computed before."""
    tensor = ir.intern(ir.Tensor(name, "real", ("batch", "head", "token", *dims)))
    return element(tensor, (fold.head_index("batch"), fold.head_index("head"), fold.place("q")))


def _needs(stage: Pass, names: dict[str, str]) -> set[str]:
    """The states whose reads a stage uses."""
    values = [one.query for one in stage.reads]
    for micro in stage.steps:
        values += [micro.decay.log] if micro.decay else []
        values += [micro.correction.left, micro.correction.read] if micro.correction else []
        values += list(micro.write or ())
    return {
        names[below.tensor.name]
        for value in values
        for below in value.below
        if isinstance(below, ir.Element) and below.tensor.name in names
    }


__all__ = ["Correction", "Decay", "Derived", "LogSum", "Micro", "NoFormError", "Pass", "Taken", "derive"]
