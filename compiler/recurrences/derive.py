"""Derive passes over the states of a recurrence, each of which can be computed chunk by chunk.

Every line that is linear in its state is `S ← D ⊙ S + Σ u (rᵀ S) + Σ k vᵀ`. Lines are not multiplied out: a decay and a
correction in the next line become one step whose correction reads the decayed state; a repeated line becomes several
steps. What a token reads is split into reads `qᵀ S`, each linear in one state, and a formula of these reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, cast

from attnc.compiler import ir
from attnc.compiler.ir import Recur, StateAt, Step, Value, fold
from attnc.compiler.ir.rewrite import replace_values
from attnc.compiler.ir.value_nodes import (
    apply,
    axes,
    element,
    number,
    rank,
    state_at,
)
from attnc.compiler.recurrences.affine import affine_of
from attnc.compiler.recurrences.call_constants import into_matrix, into_reads
from attnc.compiler.recurrences.coupled_states import CoupledTrace, ReadEachOtherError, follow
from attnc.compiler.recurrences.derived import (
    Correction,
    DecayForm,
    ElementwiseScan,
    Micro,
    NoFormError,
    Pass,
    RunningReduction,
    Side,
    SolvedRead,
    Stage,
    Taken,
    states_of,
)
from attnc.compiler.recurrences.monomials import Expansion, Labels, Monomial, NonlinearError, product_of, reads_state
from attnc.compiler.recurrences.recurrence_form import RecurrenceForm
from attnc.compiler.recurrences.signs import is_one, sign_of
from attnc.compiler.recurrences.stage_order import in_order, without_unread
from attnc.compiler.recurrences.term_vectors import (
    correction_of,
    factors_of,
    is_merged,
    signed,
    summed,
    terms_of,
    write_of,
)

CLOSED = 2.0**-100
"""The replacement of a factor of 0: too small to change a result, large enough to compute the factor's gradient."""


def derive(recur: Recur, *, trusting: bool = True) -> RecurrenceForm:
    """Derive the passes of a recurrence. `trusting`: assume that factors that are one number per head are in [0, 1].

    Raises NoFormError if the recurrence has no derived form.
    """
    first_error: NonlinearError | NoFormError | None = None
    coupled_error: NonlinearError | NoFormError | None = None
    for coupling, entrywise in product((False, True), tuple(_elementwise_choices(recur))):
        deriving = _Derivation(recur, entrywise, trusting, coupling)
        try:
            return replace(deriving.derive(), reason="" if first_error is None else str(first_error))
        except (NonlinearError, NoFormError) as error:
            first_error = first_error or error
            if deriving.has_groups or isinstance(error, ReadEachOtherError):
                coupled_error = coupled_error or error
    reported = coupled_error or first_error
    assert reported is not None
    raise NoFormError(str(reported)) from reported


def _elementwise_choices(recur: Recur) -> Iterator[frozenset[str]]:
    """Yield sets of states to scan elementwise: none, then vectors, then matrices, then all that can be.

    Every set contains the states that are complex or single numbers.
    """
    always = frozenset(state.name for state in recur.states if state.is_complex or not state.dims)
    yield always
    affine = []
    for state in recur.states:
        with suppress(NonlinearError):
            affine_of(state, [step for step in recur.steps if step.state == state.name])
            affine.append(state)
    vectors = frozenset(state.name for state in affine if len(state.dims) <= 1)
    names = frozenset(state.name for state in affine)
    for choice in dict.fromkeys(more | always for more in (vectors, names - vectors, names)):
        if choice != always:
            yield choice


