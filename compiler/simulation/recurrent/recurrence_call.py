"""The call of a recurrence that is simulated: its passes at their sizes, and the tensors that each pass reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from attnc.compiler.ir import Apply, Const, Element, Extent, Index, Lookup, Recur, Solve, Value, Vec, fold
from attnc.compiler.ir.rewrite import substitute
from attnc.compiler.ir.value_nodes import axes
from attnc.compiler.recurrences.derived import (
    Coupled,
    ElementwiseScan,
    Micro,
    Pass,
    RunningReduction,
    Stage,
    states_of,
)
from attnc.compiler.recurrences.print_derived import class_of, class_of_coupled
from attnc.compiler.recurrences.recurrence_class import RecurrenceClass
from attnc.compiler.recurrences.recurrence_form import RecurrenceForm
from attnc.compiler.simulation.recurrent.chunk_work import PassForm
from attnc.compiler.simulation.simulation import Shape
from attnc.spec.program import Value as Parameter

GATE_BYTES = 4
"""Bytes of an element of a decay or of a sum of exponentials; neither is kept in 16 bits."""

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
        """The names of all tensors that the pass reads."""
        return self.keys | self.values | self.corrections | self.gates | self.queries


@dataclass(frozen=True)
class RunningLogSum:
    """A running log-sum-exp with the names of the tensors that it reads (`sources`) and computes (`reads`)."""

    state: str
    sources: Names
    reads: Names


@dataclass(frozen=True)
class Entries:
    """A state with an elementwise update; `exps`: the exponentials of its decay for each token."""

    state: str
    rows: int
    columns: int
    exps: int
    sources: Names
    reads: Names


@dataclass(frozen=True)
class RecurrenceCall:
    """A recurrence at the sizes of a call.

    `parts`: its passes; None: it runs token by token, for `reason`. `tensors`: the bytes of each tensor that is read or
    passed between passes. `inputs`: the names of the caller's tensors. `out`: the bytes of the output. `states`: the
    entries of each state for one batch entry and head, complex entries counted twice. `solves`: entries of states that
    are read again for every token to solve for a query.
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
        """Return the bytes of these tensors, each counted once."""
        return sum(self.tensors[name] for name in set(names))

    @property
    def least(self) -> int:
        """The bytes of the inputs and the output, each moved once."""
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
    """Return the call of a recurrence; `sizes` must name every dimension of its states and inputs."""
    roots = [recur.read, *(step.value for step in recur.steps)]
    dim_sizes = _Sizes(shape, sizes, _gates(derived, recur))
    tensors = {name: size for root in roots for name, size in dim_sizes.tensors(root).items()}
    states = {state.name: (1 + state.is_complex) * dim_sizes.count_of(state.dims) for state in recur.states}
    solves = sum(
        (node.steps or 1) * dim_sizes.size(axes(node)[0]) ** 2
        for root in roots
        for node in root.below
        if isinstance(node, Solve)
    )
    out_width = dim_sizes.count_of(axes(derived.result if derived else recur.read))
    out = shape.lanes * shape.n_q * out_width * dim_sizes.number
    parts = None if derived is None else tuple(_part(stage, dim_sizes) for stage in derived.stages)
    if derived is not None:
        tensors |= {name: size for stage in derived.stages for name, size in _result_bytes(stage, dim_sizes).items()}
    inputs = frozenset(name for name in tensors if not name.startswith("#"))
    notes = (*notes, *_coupled_notes(derived))
    return RecurrenceCall(recur.name, params, shape, parts, reason, tensors, inputs, out, states, solves, notes)


