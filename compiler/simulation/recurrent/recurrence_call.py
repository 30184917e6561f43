"""A call of a recurrence as a simulation sees it: its passes at their sizes, and what each of them reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from attnc.compiler import fold
from attnc.compiler.ir import Apply, Const, Element, Extent, Index, Lookup, Recur, Solve, Value, Vec
from attnc.compiler.recurrences.derived import (
    Coupled,
    ElementwiseScan,
    Micro,
    Pass,
    RecurrenceForm,
    RunningReduction,
    Stage,
)
from attnc.compiler.recurrences.print_derived import class_of, class_of_coupled
from attnc.compiler.rewrite import substitute
from attnc.compiler.simulation.recurrent.chunk_work import Correction, Gate, PassForm
from attnc.compiler.simulation.simulation import Shape
from attnc.compiler.value_nodes import axes
from attnc.spec.program import Value as Parameter

GATE_BYTES = 4
"""Bytes of a number of a decay or of a sum of exponentials; neither is kept in 16 bits."""

INTEGER_BYTES = 8

Names = frozenset[str]


@dataclass(frozen=True)
class PassPart:
    """One pass of a recurrence call.

    Fields of inputs hold names of `RecurrenceCall.tensors`; `reads` names the tensors that the pass computes.
    """

    form: PassForm
    keys: Names
    values: Names
    corrections: Names
    gates: Names
    queries: Names
    reads: Names

    @property
    def sources(self) -> Names:
        """All that it reads."""
        return self.keys | self.values | self.corrections | self.gates | self.queries


@dataclass(frozen=True)
class RunningLogSum:
    """A running log-sum-exp: what it reads, and what it gives by name."""

    state: str
    sources: Names
    reads: Names


@dataclass(frozen=True)
class Entries:
    """A state whose entries go each for itself. `exps`: exponentials of its decay, for a token."""

    state: str
    rows: int
    columns: int
    exps: int
    sources: Names
    reads: Names


@dataclass(frozen=True)
class RecurrenceCall:
    """A recurrence at its sizes. `tensors`: bytes of everything that is read or handed on, by name; `out`: of what it
    gives. `inputs`: the names of what a caller gives. `parts` None: it runs token by token, for `reason`.

    `states`: entries of each state, of one batch entry and head, by name; complex ones twice. `solves`: entries of
    states that are read once more for every token, in solving for a query.
    """

    name: str
    params: Mapping[str, Parameter]
    shape: Shape
    parts: tuple[PassPart | RunningLogSum | Entries, ...] | None
    reason: str
    tensors: Mapping[str, int]
    inputs: Names
    out: int
    states: Mapping[str, int]
    solves: int = 0
    notes: tuple[str, ...] = field(default=())

    def size(self, names: Iterable[str]) -> int:
        """Bytes of these tensors, each once."""
        return sum(self.tensors[name] for name in set(names))

    @property
    def least(self) -> int:
        """Bytes of what is given and of the output."""
        return self.size(self.inputs) + self.out

    @property
    def state_bytes(self) -> int:
        """The bytes of all states of all heads, in fp32."""
        return 4 * self.shape.lanes * sum(self.states.values())


def call_of(
    recur: Recur,
    derived: RecurrenceForm | None,
    reason: str,
    params: Mapping[str, Parameter],
    shape: Shape,
    sizes: Mapping[str, int],
    notes: tuple[str, ...] = (),
) -> RecurrenceCall:
    """The call of these sizes, which name every dimension of a state and of an input that is read."""
    roots = [recur.read, *(step.value for step in recur.steps)]
    found = _Sizes(shape, sizes, _gates(derived, recur))
    tensors = {name: size for root in roots for name, size in found.tensors(root).items()}
    states = {state.name: (1 + state.is_complex) * found.count_of(state.dims) for state in recur.states}
    solves = sum(
        (node.steps or 1) * found.size(axes(node)[0]) ** 2
        for root in roots
        for node in root.below
        if isinstance(node, Solve)
    )
    own = found.count_of(axes(derived.result if derived else recur.read))
    out = shape.lanes * shape.n_q * own * found.number
    parts = None if derived is None else tuple(_part(stage, found) for stage in derived.stages)
    if derived is not None:
        tensors |= {name: size for stage in derived.stages for name, size in _given(stage, found).items()}
    inputs = frozenset(name for name in tensors if not name.startswith("#"))
    notes = (*notes, *_coupled_notes(derived))
    return RecurrenceCall(recur.name, params, shape, parts, reason, tensors, inputs, out, states, solves, notes)


@dataclass(frozen=True)
class _Sizes:
    """Sizes of dimensions and tensors. `gates`: the inputs of decays."""

    shape: Shape
    sizes: Mapping[str, int]
    gates: Names

    @property
    def number(self) -> int:
        """Bytes of a number of the call's dtype."""
        return {"float64": 8, "float32": 4}.get(self.shape.dtype, 2)

    def size(self, dim: object) -> int:
        """Return the size of a dimension: a name, a number, or an expression of sizes."""
        shape = self.shape
        if isinstance(dim, int):
            return dim
        if isinstance(dim, Extent):
            dim = dim.name
        fixed = {"batch": shape.batch, "head": shape.heads, "kv_head": shape.kv_heads, "token": shape.n_q}
        return fixed[dim] if dim in fixed else self.sizes[str(dim)]

    def count_of(self, dims: Iterable[object]) -> int:
        """Return the number of entries of a tensor with these dimensions."""
        return prod(map(self.size, dims))

    def count(self, index: Index) -> int:
        """The value of an expression of sizes."""
        below = [node for node in index.below if isinstance(node, Extent)]
        known: dict[Index, Index] = {node: fold.const(self.size(node)) for node in below}
        value = substitute(index, known)
        return value.value if isinstance(value, Const) else 1

    def tensors(self, root: Value) -> dict[str, int]:
        """Bytes of what an expression reads, by name."""
        result: dict[str, int] = {}
        for node in root.below:
            if isinstance(node, Vec):
                width, heads = self.size("dv" if node.tensor == "v" else "dk"), self.shape.heads
                heads = heads if node.tensor == "q" else self.shape.kv_heads
                result[node.tensor] = self.shape.batch * heads * self.shape.n_q * width * self.number
            elif isinstance(node, Element | Lookup):
                name, dims = node.tensor.name, node.tensor.dims
                each = self.number if isinstance(node, Element) else INTEGER_BYTES
                parts = 2 if node.tensor.kind == "complex" else 1
                result[name] = parts * self.count_of(dims) * (GATE_BYTES if name in self.gates else each)
        return result

    def names(self, *values: Value) -> Names:
        """Return the names of the tensors that expressions read."""
        return frozenset(name for value in values for name in self.tensors(value))


