"""The checked program: every name resolved, every clause in its slot. It is evaluated, and lowered to the IR.

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
"""A parameter's value: exact numbers, truth values, and (nested) tables of them."""

PlaceName = OneOf["q", "k"]

# --- expressions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """A number or a truth value."""

    span: Span
    value: Scalar


@dataclass(frozen=True, slots=True, eq=False)
class Binder:
    """A name bound by `for`, or a parameter of a `let` or `def`. Identity tells two of one name apart."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """The value bound to a binder."""

    span: Span
    binder: Binder


@dataclass(frozen=True, slots=True, eq=False)
class ParameterRead:
    """A parameter of the pattern. One declared with `[head]` gives the entry of the head at hand."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class PositionRead:
    """The position of this query or key (inside its document, where there are documents)."""

    span: Span
    place: PlaceName


@dataclass(frozen=True, slots=True, eq=False)
class HeadIndexRead:
    """`head`, `kv_head` or `batch`: the index at hand."""

    span: Span
    name: OneOf["head", "kv_head", "batch"]


@dataclass(frozen=True, slots=True, eq=False)
class Size:
    """`queries keys heads kv_heads group dk dv`, a dimension named in a type, or the run-time length of a segment."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Coordinate:
    """`q.t`: the coordinate of a place along an axis of a segment."""

    span: Span
    place: PlaceName
    segment: TokenSegment
    axis: int


@dataclass(frozen=True, slots=True, eq=False)
class InSegment:
    """`q in text`."""

    span: Span
    place: PlaceName
    segment: TokenSegment


@dataclass(frozen=True, slots=True, eq=False)
class InputRead:
    """An element of an input. `indices` are the written ones: `batch`, `head` and `kv_head` dimensions are implied.

    An index into a `token`, `key` or `query` dimension is a position. Where fewer are written than there are dimensions
    the element is a vector over the last ones.
    """

    span: Span
    input: Input
    indices: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """The vector of a query or key, over `dk`, or of a value, over `dv`: at its place, or at a position."""

    span: Span
    tensor: OneOf["q", "k", "v"]
    at: Expr | None = None

    @property
    def place(self) -> PlaceName | None:
        """The place it is read at, where no position is written."""
        return None if self.at is not None else "q" if self.tensor == "q" else "k"


@dataclass(frozen=True, slots=True, eq=False)
class ScaleRead:
    """`scale`: dk^-1/2 unless the call says otherwise."""

    span: Span


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRead:
    """The score of this row at this key, or at another: of the attention whose weights or values these are."""

    span: Span
    at: Expr | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxShare:
    """`softmax(score, extra = …)` at this key, over the keys that this row sees; `score` None: the row's own."""

    span: Span
    score: Expr | None
    extra: Expr | None


@dataclass(frozen=True, slots=True, eq=False)
class BranchRead:
    """The result of a branch: its output or LSE, for this query or at a position, or its weight at this query and key.

    `member`: which branch of a family.
    """

    span: Span
    branch: str
    part: OneOf["out", "lse", "weight"]
    member: Expr | None = None
    at: Expr | None = None


