"""Relations that ask truth tensors which every call makes anew, as kernels compute them in partial tiles.

`any(chosen[i] for i in low .. high)` is there one entry of a tensor that is made beside, if `high - low` is a constant:
which stretches of that length have a chosen entry. Else it is the difference of two counts of chosen entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import override

from attnc.compiler import fold
from attnc.compiler.ir import (
    Bool,
    Compare,
    Const,
    Extent,
    HeadIndex,
    Index,
    Lookup,
    Pattern,
    Position,
    Reduce,
    Tensor,
    Var,
    intern,
)
from attnc.compiler.kernels.index_text import COLUMNS, ROWS, ExprText, IndexText, NotInKernelsError, fits_32_bits
from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.walks import ListedWalk, Sides
from attnc.compiler.rewrite import rewrite, walk
from attnc.compiler.verify_ir import checked


@dataclass(frozen=True)
class MaskRange:
    """`any(read[.., i] for i in low .. high)`, where `read` is a truth tensor at the last index `variable`.

    `length`: a constant that `high - low` is, but where `low` is less than `least` or `high` more than `most`.
    """

    read: Lookup
    variable: Var
    low: Index
    high: Index
    least: Index
    most: Index
    length: int | None
    start: Index


def stretch_of(node: Index) -> MaskRange | None:
    """An aggregate as a question to consecutive entries, where it is one and its conditions are ends of these."""
    if not (isinstance(node, Reduce) and node.op == "any"):
        return None
    reads: list[Lookup] = []
    lows, highs = list[Index](), list[Index]()
    for part in (*_conjuncts(node.condition), *_conjuncts(node.body)):
        if _is_truth_tensor(part) and isinstance(part, Lookup):
            reads.append(part)
            continue
        end = _end(part, node.var)
        if end is None:
            return None
        (lows if end[0] > 0 else highs).append(end[1])
    if len(reads) != 1 or reads[0].indices[-1] is not node.var:
        return None
    if any(fold.mentions(index, node.var) for index in (*reads[0].indices[:-1], *lows, *highs)):
        return None
    gap = fold.sub(highs[0], lows[0]) if len(lows) == len(highs) == 1 else None
    length = gap.value if isinstance(gap, Const) and gap.value > 0 else None
    low, high = fold.maximum(node.low, *lows), fold.minimum(node.high, *highs)
    low, high = fold.minimum(low, node.high), fold.maximum(high, node.low)
    start = lows[0] if length is not None else low
    return MaskRange(reads[0], node.var, low, high, node.low, node.high, length, start)


def _conjuncts(node: Index) -> tuple[Index, ...]:
    if node is fold.truth(True):
        return ()
    return node.operands if isinstance(node, Bool) and node.op == "and" else (node,)


def _is_truth_tensor(node: Index) -> bool:
    return isinstance(node, Lookup) and node.tensor.kind == "bool"


def _end(node: Index, variable: Var) -> tuple[int, Index] | None:
    """Return the side and the end of a bound: 1 for `variable >= end`, -1 for `variable < end`, else None."""
    if not (isinstance(node, Compare) and node.op == "ge"):
        return None
    factor = dict(fold.parts(node.value)[0]).get(variable, 0)
    if not factor:
        return None
    rest = fold.floordiv(fold.sub(node.value, fold.times(variable, factor)), fold.const(abs(factor)))
    return (1, fold.times(rest, -1)) if factor > 0 else (-1, fold.add(rest, fold.const(1)))


@dataclass(frozen=True)
class DerivedMask:
    """A tensor that is made of a truth tensor `of`, along its last dimension, which has one entry and `length` more.

    Entry i says whether one of `length` entries before i holds, or without a length how many before i do.
    """

    tensor: Tensor
    of: Tensor
    length: int | None


@dataclass(frozen=True)
class MaskRelation:
    """A relation as kernels compute it; `derived`: the tensors made of others that it reads."""

    relation: Index
    derived: tuple[DerivedMask, ...]


def find_asked(pattern: Pattern) -> MaskRelation:
    """The relation of an attention for kernels. Raises NotInKernelsError."""
    own = {tensor.name for tensor in pattern.tensors}
    places = {i.given: fold.extent("keys") if i.items is None else i.items for i in pattern.selections}
    found: dict[tuple[Tensor, int | None], DerivedMask] = {}

    def derived(of: Tensor, length: int | None) -> Tensor:
        if (of, length) not in found:
            name = f"{of.name}_{'before' if length is None else f'of_{length}'}"
            while name in own:
                name += "_"
            own.add(name)
            tensor = intern(Tensor(name, "int" if length is None else "bool", (*of.dims[:-1], "ends")))
            found[of, length] = DerivedMask(tensor, of, length)
        return found[of, length].tensor

    def change(node: Index) -> Index | None:
        one = stretch_of(node)
        if one is None:
            return None
        *before, _ = one.read.indices
        if one.length is not None and one.least is fold.const(0) and one.most is places.get(one.read.tensor):
            length = fold.const(one.length)
            end = fold.add(one.start, length)
            inside = fold.minimum(fold.maximum(end, fold.const(0)), fold.add(one.most, length))
            return fold.lookup(derived(one.read.tensor, one.length), (*before, inside))
        counts = derived(one.read.tensor, None)
        ends = (fold.lookup(counts, (*before, end)) for end in (one.high, one.low))
        return fold.less(fold.const(0), fold.sub(*ends))

    relation = checked(rewrite(pattern.attend.visible, change))
    _check(relation)
    return MaskRelation(relation, tuple(found.values()))


ALONG = 128
"""Keys of a tile at most: rows of truth tensors that are read along keys are filled up to a multiple."""

UNIT = 16
"""Bytes that are loaded at once where rows begin at multiples of that."""


def is_along_keys(node: Lookup) -> bool:
    """Whether the entries that the keys of a tile read lie side by side, one after another."""
    *before, last = node.indices
    others = (below for index in before for below in index.below)
    one = node.tensor.kind == "bool" and last is fold.place("k") and node.tensor.dims[-1] != "query"
    return one and fold.place("k") not in others


def read_along_keys(asked: MaskRelation) -> frozenset[Tensor]:
    """The tensors that are read so."""
    lookups = (node for node in walk(asked.relation) if isinstance(node, Lookup))
    return frozenset(node.tensor for node in lookups if is_along_keys(node))


def gathers_pairs(asked: MaskRelation) -> bool:
    """Whether entries are read at an address of its own for each pair: in a row of the query, at a place of the key."""
    lookups = [node for node in walk(asked.relation) if isinstance(node, Lookup) and not is_along_keys(node)]
    return any(_is_of(node, "q", "k") and _is_of(node, "k", "q") for node in lookups)


def _is_of(node: Lookup, name: Literal["q", "k"], other: Literal["q", "k"]) -> bool:
    """Whether one of the indices has the one place and not the other."""
    return any(fold.place(name) in index.below and fold.place(other) not in index.below for index in node.indices)


def _check(relation: Index) -> None:
    """Raise NotInKernelsError where kernels cannot compute a relation."""
    nodes = walk(relation)
    unnamed = next((n.name for n in nodes if isinstance(n, Extent) and not n.name.isidentifier()), None)
    if unnamed is not None:
        raise NotInKernelsError(f"the number of `{unnamed}`")
    names: dict[Index, ExprText] = {n: ExprText("n") for n in nodes if isinstance(n, Extent | HeadIndex)}
    names |= {n: ExprText("n", ROWS if n.name == "q" else COLUMNS) for n in nodes if isinstance(n, Position)}
    IndexText(names, lambda node, indices: ExprText("n", frozenset[str]().union(*(i.axes for i in indices)))).of(
        relation
    )
    if not fits_32_bits(relation):
        raise NotInKernelsError("numbers that may pass 32 bits")


@dataclass(frozen=True)
class MaskTiles(ListedWalk):
    """Tiles from lists that each call makes on the device; in partial ones the relation is computed."""

    runs: bool = field(default=False, init=False)
    asked: MaskRelation

    @override
    def arguments(self, sides: Sides) -> tuple[KernelArgument, ...]:
        return tuple(one for one in super().arguments(sides) if one.name not in ("partial_kinds", "masks"))

    @override
    def start(self, lines: Lines, sides: Sides, texts: IndexText, moved: str) -> None:
        self.pointers(lines)

    @override
    def number(self, lines: Lines) -> None:
        lines.add("tile = tl.load(partial_tiles + at)")

    @override
    def visible(self, lines: Lines, sides: Sides, texts: IndexText) -> None:
        lines.add(f"visible = there[:, None] & ({sides.column} < {sides.columns})[None, :]")
        lines.add(f"visible = visible & {texts.of(self.asked.relation).over(ROWS | COLUMNS).at(6)}")