@dataclass
class _Derivation:
    """One attempt to derive a form. `entrywise`: the names of the states that are scanned elementwise."""

    recur: Recur
    entrywise: frozenset[str]
    trusting: bool
    coupling: bool
    """Whether `CoupledTrace` follows states that read each other or have no pass."""
    _precomputed: dict[Value, Value] = field(default_factory=dict)
    """States and reads that earlier stages compute, as elements of their tensors."""

    def derive(self) -> RecurrenceForm:
        recur = self.recur
        last = {state.name: sum(step.state == state.name for step in recur.steps) for state in recur.states}
        stages: list[Stage] = [
            running for state in recur.states if (running := self._running(state, self._steps(state))) is not None
        ]
        others = [state for state in recur.states if all(state not in states_of(stage) for stage in stages)]
        scanned = [state for state in others if state.name in self.entrywise]
        for state in scanned:
            self._name_entries(state, last[state.name])
        chunked = [state for state in others if state not in scanned]
        if self.coupling:
            lines = [replace(step, value=self._replaced(step.value)) for step in recur.steps]
            self._followed = follow(chunked, lines, self._has_pass)
            chunked = [state for state in chunked if state.name not in self._followed]
        steps = {state.name: self._micro_steps(state) for state in chunked}
        result, reads_by_state = self._result(last)
        for state in chunked:
            reads, solves = reads_by_state.get(state.name, ()), self._solves.get(state.name, ())
            stages.append(Pass(state, steps[state.name], tuple(reads), solves=tuple(solves)))
        stages += [self._scan(state, last[state.name]) for state in scanned]
        stages += [group.stage() for group in dict.fromkeys(self._followed.values())]
        return RecurrenceForm(in_order(without_unread(stages, result)), result)

    def _steps(self, state: ir.State) -> list[Step]:
        return [step for step in self.recur.steps if step.state == state.name]

    # --- named sums --------------------------------------------------------------------------------------------------

    def _running(self, state: ir.State, steps: Sequence[Step]) -> RunningReduction | None:
        """Return the running reduction of a state that only grows, to a maximum or to a log-sum-exp."""
        if len(steps) != 1 or steps[0].repeat is not None:
            return None
        value, state_node = steps[0].value, state_at(state.name, 0, state.dims)
        if not (isinstance(value, ir.Apply) and value.op in ("logaddexp", "max") and state_node in value.operands):
            return None
        (added,) = (operand for operand in value.operands if operand is not state_node)
        if reads_state(added):
            return None
        before, after = f"#{state.name}.before", f"#{state.name}.after"
        self._precomputed[state_node] = _tensor(before, state.dims)
        self._precomputed[value] = self._precomputed[state_at(state.name, 1, state.dims)] = _tensor(after, state.dims)
        self._bounded.add((self._precomputed[state_node], self._precomputed[value]))
        return RunningReduction(state, "max" if value.op == "max" else "logaddexp", added, before, after)

    def _replaced(self, value: Value, besides: ir.State | None = None) -> Value:
        """Substitute precomputed results: compound expressions first, then states; `besides`: a state to keep."""
        replacements = {
            node: x for node, x in self._precomputed.items() if besides is None or not _is_version_of(node, besides)
        }
        compound: dict[Value, Value] = {node: x for node, x in replacements.items() if not isinstance(node, StateAt)}
        return replace_values(replace_values(value, compound), replacements)

    _bounded: set[tuple[Value, Value]] = field(default_factory=set)
    """Pairs of values; the first is at most the second."""

    # --- entry by entry ----------------------------------------------------------------------------------------------

    _entries: dict[str, list[tuple[str, Value]]] = field(default_factory=dict)
    """Reads of elementwise states, with the names of their tensors."""

    def _name_entries(self, state: ir.State, last: int) -> None:
        """Name the tensors of a vector before and after every token; only reads of a matrix are stored."""
        self._entries[state.name] = []
        if len(state.dims) <= 1:
            for when, version in (("before", 0), ("after", last)):
                self._precomputed[state_at(state.name, version, state.dims)] = self._entry(
                    f"#{state.name}.{when}", state_at(state.name, version, state.dims), state
                )

    def _entry(self, name: str, node: Value, state: ir.State) -> Value:
        """Record a read of an elementwise state; return the element of its tensor."""
        self._entries[state.name].append((name, node))
        return _tensor(name, axes(node), "complex" if state.is_complex else "real")

    def _scan(self, state: ir.State, last: int) -> ElementwiseScan | Pass:
        steps = [replace(step, value=self._replaced(step.value, state)) for step in self._steps(state)]
        decay, write = affine_of(state, steps)
        if reads_state(decay) or reads_state(write):
            raise NoFormError(f"a step of `{state.name}` reads another state")
        write = into_matrix(write)
        reads = tuple(self._entries[state.name])
        return self._flat(state, decay, write, reads) or ElementwiseScan(state, decay, write, last, reads)

    def _flat(self, state: ir.State, decay: Value, write: Value, reads: Sequence[tuple[str, Value]]) -> Pass | None:
        """Return the pass of a vector with a scalar decay, or of a number, as a matrix of one row; None for others."""
        if len(state.dims) > 1 or state.is_complex or rank(decay):
            return None
        try:
            log = None if is_one(decay) else DecayForm(self._log(decay, state), "scalar")
        except NoFormError:
            return None
        taken_reads = tuple(Taken(name, number(1.0), cast("StateAt", node).version == 0) for name, node in reads)
        factors = factors_of(write)
        scalars, others = ([x for x in factors if bool(rank(x)) is vector] for vector in (False, True))
        key, value = (product_of(group) if group else number(1.0) for group in (scalars, others))
        return Pass(state, (Micro(log, None, (key, value)),), taken_reads, flat=True)

    def _read_of_entries(self, node: Value, last: dict[str, int]) -> Value | None:
        """Return a read of a single elementwise state as the element of a tensor; None for other reads."""
        versions = {child for child in node.below if isinstance(child, StateAt)}
        names = {version.name for version in versions}
        if len(names) != 1 or not names <= self.entrywise:
            return None
        (name,) = names
        if any(version.version not in (0, last[name]) for version in versions):
            raise NoFormError(f"a read of `{name}` between its steps")
        state = next(state for state in self.recur.states if state.name == name)
        return self._entry(f"#{name}.{len(self._entries[name])}", node, state)

    # --- states that read each other ---------------------------------------------------------------------------------

    _followed: dict[str, CoupledTrace] = field(default_factory=dict)
    """The group of states that each state is followed in, by the state's name."""

    @property
    def has_groups(self) -> bool:
        """Whether some states read each other in a supported way."""
        return any(len(group.states) > 1 for group in self._followed.values())

    def _has_pass(self, state: ir.State) -> bool:
        """Check whether a state has a pass of its own."""
        try:
            self._micro_steps(state)
        except (NonlinearError, NoFormError):
            return False
        return True

    # --- steps -------------------------------------------------------------------------------------------------------

    def _micro_steps(self, state: ir.State) -> tuple[Micro, ...]:
        """Return the steps of a state; a decay is joined with the line that follows it."""
        micros: list[Micro] = []
        for step in self._steps(state):
            micro = self._micro(state, step)
            before = micros[-1] if micros else None
            is_bare_decay = (
                before is not None and before.correction is None and before.write is None and before.repeat is None
            )
            if is_bare_decay and before is not None and micro.decay is None:
                micros[-1] = Micro(before.decay, micro.correction, micro.write, micro.repeat)
            else:
                micros.append(micro)
        for micro in micros[1:]:
            if micro.decay is not None:
                raise NoFormError(f"a decay of `{state.name}` after its correction")
        by_column = any(micro.decay is not None and micro.decay.side == "columns" for micro in micros)
        if by_column and any(micro.correction is not None for micro in micros):
            raise NoFormError(f"a decay of `{state.name}` by value column together with a correction")
        return tuple(micros)

    def _micro(self, state: ir.State, step: Step) -> Micro:
        """Return a line as one step: its decay, correction and write."""
        value = self._replaced(step.value)
        expansion = Expansion()
        labels = expansion.labels(len(state.dims))
        if len(labels) > 2:
            raise NoFormError(f"a state with {len(labels)} axes (`{state.name}`)")
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

    def _decay(self, terms: list[Monomial], labels: Labels, state: ir.State) -> DecayForm | None:
        if not terms:
            raise NoFormError(f"a step that discards all of `{state.name}`")
        if len(terms) == 1 and not terms[0].factors and not terms[0].negative:
            return None
        used = {label for term in terms for factor in term.factors for label in factor.labels}
        if not used <= set(labels):
            raise NoFormError(f"a decay of `{state.name}` that sums over an axis")
        if used == set(labels) and len(labels) == 2:
            raise NoFormError(f"a separate decay for every entry of `{state.name}`")
        parts = [signed(product_of([f.value for f in term.factors]), term.negative) for term in terms]
        total = parts[0]
        for part in parts[1:]:
            total = apply("add", total, part)
        side: Side = "scalar" if not used else "rows" if used == {labels[0]} else "columns"
        return DecayForm(self._log(total, state), side)

    def _log(self, decay: Value, state: ir.State) -> Value:
        """Return the logarithm of a decay. Raises NoFormError unless it is known to be at most 0."""
        if isinstance(decay, ir.Apply) and decay.op == "exp":
            gate = decay.operands[0]
            bounded = isinstance(gate, ir.Apply) and gate.op == "sub" and gate.operands in self._bounded
            if not bounded and sign_of(gate) != "negative" and not (self.trusting and is_constant(gate)):
                raise NoFormError(f"the decay of `{state.name}` may be above 1: declare its gate `log_decay`")
            return gate
        if _is_unit(decay):
            return apply("log", apply("add", decay, number(CLOSED)))
        if self.trusting and is_constant(decay):
            return apply("log", decay)
        raise NoFormError(f"the decay of `{state.name}` may be above 1: declare its gate `unit`, or write `exp(g)`")

    # --- reads -------------------------------------------------------------------------------------------------------

    def _result(self, last: dict[str, int]) -> tuple[Value, dict[str, list[Taken]]]:
        """Return a token's result as a formula of the elements of read tensors, and the reads by state."""
        reads_by_state: dict[str, list[Taken]] = {}
        value = into_reads(self._replaced(self.recur.read))
        while reads_state(value):
            nodes = cast("tuple[Value, ...]", value.below)
            solve = next((node for node in nodes if isinstance(node, ir.Solve) and reads_state(node.matrix)), None)
            if solve is not None:
                value = replace_values(value, {solve: self._solved(solve, last)})
                continue
            read = next((node for node in nodes if _is_read(node)), None)
            if read is None:
                raise NoFormError("a read that is not linear in a state")
            entry = self._read_of_entries(read, last)
            value = replace_values(
                value, {read: self._sum_of_reads(read, reads_by_state, last) if entry is None else entry}
            )
        return value, reads_by_state

    _solves: dict[str, list[SolvedRead]] = field(default_factory=dict)

    def _solved(self, node: ir.Solve, last: dict[str, int]) -> Value:
        """Record a `solve` of a state by conjugate gradients; return the element of its tensor."""
        state_terms, others = list[Value](), list[Value]()
        for term in terms_of(node.matrix):
            (state_terms if reads_state(term) else others).append(term)
        factors = factors_of(state_terms[0])
        state = next((x for x in factors if isinstance(x, StateAt)), None)
        scalars = [x for x in factors if x is not state]
        if node.steps is None:
            raise NoFormError("an exact `solve` with a state")
        if len(state_terms) > 1 or state is None or any(rank(x) or reads_state(x) for x in scalars):
            raise NoFormError("a `solve` of a matrix other than a number times a state, plus terms without a state")
        if reads_state(node.vector) or state.version != last[state.name] or state.name in self.entrywise:
            raise NoFormError(f"a `solve` with `{state.name}` of a vector that reads a state, or between its steps")
        remainder = None
        for other in others:
            remainder = other if remainder is None else apply("add", remainder, other)
        solves = self._solves.setdefault(state.name, [])
        name = f"#{state.name}.solved{len(solves)}"
        solves.append(
            SolvedRead(name, product_of(scalars) if scalars else number(1.0), remainder, node.vector, node.steps)
        )
        return _tensor(name, axes(node))

    def _sum_of_reads(self, node: Value, reads_by_state: dict[str, list[Taken]], last: dict[str, int]) -> Value:
        """Return a node that is linear in the states as the sum of its reads."""
        expansion = Expansion()
        labels = expansion.labels(len(axes(node)))
        total: Value | None = None
        for term in expansion.of(node, labels):
            part = self._term(term, labels, reads_by_state, last)
            total = part if total is None else apply("add", total, part)
        assert total is not None
        return total

    def _term(
        self, term: Monomial, labels: Labels, reads_by_state: dict[str, list[Taken]], last: dict[str, int]
    ) -> Value:
        state = term.state
        if state is None:
            return summed(term, labels)
        group = self._followed.get(state.name)
        if group is None and state.version not in (0, last[state.name]):
            raise NoFormError(f"a read of `{state.name}` between its steps")
        row, *columns = term.labels
        if row in labels or any(label not in labels for label in columns):
            raise NoFormError(f"a read of `{state.name}` that does not contract its first axis")
        query = [f.value for f in term.factors if f.labels == (row,)]
        others = [f for f in term.factors if f.labels != (row,)]
        if not query or any(row in f.labels for f in others):
            raise NoFormError(f"a read of `{state.name}` by a matrix")
        scalars = [f.value for f in others if not f.labels]
        column_factors = [f.value for f in others if f.labels]
        signed_query = signed(product_of([*scalars, *query]), term.negative)
        if group is not None:
            name = group.read(state, signed_query)
        else:
            reads = reads_by_state.setdefault(state.name, [])
            name = f"#{state.name}.{len(reads)}"
            reads.append(Taken(name, signed_query, state.version == 0))
        return product_of([_tensor(name, state.dims[1:]), *column_factors])