def _gates(derived: RecurrenceForm | None, recur: Recur) -> Names:
    """The inputs that decays are made of: those of each derived decay, or that promise to be one."""
    if derived is None:
        tensors = [n.tensor for step in recur.steps for n in step.value.below if isinstance(n, Element)]
        return frozenset(t.name for t in tensors if t.refinement == "log_decay")
    sums = [stage for stage in derived.stages if isinstance(stage, RunningReduction)]
    logs = [m.decay.log for stage in derived.stages if isinstance(stage, Pass) for m in stage.steps if m.decay]
    logs += [stage.decay for stage in derived.stages if isinstance(stage, ElementwiseScan)]
    mixes = [mix for stage in derived.stages if isinstance(stage, Coupled) for mix in stage.after]
    logs += [factor for mix in mixes for factor in (*mix.states, *mix.impulses) if factor is not None]
    tensors = [node.tensor for log in logs for node in log.below if isinstance(node, Element)]
    own = [t.name for t in tensors if t.refinement in ("log_decay", "unit")]
    return frozenset([*own, *(name for stage in sums for name in (stage.before, stage.after))])


def _given(stage: Stage, found: _Sizes) -> dict[str, int]:
    """Return the results of a stage by name: a number for each column of its state."""
    rows = found.shape.lanes * found.shape.n_q
    if isinstance(stage, RunningReduction):  # what is after a token is made of what was before it
        return {stage.before: rows * found.count_of(stage.state.dims) * GATE_BYTES, stage.after: 0}
    if isinstance(stage, ElementwiseScan):
        return {name: rows * found.count_of(axes(node)) * found.number for name, node in stage.reads}
    if isinstance(stage, Coupled):
        return {one.name: rows * found.count_of(stage.states[0].dims[1:]) * found.number for one in stage.reads}
    return {name: rows * found.count_of(stage.state.dims[1:]) * found.number for name in _read_names(stage)}


def _part(stage: Stage, found: _Sizes) -> PassPart | RunningLogSum | Entries:
    if isinstance(stage, RunningReduction):
        return RunningLogSum(stage.state.name, found.names(stage.added), frozenset((stage.before, stage.after)))
    if isinstance(stage, ElementwiseScan):
        return _entries(stage, found)
    if isinstance(stage, Coupled):
        return _coupled(stage, found)
    writes = [m.write for m in stage.steps if m.write]
    corrections = [v for m in stage.steps if m.correction for v in (m.correction.left, m.correction.read)]
    return PassPart(
        _form(stage, found),
        keys=found.names(*(write[0] for write in writes)),
        values=found.names(*(write[1] for write in writes)),
        corrections=found.names(*corrections),
        gates=found.names(*(m.decay.log for m in stage.steps if m.decay)),
        queries=found.names(*(one.query for one in stage.reads), *(one.vector for one in stage.solves)),
        reads=frozenset(_read_names(stage)),
    )


