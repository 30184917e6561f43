"""The nodes of a checked program, in which every name is resolved; programs are evaluated and lowered to the IR.

Nodes compare by identity: a definition is one object, shared by all its uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal as OneOf

from attnc.spec.source import SourceFile, Span
from attnc.spec.types import Dim, Type

Scalar = int | Fraction | bool
Value = Scalar | tuple["Value", ...]
"""The value of a parameter: an exact number, a truth value, or a nested list of such values."""

PlaceName = OneOf["q", "k"]

# --- expressions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """A number or a truth value."""

    span: Span
    value: Scalar


@dataclass(frozen=True, slots=True, eq=False)
class Binder:
    """A name bound by `for`, or a parameter of a `let` or `def`. Binders with the same name differ by identity."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """A read of the value bound to a binder."""

    span: Span
    binder: Binder


@dataclass(frozen=True, slots=True, eq=False)
class ParameterRead:
    """A read of a parameter of the pattern; a parameter declared with `[head]` gives the entry of the current head."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class PositionRead:
    """The position of the current query or key, counted within its document if there are documents."""

    span: Span
    place: PlaceName


@dataclass(frozen=True, slots=True, eq=False)
class HeadIndexRead:
    """`head`, `kv_head` or `batch`: the current index."""

    span: Span
    name: OneOf["head", "kv_head", "batch"]


@dataclass(frozen=True, slots=True, eq=False)
class Size:
    """A size: `queries keys heads kv_heads group dk dv`, a named dimension, or the inferred extent of a segment."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Coordinate:
    """`q.t`: the coordinate of the query or key along an axis of a segment."""

    span: Span
    place: PlaceName
    segment: TokenSegment
    axis: int


@dataclass(frozen=True, slots=True, eq=False)
class InSegment:
    """`q in text`: whether the query or key is in a segment."""

    span: Span
    place: PlaceName
    segment: TokenSegment


@dataclass(frozen=True, slots=True, eq=False)
class InputRead:
    """A read of an input. `indices` are the written indices; those of `batch`, `head` and `kv_head` are implied.

    An index into a `token`, `key` or `query` dimension is a position. With fewer indices than dimensions the result is
    a vector over the last dimensions.
    """

    span: Span
    input: Input
    indices: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """A vector of q or k over `dk`, or of v over `dv`: of the current query or key, or at the position `at`."""

    span: Span
    tensor: OneOf["q", "k", "v"]
    at: Expr | None = None

    @property
    def place(self) -> PlaceName | None:
        """Return whether the vector belongs to the current query or key; None if a position is written."""
        return None if self.at is not None else "q" if self.tensor == "q" else "k"


@dataclass(frozen=True, slots=True, eq=False)
class ScaleRead:
    """`scale`: dk^-1/2 unless the call gives another value."""

    span: Span


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRead:
    """The score of the current row at the current key, or at the key `at`, in the attention that contains the read."""

    span: Span
    at: Expr | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxShare:
    """`softmax(score, extra = …)` at the current key, over the visible keys; `score` None: the attention's score."""

    span: Span
    score: Expr | None
    extra: Expr | None


@dataclass(frozen=True, slots=True, eq=False)
class BranchRead:
    """A result of a branch: the output or LSE of the current query or position `at`, or the weight of the current pair.

    `member`: the index of the branch in its family.
    """

    span: Span
    branch: str
    part: OneOf["out", "lse", "weight"]
    member: Expr | None = None
    at: Expr | None = None


