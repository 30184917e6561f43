"""The graph of a pattern: its attentions, selections, recurrences, tokens and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from attnc.compiler.ir.nodes import Const, Extent, Index, Softmax, Tensor, Value, Var, intern
from attnc.compiler.ir.print_ir import print_pattern
from attnc.spec.source import Span


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of positions with axes (name, extent), slowest first. An extent known at the call is an `Extent`."""

    name: str | None
    axes: tuple[tuple[str, Index], ...]
    offset: Index
    length: Index


Loop = tuple[Var, Index, Index]
"""A variable and the range that it runs over."""


@dataclass(frozen=True, slots=True, eq=False)
class Attend:
    """An attention: `Σ weights · value` over the visible keys.

    `keys`: the number of keys where keys are not tokens, but units, numbers of a range, or tokens padded with zeros.
    `key_of`: the number of the key that holds the token k, if keys hold tokens. `stack`: a row has one result for each
    value of this variable. `family`: there is one attention for each value of this variable.
    """

    name: str
    visible: Index
    score: Value
    weights: Softmax | Value
    value: Value
    keys: Index | None = None
    key_of: Index | None = None
    stack: Loop | None = None
    family: Loop | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """A selection: `given` is a truth tensor by batch entry, head, row and item, where items are keys or blocks.

    The head dimension of `given` is `head`, `kv_head` or missing, as the selection depends on it. In all expressions, q
    is the row and k is the item. `rows`: the number of rows where rows are not queries; `row_of`: the row of query q.
    `items`: the number of items where items are not tokens; `item_of`: the item that holds token k.

    Items for which `candidates` holds are ranked by `score`, in each row or over all rows of a head (`pairs`). The row
    selects the candidates for which `keep` is not 0, and every item for which `always` holds.
    """

    name: str
    given: Tensor
    rows: Index | None
    row_of: Index
    items: Index | None
    item_of: Index | None
    score: Value
    candidates: Index
    keep: Value
    always: Index
    pairs: bool = False

    @property
    def by_heads(self) -> str | None:
        """The name of the head dimension; None if all heads select alike."""
        return next((dim for dim in self.given.dims if dim in ("head", "kv_head")), None)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A state of a recurrence, for each batch entry and head; every entry is `start` before the first token."""

    name: str
    dims: tuple[str | int, ...]
    start: float
    is_complex: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The step from `version` of a state to the next version, taken once or for each value of `repeat` in turn."""

    state: str
    version: int
    value: Value
    repeat: Loop | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Recur:
    """A recurrence: tokens update the states by `steps` in increasing `order` (None: by position) and get `read`.

    `read` and the values of steps depend on the token at position q and on versions of the states. Where `reset` holds
    for a token, the states return to their start values before it. `member`: the number of this recurrence in its
    family, counted from 0.
    """

    name: str
    states: tuple[State, ...]
    steps: tuple[Step, ...]
    read: Value
    order: Index | None = None
    reset: Index | None = None
    member: int | None = None


BOUNDARIES = "cu_seqlens.size"
"""The name of the dimension of cumulative sequence lengths."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenExtents:
    """The grid extents of a pattern as open sizes `Extent(name)`, whose values are `sizes`.

    `extents`: the extents of the axes. `known`: the open form of each relation of the pattern. Substituting the values
    into an open form gives the relation itself, so a relation that a pass has changed has no entry.
    """

    sizes: Mapping[str, int]
    extents: tuple[Index, ...]
    known: Mapping[Index, Index]

    @property
    def numbers(self) -> dict[Index, Index]:
        """The substitution of the sizes by their values."""
        return {intern(Extent(name)): intern(Const(value)) for name, value in self.sizes.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """A whole pattern with its parameters bound.

    `head_lists`: the parameters with one entry per head, and their lengths. `requirements`: conditions that are checked
    at the call, each with its position in the source.

    `nodes` are sorted so that a node reads only earlier nodes. The result is `combine`, with `lse` if it has one, or
    the output of the only node. A node's output is read as a tensor of its name (`compiler.ir.value_nodes.output`).

    `documents` has an id for each token, or, where its dimension is `BOUNDARIES`, the cumulative lengths of sequences.

    `selections` are computed before the nodes that read their tensors.

    A recurrence has `recur` instead of nodes. `stateful`: branches with a state, which are computed before the nodes.

    `origins`: the position in the source where a node first arose. `general`: the pattern with open grid extents; None
    where extents cannot be left open.
    """

    name: str
    parameters: Mapping[str, object]
    head_lists: tuple[tuple[str, int], ...]
    tensors: tuple[Tensor, ...]
    segments: tuple[Segment, ...]
    align: Literal["start", "end"] | None
    needs_align: bool
    documents: Tensor | None
    requirements: tuple[tuple[Index, Span], ...]
    nodes: tuple[Attend, ...]
    origins: Mapping[Index, Span]
    combine: Value | None = None
    lse: Value | None = None
    general: OpenExtents | None = None
    recur: Recur | None = None
    stateful: tuple[Recur, ...] = ()
    selections: tuple[Selection, ...] = ()

    @property
    def chooses(self) -> bool:
        """Whether visibility depends on the content of a call, through selections or sorted tokens."""
        return bool(self.selections) or any(tensor.made is not None for tensor in self.tensors)

    @property
    def attend(self) -> Attend:
        """The only node of a pattern with one attention."""
        (node,) = self.nodes
        return node

    def __str__(self) -> str:
        return print_pattern(self)