def _read_names(stage: Pass) -> list[str]:
    return [one.name for one in stage.reads] + [one.name for one in stage.solves]


def _entries(stage: ElementwiseScan, found: _Sizes) -> Entries:
    rows, columns = found.count_of(stage.state.dims[:-1]), found.size(stage.state.dims[-1])
    columns *= 1 + stage.state.is_complex
    has_exp = any(isinstance(node, Apply) and node.op in ("exp", "sigmoid") for node in stage.decay.below)
    return Entries(
        stage.state.name,
        rows,
        columns,
        found.count_of(axes(stage.decay)) if has_exp else 0,
        found.names(stage.decay, stage.write, *(node for _, node in stage.reads)),
        frozenset(name for name, _ in stage.reads),
    )


def _coupled(stage: Coupled, found: _Sizes) -> PassPart:
    """As one state of the rows of all, under a scalar decay, by a row of a chunk for every impulse."""
    rows, *columns = (found.size(dim) for dim in stage.states[0].dims)
    reads = [read for impulse in stage.impulses for read, _ in impulse.reads]
    factors = [x for mix in stage.after for x in (*mix.states, *mix.impulses) if x is not None]
    form = PassForm(
        f"{', '.join(state.name for state in stage.states)}[{', '.join(map(str, (rows, *columns)))}]",
        class_of_coupled(stage),
        rows * len(stage.states),
        prod(columns),
        len(stage.impulses),
        "scalar",
        "delta" if reads else "none",
        max(len(stage.reads), 1),
    )
    return PassPart(
        form,
        keys=found.names(*(impulse.left for impulse in stage.impulses)),
        values=found.names(*(impulse.value for impulse in stage.impulses if impulse.value is not None)),
        corrections=found.names(*reads),
        gates=found.names(*factors),
        queries=found.names(*(one.query for one in stage.reads)),
        reads=frozenset(one.name for one in stage.reads),
    )


def _coupled_notes(derived: RecurrenceForm | None) -> Iterator[str]:
    """Yield notes about approximations in the figures of coupled states."""
    for stage in () if derived is None else derived.stages:
        if isinstance(stage, Coupled) and len(stage.states) > 1:
            names = ", ".join(state.name for state in stage.states)
            yield f"{names}: counted as one state of all their rows, more than is computed"


def _form(stage: Pass, found: _Sizes) -> PassForm:
    rows, *columns = (found.size(dim) for dim in ((1,) if stage.flat else ()) + stage.state.dims)
    micro = sum(_times(step, found) for step in stage.steps)
    return form_of(stage, rows, prod(columns), max(micro, 1), (rows, *columns))


def form_of(stage: Pass, rows: int, columns: int, micro: int, dims: tuple[int, ...] = ()) -> PassForm:
    """A pass over a state of so many rows and columns, so many steps a token."""
    decays = [micro.decay for micro in stage.steps if micro.decay]
    corrected = next((micro.correction for micro in stage.steps if micro.correction), None)
    gate: Gate = decays[0].side if decays else "none"
    correction: Correction = "none" if corrected is None else "delta" if corrected.merged else "rank one"
    name = f"{stage.state.name}[{', '.join(map(str, dims or (rows, columns)))}]"
    reads = len(stage.reads) + sum(solved.steps for solved in stage.solves)
    return PassForm(name, class_of(stage), rows, columns, micro, gate, correction, max(reads, 1))


def _times(step: Micro, found: _Sizes) -> int:
    return 1 if step.repeat is None else found.count(step.repeat[2]) - found.count(step.repeat[1])


def own_sizes(recur: Recur) -> Names:
    """The dimensions of states and inputs that a call's q, k and v do not say."""
    known = {"batch", "head", "kv_head", "token", "query", "key", "dk", "dv"}
    roots = [recur.read, *(step.value for step in recur.steps)]
    tensors = [n.tensor for root in roots for n in root.below if isinstance(n, Element | Lookup)]
    dims = [dim for state in recur.states for dim in state.dims] + [dim for t in tensors for dim in t.dims]
    return frozenset(dim for dim in dims if isinstance(dim, str) and dim not in known)


def repeats(recur: Recur) -> Names:
    """The dimensions that steps are repeated over."""
    ends = [end for step in recur.steps if step.repeat for end in step.repeat[1:]]
    return frozenset(node.name for end in ends for node in end.below if isinstance(node, Extent))


__all__ = ["Entries", "PassPart", "RecurrenceCall", "RunningLogSum", "call_of", "form_of", "own_sizes", "repeats"]