@dataclass(frozen=True, slots=True, eq=False)
class MergeCall:
    """`merge(a, b, …)`: the output of one softmax over the keys of all parts."""

    span: Span
    parts: tuple[BranchRead, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Infinity:
    """`inf`: the score of a candidate that is ranked first; `-inf` ranks it last."""

    span: Span


@dataclass(frozen=True, slots=True, eq=False)
class InUnit:
    """`q in b`: whether the token at the position `at` is in the current unit."""

    span: Span
    at: Expr
    unit: Unit


@dataclass(frozen=True, slots=True, eq=False)
class SelectedTest:
    """`k in chosen`: whether the current row selected a token, all tokens of a unit, or an index of a range.

    `item`: the position of the token, or the index for a selection from a range without `covers`; None for a unit.
    `number`: an index of the range, whatever the entry covers. `member`: the index of the selection in its family.
    `by_query`: whether the row depends on the current query.
    """

    span: Span
    selection: str
    item: Expr | None
    unit: Unit | None = None
    member: Expr | None = None
    by_query: bool = True
    number: Expr | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SelectedCount:
    """`chosen.size`: the number of entries that the current row selected; `member`, `by_query` as in `SelectedTest`."""

    span: Span
    selection: str
    member: Expr | None = None
    by_query: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class RankingRead:
    """A candidate's `rank` (0 for the best score), `mass` (the sum of the scores ranked before it) or `score`."""

    span: Span
    name: OneOf["rank", "mass", "score"]


@dataclass(frozen=True, slots=True, eq=False)
class StateRead:
    """A read of a state: its value after the steps above the read and before the steps below."""

    span: Span
    state: StateClause


@dataclass(frozen=True, slots=True, eq=False)
class DefinitionUse:
    """A use of a `let`, or a call of a `def` or a `let` with parameters. `q` and `k` have their meaning at the use."""

    span: Span
    definition: Definition
    arguments: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """An operator or a built-in function.

    Operators: neg add sub mul div floordiv mod pow, lt le gt ge eq ne, not, and or (n-ary, short-circuit, left to
    right). Functions have their own names: those of `exact_operations`, and the floating-point functions. `floating`:
    the operation stands in a floating-point expression, so that it may overflow to inf; on exact operands it is exact
    nevertheless.
    """

    span: Span
    op: str
    operands: tuple[Expr, ...]
    floating: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ConditionalValue:
    """`then if condition else otherwise`; only the side that the condition picks is evaluated."""

    span: Span
    condition: Expr
    then: Expr
    otherwise: Expr


@dataclass(frozen=True, slots=True, eq=False)
class RangeVariable:
    """A variable of an aggregate over the half-open range `low .. high`; it binds a name, or rebinds q, k or head."""

    target: Binder | OneOf["q", "k", "head"]
    low: Expr
    high: Expr


@dataclass(frozen=True, slots=True, eq=False)
class UnitVariable:
    """A variable of an aggregate over the positions of a unit's existing tokens."""

    target: Binder | OneOf["q", "k", "head"]
    unit: Unit


@dataclass(frozen=True, slots=True, eq=False)
class VisibleVariable:
    """A variable of an aggregate over the visible keys of a row: `k`, or the name that `over` gives to the keys."""

    target: Binder | PlaceName


Domain = RangeVariable | UnitVariable | VisibleVariable


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """`op(body for variable, … if condition)`; op: sum mean max min any all count. A range may read earlier names."""

    span: Span
    op: str
    body: Expr
    runnings: tuple[Domain, ...]
    condition: Expr | None
    floating: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ListValue:
    """A list `[a, b, c]`."""

    span: Span
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """An entry of a list or vector, `table[i]`."""

    span: Span
    table: Expr
    index: Expr


Expr = (
    Literal
    | Local
    | ParameterRead
    | PositionRead
    | HeadIndexRead
    | Size
    | Coordinate
    | InSegment
    | InputRead
    | Vector
    | ScaleRead
    | ScoreRead
    | SoftmaxShare
    | BranchRead
    | MergeCall
    | Infinity
    | InUnit
    | SelectedTest
    | SelectedCount
    | RankingRead
    | StateRead
    | DefinitionUse
    | Operation
    | ConditionalValue
    | Aggregate
    | ListValue
    | Item
)

# --- declarations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Definition:
    """A `let` or `def` with its parameters; a `let` inside a `def` is a definition that the body uses."""

    span: Span
    name: str
    parameters: tuple[Binder, ...]
    body: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """A compile-time value; without a `default` the caller must give one."""

    span: Span
    name: str
    type: Type
    default: Value | None

    @property
    def per_head(self) -> bool:
        """Whether the parameter is a list with an entry per head, of which a read takes the current head's entry."""
        return "head" in self.type.dims


@dataclass(frozen=True, slots=True, eq=False)
class SegmentAxis:
    """One axis of a segment; `extent` is an expression of parameters, or a `Size` that is inferred at run time."""

    span: Span
    name: str
    extent: Expr


@dataclass(frozen=True, slots=True, eq=False)
class TokenSegment:
    """`tokens name(axes)`: consecutive positions with coordinates, slowest axis first. A single segment has no name."""

    span: Span
    name: str | None
    axes: tuple[SegmentAxis, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """A tensor that every call gives. `type.dims` holds the declared dimensions in order.

    Relations read `int` and `bool` inputs, scores also `real` inputs. A dimension is a fixed name (batch head kv_head
    query key token dk dv), the name of a new size, a number, or an expression of parameters. `learned`: a module owns
    the tensor as a Parameter.

    `ranks_of`: the tensor is computed as `order(…)` of another input: the rank of each token when tokens are sorted by
    that input, where equal entries are ranked by position.
    """

    span: Span
    name: str
    type: Type
    learned: bool = False
    ranks_of: Input | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """`a = q // block`: the queries or keys that share a value; `binder` is bound to that value, an int or a list."""

    span: Span
    binder: Binder
    place: PlaceName
    value: Expr


@dataclass(frozen=True, slots=True, eq=False)
class RoundClause:
    """`round`: a pair is visible if `keep` holds for the units that contain its query and its key."""

    span: Span
    q: Unit
    k: Unit
    keep: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Requirement:
    """`require condition`. `stage` is `parameter` if only parameters decide, else `call`."""

    span: Span
    condition: Expr
    stage: OneOf["parameter", "call"]


@dataclass(frozen=True, slots=True, eq=False)
class Preset:
    """A named set of parameter values."""

    span: Span
    name: str
    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxClause:
    """`softmax(score, extra = …)`: the extra logits join the denominator without values."""

    span: Span
    extra: Expr | None


@dataclass(frozen=True, slots=True, eq=False)
class KeyRange:
    """`l in low .. high`, or `l in n`: a range whose indices are keys, candidates, entries of a stack, or members.

    `by_query`: the ends depend on the query, which is allowed for candidates. `parts`: the ranges of several names that
    form one flat range from 0, the last varying fastest.
    """

    span: Span
    binder: Binder
    low: Expr
    high: Expr
    by_query: bool = False
    parts: tuple[KeyRange, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Pad:
    """`pad y: low .. high`: the range of keys along an axis; keys and values outside the tokens are zeros."""

    span: Span
    segment: TokenSegment
    axis: int
    low: Expr
    high: Expr


@dataclass(frozen=True, slots=True, eq=False)
class AttentionClauses:
    """One attention: `Σ weights · value` over the visible keys of a row.

    `visible` holds the lines that the attention adds to the pattern's relation. `over`: the keys are units of tokens or
    a range, not tokens. `per`: units that contain the query. `stack`: the output of a row has a number for each index
    of a range. `family`: there is one attention for each index of a range. The defaults of `score`, `weights` and
    `value` are `scale * dot(q, k)`, `softmax(score)` and the key's v.
    """

    span: Span
    name: str
    visible: tuple[Expr, ...]
    over: Unit | KeyRange | None = None
    per: tuple[Unit, ...] = ()
    stack: KeyRange | None = None
    family: KeyRange | None = None
    score: Expr | None = None
    weights: SoftmaxClause | Expr | None = None
    value: Expr | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """Return the units that the attention's expressions may read."""
        return (*self.per, self.over) if isinstance(self.over, Unit) else self.per


@dataclass(frozen=True, slots=True, eq=False)
class SelectionClauses:
    """`select`: the candidates that each row keeps, out of `row.over` or the keys.

    `row` describes the candidates as an attention: visible keys are candidates, and weights are scores. `by`: the
    queries that select together: each query (or unit of `row.per`) separately, a head, or a batch entry. `pairs`: all
    pairs of a query and a candidate are ranked together. `covers`: the condition for the keys that an entry covers. The
    selection holds the candidates that fulfil `keep`, and all entries that fulfil `always`. `of_queries`: the
    candidates are queries, not keys.
    """

    span: Span
    name: str
    row: AttentionClauses
    by: OneOf["query", "head", "batch"]
    pairs: bool
    covers: Expr | None
    keep: Expr
    always: Expr | None
    of_queries: bool = False

    @property
    def family(self) -> KeyRange | None:
        """Return the range of the family's index; None for a single selection."""
        return self.row.family


@dataclass(frozen=True, slots=True, eq=False)
class StateClause:
    """`state S: [dk, dv] = start`: a tensor that a recurrence carries from token to token, per batch entry and head."""

    span: Span
    name: str
    dims: tuple[Dim, ...]
    start: float
    is_complex: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Let:
    """A `let` that reads a state; it is computed where it stands, and later lines read its value as `binder`."""

    span: Span
    binder: Binder
    value: Expr


@dataclass(frozen=True, slots=True, eq=False)
class StepClause:
    """`step S = value for j in 0 .. n`: set the state to the value, once or for each index of a range in turn."""

    span: Span
    state: StateClause
    value: Expr
    repeat: KeyRange | None


@dataclass(frozen=True, slots=True, eq=False)
class ReadClause:
    """`read value`: the output of a token."""

    span: Span
    value: Expr


Line = Let | StepClause | ReadClause


@dataclass(frozen=True, slots=True, eq=False)
class RecurrenceClauses:
    """A recurrence: for each token in processing order, the lines read and update the states.

    In the lines `q`, `k`, `v` and the inputs belong to the token; `PositionRead("q")` is its position. Tokens are
    processed by increasing `scan`, or by position without `scan`. Before a token for which `reset` holds, the states
    return to their start values. `family`: there is one recurrence for each index of a range.
    """

    span: Span
    name: str
    states: tuple[StateClause, ...]
    lines: tuple[Line, ...]
    scan: Expr | None = None
    reset: Expr | None = None
    family: KeyRange | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """One checked pattern. `visible` holds the lines of the relation that all attentions share; `round` rounds it.

    `approximate`: the number of conjugate-gradient steps of every `solve`; None solves exactly.

    `attends` holds the attentions, each after what it reads. The result is `combine` if there is one, else the output
    of the only attention.

    `selections` holds the selections that attentions and other selections read, each after what it reads.

    `recurrence`: the recurrence of a recurrent pattern, which has no relation and no attentions. `stateful` holds the
    branches with a state, which attentions and `combine` may read.

    `align` is None if the text does not set it; `needs_align` tells whether the relation reads both positions, so that
    a call with unequal lengths needs `align`.
    """

    span: Span
    source: SourceFile
    name: str
    docstring: str
    parameters: tuple[Parameter, ...]
    presets: tuple[Preset, ...]
    requirements: tuple[Requirement, ...]
    segments: tuple[TokenSegment, ...]
    inputs: tuple[Input, ...]
    align: OneOf["start", "end"] | None
    needs_align: bool
    documents: Input | None
    visible: tuple[Expr, ...]
    round: RoundClause | None
    attends: tuple[AttentionClauses, ...] = ()
    combine: Expr | None = None
    pads: tuple[Pad, ...] = ()
    approximate: Expr | None = None
    recurrence: RecurrenceClauses | None = None
    stateful: tuple[RecurrenceClauses, ...] = ()
    selections: tuple[SelectionClauses, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class BoundProgram:
    """A program with a value for every parameter, ready to be evaluated and lowered."""

    program: Program
    values: Mapping[str, Value]

    @property
    def lengths(self) -> dict[str, int]:
        """Return the lengths of parameter lists with a named dimension, such as `n` of `strides: int[n]`, by name."""
        result: dict[str, int] = {}
        for parameter in self.program.parameters:
            value: Value = self.values.get(parameter.name, 0)
            for dim in parameter.type.dims:
                if not isinstance(value, tuple):
                    break
                if isinstance(dim, str) and dim != "head":
                    result[dim] = len(value)
                value = value[0]
        return result