@dataclass(frozen=True)
class _Sizes:
    """The sizes of dimensions and tensors of a call; `gates`: the inputs from which decays are computed."""

    shape: Shape
    sizes: Mapping[str, int]
    gates: Names

    @property
    def number(self) -> int:
        """Bytes of an element of the call's dtype."""
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
        """Return the value of an expression of sizes."""
        extents = [node for node in index.below if isinstance(node, Extent)]
        values: dict[Index, Index] = {node: fold.const(self.size(node)) for node in extents}
        result = substitute(index, values)
        return result.value if isinstance(result, Const) else 1

    def tensors(self, root: Value) -> dict[str, int]:
        """Return the bytes of the tensors that an expression reads, by name."""
        result: dict[str, int] = {}
        for node in root.below:
            if isinstance(node, Vec):
                width, heads = self.size("dv" if node.tensor == "v" else "dk"), self.shape.heads
                heads = heads if node.tensor == "q" else self.shape.kv_heads
                result[node.tensor] = self.shape.batch * heads * self.shape.n_q * width * self.number
            elif isinstance(node, Element | Lookup):
                name, dims = node.tensor.name, node.tensor.dims
                element_bytes = self.number if isinstance(node, Element) else INTEGER_BYTES
                parts = 2 if node.tensor.kind == "complex" else 1
                result[name] = parts * self.count_of(dims) * (GATE_BYTES if name in self.gates else element_bytes)
        return result

    def names(self, *values: Value) -> Names:
        """Return the names of the tensors that expressions read."""
        return frozenset(name for value in values for name in self.tensors(value))


def _gates(derived: RecurrenceForm | None, recur: Recur) -> Names:
    """Return the inputs of derived decays; without a derivation, the inputs declared as log decays."""
    if derived is None:
        tensors = [n.tensor for step in recur.steps for n in step.value.below if isinstance(n, Element)]
        return frozenset(t.name for t in tensors if t.refinement == "log_decay")
    gates = [gate for stage in derived.stages for gate in stage.gates]
    tensors = [node.tensor for gate in gates for node in gate.below if isinstance(node, Element)]
    gate_names = [t.name for t in tensors if t.refinement in ("log_decay", "unit")]
    sums = [stage for stage in derived.stages if isinstance(stage, RunningReduction)]
    return frozenset([*gate_names, *(name for stage in sums for name in stage.results)])


def _result_bytes(stage: Stage, dim_sizes: _Sizes) -> dict[str, int]:
    """Return the bytes of the results of a stage by name, with an element for each column of its state."""
    rows = dim_sizes.shape.lanes * dim_sizes.shape.n_q
    if isinstance(stage, RunningReduction):  # `after` is computed from `before` on the way, and not stored
        return {stage.before: rows * dim_sizes.count_of(stage.state.dims) * GATE_BYTES, stage.after: 0}
    if isinstance(stage, ElementwiseScan):
        return {name: rows * dim_sizes.count_of(axes(node)) * dim_sizes.number for name, node in stage.reads}
    columns = dim_sizes.count_of(states_of(stage)[0].dims[1:])
    return dict.fromkeys(stage.results, rows * columns * dim_sizes.number)


def _part(stage: Stage, dim_sizes: _Sizes) -> PassPart | RunningLogSum | Entries:
    """Return a derived stage as a part of the call."""
    if isinstance(stage, RunningReduction):
        return RunningLogSum(stage.state.name, dim_sizes.names(stage.added), frozenset(stage.results))
    if isinstance(stage, ElementwiseScan):
        return _entries(stage, dim_sizes)
    if isinstance(stage, Coupled):
        return _coupled(stage, dim_sizes)
    writes = [m.write for m in stage.steps if m.write]
    corrections = [v for m in stage.steps if m.correction for v in (m.correction.left, m.correction.read)]
    return PassPart(
        _form(stage, dim_sizes),
        keys=dim_sizes.names(*(write[0] for write in writes)),
        values=dim_sizes.names(*(write[1] for write in writes)),
        corrections=dim_sizes.names(*corrections),
        gates=dim_sizes.names(*stage.gates),
        queries=dim_sizes.names(*(read.query for read in stage.reads), *(solve.vector for solve in stage.solves)),
        reads=frozenset(stage.results),
    )


