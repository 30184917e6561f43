"""A recurrence as passes over its states, each of which is computed chunk by chunk.

Every line that is linear in its state is `S ← D ⊙ S + Σ u (rᵀ S) + Σ k vᵀ`. Lines stay a product: a decay and a
correction after it are one step in which the correction sees the decayed state; a repeated line is several. What a
token reads is taken apart into reads `qᵀ S` that are linear in one state, and a formula of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from attnc.compiler import fold, ir
from attnc.compiler.ir import Recur, StateAt, Step, Value
from attnc.compiler.recurrences.affine import affine_of
from attnc.compiler.recurrences.derived import (
    Correction,
    Decay,
    Derived,
    Micro,
    NoFormError,
    Pass,
    Running,
    Scan,
    Side,
    Stage,
    Taken,
)
from attnc.compiler.recurrences.monomials import Expansion, Labels, Monomial, NonlinearError, product_of, reads_state
from attnc.compiler.recurrences.signs import is_one, sign_of
from attnc.compiler.recurrences.terms import correction_of, is_merged, signed, summed, write_of
from attnc.compiler.rewrite import replace_values
from attnc.compiler.values import apply, axes, element, number, state_at

CLOSED = 2.0**-100
"""What a factor of 0 is taken for: too little to be seen, and enough for the gradient of the factor to be told."""


def derive(recur: Recur, *, trusting: bool = True) -> Derived:
    """The passes of a recurrence. `trusting`: factors that are numbers of each head are taken to lie between 0 and 1.

    Raises NoFormError where it has no such form.
    """
    first: NonlinearError | NoFormError | None = None
    for entrywise in _choices(recur):
        try:
            return replace(_Deriving(recur, entrywise, trusting).derive(), reason="" if first is None else str(first))
        except (NonlinearError, NoFormError) as error:
            first = first or error
    assert first is not None
    raise NoFormError(str(first)) from first


def _choices(recur: Recur) -> Iterator[frozenset[str]]:
    """Which states are taken entry by entry: none; those of one axis; those of two; all that can be.

    Those of complex numbers always are.
    """
    always = frozenset(state.name for state in recur.states if state.is_complex)
    yield always
    able = []
    for state in recur.states:
        with suppress(NonlinearError):
            affine_of(state, [step for step in recur.steps if step.state == state.name])
            able.append(state)
    vectors = frozenset(state.name for state in able if len(state.dims) == 1)
    whole = frozenset(state.name for state in able)
    for found in dict.fromkeys(some | always for some in (vectors, whole - vectors, whole)):
        if found != always:
            yield found


@dataclass
class _Deriving:
    recur: Recur
    entrywise: frozenset[str]
    trusting: bool
    _known: dict[Value, Value] = field(default_factory=dict)
    """States and reads that are computed before, as elements of tensors."""

    def derive(self) -> Derived:
        recur = self.recur
        last = {state.name: sum(step.state == state.name for step in recur.steps) for state in recur.states}
        stages: list[Stage] = [
            found for state in recur.states if (found := self._running(state, self._steps(state))) is not None
        ]
        others = [state for state in recur.states if state not in [stage.state for stage in stages]]
        scanned = [state for state in others if state.name in self.entrywise]
        for state in scanned:
            self._name_entries(state, last[state.name])
        chunked = [state for state in others if state not in scanned]
        steps = {state.name: self._passed(state) for state in chunked}
        result, taken = self._result(last)
        stages += [Pass(state, steps[state.name], tuple(taken.get(state.name, ()))) for state in chunked]
        stages += [self._scan(state, last[state.name]) for state in scanned]
        return Derived(self._in_order(_without_unread(stages, result), taken), result)

    def _steps(self, state: ir.State) -> list[Step]:
        return [step for step in self.recur.steps if step.state == state.name]

    def _in_order(self, stages: list[Stage], taken: dict[str, list[Taken]]) -> tuple[Stage, ...]:
        """Those whose reads others use first."""
        names = {one.name: state for state, many in taken.items() for one in many}
        names |= {name: state for state, many in self._entries.items() for name, _ in many}
        order, waiting = list[Stage](), list(stages)
        while waiting:
            done = {stage.state.name for stage in order}
            ready = next(
                (s for s in waiting if isinstance(s, Running) or _needs(s, names) <= done | {s.state.name}), None
            )
            if ready is None:
                raise NoFormError("states that read each other")
            waiting.remove(ready)
            order.append(ready)
        return tuple(order)

    # --- named sums --------------------------------------------------------------------------------------------------

    def _running(self, state: ir.State, steps: Sequence[Step]) -> Running | None:
        """Of a state that only grows, to the largest so far or to a sum of exponentials."""
        if len(steps) != 1 or steps[0].repeat is not None:
            return None
        value, own = steps[0].value, state_at(state.name, 0, state.dims)
        if not (isinstance(value, ir.Apply) and value.op in ("logaddexp", "max") and own in value.operands):
            return None
        (added,) = (operand for operand in value.operands if operand is not own)
        if reads_state(added):
            return None
        before, after = f"#{state.name}.before", f"#{state.name}.after"
        self._known[own] = _tensor(before, state.dims)
        self._known[value] = self._known[state_at(state.name, 1, state.dims)] = _tensor(after, state.dims)
        self._bounded.add((self._known[own], self._known[value]))
        return Running(state, "max" if value.op == "max" else "logaddexp", added, before, after)

    _bounded: set[tuple[Value, Value]] = field(default_factory=set)
    """Pairs of values of which the first is at most the second."""

    # --- entry by entry ----------------------------------------------------------------------------------------------

    _entries: dict[str, list[tuple[str, Value]]] = field(default_factory=dict)
    """What is read of states that are taken entry by entry, as tensors of these names."""

    def _name_entries(self, state: ir.State, last: int) -> None:
        """A vector is kept whole of every token, before it and after it."""
        self._entries[state.name] = []
        if len(state.dims) == 1:
            for name, version in (("before", 0), ("after", last)):
                self._known[state_at(state.name, version, state.dims)] = self._entry(
                    f"#{state.name}.{name}", state_at(state.name, version, state.dims), state
                )

    def _entry(self, name: str, node: Value, state: ir.State) -> Value:
        self._entries[state.name].append((name, node))
        return _tensor(name, axes(node), "complex" if state.is_complex else "real")

    def _scan(self, state: ir.State, last: int) -> Scan:
        known = {node: x for node, x in self._known.items() if not _is_of(node, state)}
        steps = [replace(step, value=replace_values(step.value, known)) for step in self._steps(state)]
        decay, write = affine_of(state, steps)
        if reads_state(decay) or reads_state(write):
            raise NoFormError(f"a step of `{state.name}` reads another state")
        return Scan(state, decay, write, last, tuple(self._entries[state.name]))

    def _read_of_entries(self, node: Value, last: dict[str, int]) -> Value | None:
        """A read of one state that is taken entry by entry, and of no other, as a tensor."""
        read = {below for below in node.below if isinstance(below, StateAt)}
        names = {below.name for below in read}
        if len(names) != 1 or not names <= self.entrywise:
            return None
        (name,) = names
        if any(below.version not in (0, last[name]) for below in read):
            raise NoFormError(f"a read of `{name}` between its steps")
        state = next(state for state in self.recur.states if state.name == name)
        return self._entry(f"#{name}.{len(self._entries[name])}", node, state)

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
                writes.append((*write_of(term, labels), term))
            elif term.state.name != state.name:
                raise NoFormError(f"a step of `{state.name}` reads `{term.state.name}`")
            elif term.labels == labels:
                decays.append(term)
            else:
                corrections.append((*correction_of(term, labels, state), term))
        decay = self._decay(decays, labels, state)
        if len(writes) > 1 or len(corrections) > 1:
            raise NoFormError(f"several writes or corrections in one step of `{state.name}`")
        write = None if not writes else writes[0][:2]
        correction = None
        if corrections:
            left, read, term = corrections[0]
            merged = bool(writes) and decay is None and is_merged(term, writes[0][2], labels)
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
        parts = [signed(product_of([f.value for f in term.factors]), term.negative) for term in terms]
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
            if not bounded and sign_of(gate) != "negative" and not (self.trusting and is_constant(gate)):
                raise NoFormError(f"the decay of `{state.name}` may be above 1: declare its gate `log_decay`")
            return gate
        if _is_share(decay):
            return apply("log", apply("add", decay, number(CLOSED)))
        if self.trusting and is_constant(decay):
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
            own = self._read_of_entries(found, last)
            value = replace_values(value, {found: self._taken(found, taken, last) if own is None else own})
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
            return summed(term, labels)
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
        many.append(Taken(name, signed(product_of([*scalars, *query]), term.negative), state.version == 0))
        return product_of([_tensor(name, state.dims[1:]), *after])


def is_constant(node: Value) -> bool:
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


def _tensor(name: str, dims: Sequence[str | int], kind: Literal["real", "complex"] = "real") -> Value:
    """The element of a tensor (batch, head, token, …) that is computed before."""
    tensor = ir.intern(ir.Tensor(name, kind, ("batch", "head", "token", *dims)))
    return element(tensor, (fold.head_index("batch"), fold.head_index("head"), fold.place("q")))


def _without_unread(stages: list[Stage], result: Value) -> list[Stage]:
    """The same without reads of entries that nothing uses."""
    values = [result, *(value for stage in stages if not isinstance(stage, Running) for value in _values(stage))]
    used = {below.tensor.name for value in values for below in value.below if isinstance(below, ir.Element)}
    return [
        replace(stage, reads=tuple(read for read in stage.reads if read[0] in used))
        if isinstance(stage, Scan)
        else stage
        for stage in stages
    ]


def _is_of(node: Value, state: ir.State) -> bool:
    return isinstance(node, StateAt) and node.name == state.name


def _values(stage: Pass | Scan) -> list[Value]:
    """What a stage is made of."""
    if isinstance(stage, Scan):
        return [stage.decay, stage.write, *(node for _, node in stage.reads)]
    values = [one.query for one in stage.reads]
    for micro in stage.steps:
        values += [micro.decay.log] if micro.decay else []
        values += [micro.correction.left, micro.correction.read] if micro.correction else []
        values += list(micro.write or ())
    return values


def _needs(stage: Pass | Scan, names: dict[str, str]) -> set[str]:
    """The states whose reads a stage uses."""
    return {
        names[below.tensor.name]
        for value in _values(stage)
        for below in value.below
        if isinstance(below, ir.Element) and below.tensor.name in names
    }


__all__ = ["derive", "is_constant"]