@dataclass(frozen=True, slots=True, eq=False)
class MergeCall:
    """`merge(a, b, …)`: one softmax over the keys of all parts."""

    span: Span
    parts: tuple[BranchRead, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Infinity:
    """`inf`: the score of what is chosen first, or with a sign of what is chosen last."""

    span: Span


@dataclass(frozen=True, slots=True, eq=False)
class InUnit:
    """`q in b`: whether the token at a position is in the unit at hand."""

    span: Span
    at: Expr
    unit: Unit


@dataclass(frozen=True, slots=True, eq=False)
class SelectedTest:
    """`k in chosen`: whether the row at hand chose the token at a position, or all tokens of a unit, or a number.

    `item`: the position, or the number where the selection is over a range that covers nothing; None for a unit.
    `number`: that of a place of a range, whatever it covers. `member`: which selection of a family. `by_query`: whether
    the query at hand tells the row.
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
    """`chosen.size`: how many of its places the row at hand chose; the rest as of `SelectedTest`."""

    span: Span
    selection: str
    member: Expr | None = None
    by_query: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class RankingRead:
    """`rank`, 0 for the best score, `mass`, the sum of the scores ranked before, or its `score`: of a candidate."""

    span: Span
    name: OneOf["rank", "mass", "score"]


@dataclass(frozen=True, slots=True, eq=False)
class StateRead:
    """A state as it is where this stands: after the steps above it, before those below."""

    span: Span
    state: StateClause


@dataclass(frozen=True, slots=True, eq=False)
class DefinitionUse:
    """A `let`, or a call of a parametrised `let` or of a `def`. Places mean what they mean here, at the use."""

    span: Span
    definition: Definition
    arguments: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """An operator or a built-in function.

    Operators: neg add sub mul div floordiv mod pow, lt le gt ge eq ne, not, and or (n-ary, left to right, as needed).
    Functions carry their own names: abs min max clamp floor ceil isqrt bitlen bitand bitor xor power_of_two, and
    those of floating point. `floating`: it stands where numbers are floating point, so that it may overflow to inf;
    what it computes from exact operands is exact all the same.
    """

    span: Span
    op: str
    operands: tuple[Expr, ...]
    floating: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ConditionalValue:
    """`then if condition else otherwise`; only the chosen side is evaluated."""

    span: Span
    condition: Expr
    then: Expr
    otherwise: Expr


@dataclass(frozen=True, slots=True, eq=False)
class RangeVariable:
    """A variable of an aggregate over the half-open `low .. high`. Target: a binder, or a rebound place or head."""

    target: Binder | OneOf["q", "k", "head"]
    low: Expr
    high: Expr


@dataclass(frozen=True, slots=True, eq=False)
class UnitVariable:
    """A variable of an aggregate over the tokens of a unit: positions, each of a token that exists."""

    target: Binder | OneOf["q", "k", "head"]
    unit: Unit


@dataclass(frozen=True, slots=True, eq=False)
class VisibleVariable:
    """A variable of an aggregate over the keys that this row sees: `k`, or the name that `over` gives to its keys."""

    target: Binder | PlaceName


Domain = RangeVariable | UnitVariable | VisibleVariable


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """`op(body for running, … if condition)`; op: sum mean max min any all count. Later ranges see earlier ones."""

    span: Span
    op: str
    body: Expr
    runnings: tuple[Domain, ...]
    condition: Expr | None
    floating: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ListValue:
    """`[a, b, c]`."""

    span: Span
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """`table[i]`."""

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
    """A `let` or `def` with its parameters; lets inside a `def` are definitions that its body uses."""

    span: Span
    name: str
    parameters: tuple[Binder, ...]
    body: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """A compile-time value. `default` is None where the caller must give one. `per_head`: a list, an entry a head."""

    span: Span
    name: str
    type: Type
    default: Value | None

    @property
    def per_head(self) -> bool:
        """Whether a read takes the entry of the head at hand."""
        return "head" in self.type.dims


@dataclass(frozen=True, slots=True, eq=False)
class SegmentAxis:
    """One axis of a segment; `extent` is an expression of parameters, or a `Size` that names a run-time length."""

    span: Span
    name: str
    extent: Expr


@dataclass(frozen=True, slots=True, eq=False)
class TokenSegment:
    """`tokens name(axes)`: a stretch of positions with coordinates, slowest axis first. A lone one has no name."""

    span: Span
    name: str | None
    axes: tuple[SegmentAxis, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """A tensor given with each call. `type.dims` holds the declared dimensions in order.

    `int` and `bool` inputs enter relations, `real` ones scores; each dimension is a fixed name (batch head kv_head
    query key token dk dv), a new size's name, or an exact number / expression of parameters. `learned`: a module owns
    it as a Parameter.

    `ranks_of`: it is not given, but holds `order(…)` of one that is: the place of each token when tokens are sorted by
    that, ties to the earlier one.
    """

    span: Span
    name: str
    type: Type
    learned: bool = False
    ranks_of: Input | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """`a = q // block`: the queries, or keys, that share a value; `binder` stands for that value, an int or a list."""

    span: Span
    binder: Binder
    place: PlaceName
    value: Expr


@dataclass(frozen=True, slots=True, eq=False)
class RoundClause:
    """`round`: a pair is visible where `keep` holds for the pair of units around it."""

    span: Span
    q: Unit
    k: Unit
    keep: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Requirement:
    """`require condition`. `stage` is `parameter` where parameters alone decide, else `call`."""

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
    """`softmax(score, extra = …)`: a share of each weight's denominator goes to the extra logits, and is dropped."""

    span: Span
    extra: Expr | None


@dataclass(frozen=True, slots=True, eq=False)
class KeyRange:
    """`l in low .. high`, or `l in n`: places of a row of keys, or of a stack of rows, that are no tokens.

    `by_query`: its ends differ from query to query, as those of what a query may choose can. `parts`: of several names
    the range of each, the last the fastest; all of them together are numbered from 0.
    """

    span: Span
    binder: Binder
    low: Expr
    high: Expr
    by_query: bool = False
    parts: tuple[KeyRange, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Pad:
    """`pad y: low .. high`: the keys' grid along an axis; outside of the tokens lie keys and values of zeros."""

    span: Span
    segment: TokenSegment
    axis: int
    low: Expr
    high: Expr


@dataclass(frozen=True, slots=True, eq=False)
class AttentionClauses:
    """One attention: `Σ weights · value` over the keys that a row sees.

    `visible` is what it adds to the pattern's relation. `over`: the keys are units of tokens or a range, instead of
    tokens. `per`: units that the query is in. `stack`: a row gives a number for each place of a range. `family`: there
    is one for each place of a range. None of `score`, `weights` and `value`: `scale * dot(q, k)`, `softmax(score)`, the
    key's v.
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
        """The units that its expressions may name."""
        return (*self.per, self.over) if isinstance(self.over, Unit) else self.per


@dataclass(frozen=True, slots=True, eq=False)
class SelectionClauses:
    """`select`: what each row chooses of the places of `row.over`, or of the keys.

    `row` is that as an attention: it sees the candidates, its weights are their scores. `by`: which queries decide
    together: those of a unit in `row.per`, or else none, all of a head, or all of a batch entry. `pairs`: one ranking
    of all pairs of a query and a place. `covers`: the keys that a place stands for. What fulfils `keep` is chosen of
    the candidates, and what fulfils `always` besides. `of_queries`: the places are queries, not keys.
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
        """The range for each place of which there is one."""
        return self.row.family


@dataclass(frozen=True, slots=True, eq=False)
class StateClause:
    """`state S: [dk, dv] = start`: what a recurrence carries from token to token, for each batch entry and head."""

    span: Span
    name: str
    dims: tuple[Dim, ...]
    start: float
    is_complex: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Let:
    """A `let` that reads a state: its value where it stands, which later lines read as `binder`."""

    span: Span
    binder: Binder
    value: Expr


@dataclass(frozen=True, slots=True, eq=False)
class StepClause:
    """`step S = value for j in 0 .. n`: the state becomes the value, once or for each place of a range in turn."""

    span: Span
    state: StateClause
    value: Expr
    repeat: KeyRange | None


@dataclass(frozen=True, slots=True, eq=False)
class ReadClause:
    """`read value`: what a token gets."""

    span: Span
    value: Expr


Line = Let | StepClause | ReadClause


@dataclass(frozen=True, slots=True, eq=False)
class RecurrenceClauses:
    """Tokens one after another: for each of them the lines in their order, which read and update the states.

    In the lines `q`, `k`, `v` and the inputs are those of the token; `PositionRead("q")` is its position. Tokens come
    by increasing `scan` where it is given, else by their positions. The states are as at the start before a token for
    which `reset` holds. `family`: there is one for each place of a range, by its name.
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
    """One pattern, checked. `visible` are the lines of the relation that all attentions share; `round` blocks it.

    `approximate`: in so many steps of conjugate gradients is what `solve` finds found.

    `attends` are its attentions, those that others read first. The result is `combine`, where there is one, else the
    output of the only attention.

    `selections` are what attentions and other selections ask by name, those that others read first.

    `recurrence` in their place: a `recurrence` has no relation and no attentions. `stateful` are branches with a state,
    by their names, which attentions and `combine` may read.

    `align` is None where the text does not say; `needs_align` tells whether the relation reads both positions, so that
    unequal lengths must be refused without it.
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
    """A program with a value for every parameter: what is evaluated and lowered."""

    program: Program
    values: Mapping[str, Value]

    @property
    def lengths(self) -> dict[str, int]:
        """The dimensions that the parameters' lists name: `n` of `strides: int[n]`."""
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