def _entries(stage: ElementwiseScan, dim_sizes: _Sizes) -> Entries:
    rows, columns = dim_sizes.count_of(stage.state.dims[:-1]), dim_sizes.size(stage.state.dims[-1])
    columns *= 1 + stage.state.is_complex
    has_exp = any(isinstance(node, Apply) and node.op in ("exp", "sigmoid") for node in stage.decay.below)
    return Entries(
        stage.state.name,
        rows,
        columns,
        dim_sizes.count_of(axes(stage.decay)) if has_exp else 0,
        dim_sizes.names(stage.decay, stage.write, *(node for _, node in stage.reads)),
        frozenset(stage.results),
    )


def _coupled(stage: Coupled, dim_sizes: _Sizes) -> PassPart:
    """Return coupled states as a pass over one state with all rows, a scalar decay and a row for each impulse."""
    rows, *columns = (dim_sizes.size(dim) for dim in stage.states[0].dims)
    reads = [read for impulse in stage.impulses for read, _ in impulse.reads]
    form = PassForm(
        f"{', '.join(state.name for state in stage.states)}[{', '.join(map(str, (rows, *columns)))}]",
        class_of_coupled(stage),
        rows * len(stage.states),
        prod(columns),
        RecurrenceClass(gate="scalar", correction="comba" if reads else "none", micro=len(stage.impulses)),
        max(len(stage.reads), 1),
    )
    return PassPart(
        form,
        keys=dim_sizes.names(*(impulse.left for impulse in stage.impulses)),
        values=dim_sizes.names(*(impulse.value for impulse in stage.impulses if impulse.value is not None)),
        corrections=dim_sizes.names(*reads),
        gates=dim_sizes.names(*stage.gates),
        queries=dim_sizes.names(*(read.query for read in stage.reads)),
        reads=frozenset(stage.results),
    )


def _coupled_notes(derived: RecurrenceForm | None) -> Iterator[str]:
    """Yield notes about approximations in the figures of coupled states."""
    for stage in () if derived is None else derived.stages:
        if isinstance(stage, Coupled) and len(stage.states) > 1:
            names = ", ".join(state.name for state in stage.states)
            yield f"{names}: counted as one state with the rows of all, which overestimates the work"


def _form(stage: Pass, dim_sizes: _Sizes) -> PassForm:
    rows, *columns = (dim_sizes.size(dim) for dim in ((1,) if stage.flat else ()) + stage.state.dims)
    micro = sum(_times(step, dim_sizes) for step in stage.steps)
    return form_of(stage, rows, prod(columns), max(micro, 1), (rows, *columns))


def form_of(stage: Pass, rows: int, columns: int, micro: int, dims: tuple[int, ...] = ()) -> PassForm:
    """Return the form of a pass over a state of `rows` × `columns` with `micro` steps for each token."""
    name = f"{stage.state.name}[{', '.join(map(str, dims or (rows, columns)))}]"
    reads = len(stage.reads) + sum(solved.steps for solved in stage.solves)
    return PassForm(name, class_of(stage), rows, columns, stage.form(micro), max(reads, 1))


def _times(step: Micro, dim_sizes: _Sizes) -> int:
    """Return how often a micro-step runs for each token."""
    return 1 if step.repeat is None else dim_sizes.count(step.repeat[2]) - dim_sizes.count(step.repeat[1])


def own_sizes(recur: Recur) -> Names:
    """Return the names of dimensions of states and inputs that do not follow from a call's q, k and v."""
    call_dims = {"batch", "head", "kv_head", "token", "query", "key", "dk", "dv"}
    roots = [recur.read, *(step.value for step in recur.steps)]
    tensors = [n.tensor for root in roots for n in root.below if isinstance(n, Element | Lookup)]
    dims = [dim for state in recur.states for dim in state.dims] + [dim for t in tensors for dim in t.dims]
    return frozenset(dim for dim in dims if isinstance(dim, str) and dim not in call_dims)


def repeats(recur: Recur) -> Names:
    """Return the names of the dimensions over which steps are repeated."""
    ends = [end for step in recur.steps if step.repeat for end in step.repeat[1:]]
    return frozenset(node.name for end in ends for node in end.below if isinstance(node, Extent))