def is_constant(node: Value) -> bool:
    """Check whether a value is one number per head, the same at all tokens and in all states."""
    return not any(
        isinstance(child, ir.Vec | ir.Element | StateAt | ir.Lookup) or child is fold.place("q") for child in node.below
    )


def _is_unit(node: Value) -> bool:
    """Check whether a value is known to lie between 0 and 1."""
    if isinstance(node, ir.Element):
        return node.tensor.refinement == "unit"
    if isinstance(node, ir.Apply):
        if node.op == "sigmoid":
            return True
        if node.op == "mul":
            return all(_is_unit(operand) or is_one(operand) for operand in node.operands)
        if node.op == "sub":
            return is_one(node.operands[0]) and _is_unit(node.operands[1])
        if node.op == "add":  # 1 - f, expanded
            a, b = node.operands
            inner = b.operands[0] if isinstance(b, ir.Apply) and b.op == "neg" else None
            return is_one(a) and inner is not None and _is_unit(inner)
    return False


def _is_read(node: Value) -> bool:
    """Check whether a node is an innermost read: a product of a value that reads a state and one that reads none."""
    if not isinstance(node, ir.Contract | ir.Dot) or reads_state(node.left) == reads_state(node.right):
        return False
    inside = node.right if reads_state(node.right) else node.left
    return not any(map(_is_read, cast("tuple[Value, ...]", inside.below)))


def _tensor(name: str, dims: Sequence[str | int], kind: Literal["real", "complex"] = "real") -> Value:
    """Return the token's element of a tensor (batch, head, token, …) that an earlier stage computes."""
    tensor = ir.intern(ir.Tensor(name, kind, ("batch", "head", "token", *dims)))
    return element(tensor, (fold.head_index("batch"), fold.head_index("head"), fold.place("q")))


def _is_version_of(node: Value, state: ir.State) -> bool:
    """Check whether a node is a version of a state."""
    return isinstance(node, StateAt) and node.name == state.name
