"""Relations that read content masks, the truth tensors of a call, as kernels compute them in partial tiles.

`any(chosen[i] for i in low .. high)` becomes one read of a derived tensor if `high - low` is a constant: the tensor
says for each stretch of that length whether it has a chosen entry. Otherwise it becomes the difference of two running
counts of chosen entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import override

from attnc.compiler.ir import (
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
    fold,
    intern,
)
from attnc.compiler.ir.rewrite import mentions, rewrite, walk
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.kernels.index_text import COLUMNS, ROWS, ExprText, IndexText, NotInKernelsError, fits_32_bits
from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.walks import ListedWalk, Sides
from attnc.compiler.planning.residues import conjuncts


@dataclass(frozen=True)
class MaskRange:
    """The aggregate `any(read[.., i] for i in low .. high)`; `read`: a truth tensor whose last index is `variable`.

    `least`, `most`: the bounds of the aggregate itself, between which `low` and `high` are clipped. `length`: the value
    of `high - low` before clipping if it is a constant, else None. `start`: `low` before clipping if `length` is known,
    else `low`.
    """

    read: Lookup
    variable: Var
    low: Index
    high: Index
    least: Index
    most: Index
    length: int | None
    start: Index


def find_mask_range(node: Index) -> MaskRange | None:
    """Return an `any` over consecutive entries of one truth tensor as a range; None for any other expression."""
    if not (isinstance(node, Reduce) and node.op == "any"):
        return None
    lookups: list[Lookup] = []
    lows, highs = list[Index](), list[Index]()
    for part in (*conjuncts(node.condition), *conjuncts(node.body)):
        if part is fold.truth(True):
            continue
        if isinstance(part, Lookup) and part.tensor.kind == "bool":
            lookups.append(part)
            continue
        bound = _bound_of_variable(part, node.var)
        if bound is None:
            return None
        (lows if bound[0] > 0 else highs).append(bound[1])
    if len(lookups) != 1 or lookups[0].indices[-1] is not node.var:
        return None
    if any(mentions(index, node.var) for index in (*lookups[0].indices[:-1], *lows, *highs)):
        return None
    gap = fold.sub(highs[0], lows[0]) if len(lows) == len(highs) == 1 else None
    length = gap.value if isinstance(gap, Const) and gap.value > 0 else None
    low, high = fold.maximum(node.low, *lows), fold.minimum(node.high, *highs)
    low, high = fold.minimum(low, node.high), fold.maximum(high, node.low)
    start = lows[0] if length is not None else low
    return MaskRange(lookups[0], node.var, low, high, node.low, node.high, length, start)


def _bound_of_variable(node: Index, variable: Var) -> tuple[int, Index] | None:
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
    """A tensor computed from a truth tensor `of`, along its last dimension, which grows by `length` + 1 entries.

    Entry i says whether any of the `length` entries before i holds. Without a length, the dimension grows by 1, and
    entry i is the number of entries before i that hold.
    """

    tensor: Tensor
    of: Tensor
    length: int | None


@dataclass(frozen=True)
class MaskRelation:
    """A relation as kernels compute it; `derived`: the derived tensors that it reads."""

    relation: Index
    derived: tuple[DerivedMask, ...]


def find_mask_relation(pattern: Pattern) -> MaskRelation:
    """Return the relation of an attention with its aggregates as reads of derived tensors. Raises NotInKernelsError."""
    tensor_names = {tensor.name for tensor in pattern.tensors}
    lengths = {
        selection.given: fold.extent("keys") if selection.items is None else selection.items
        for selection in pattern.selections
    }
    masks: dict[tuple[Tensor, int | None], DerivedMask] = {}

    def derived_tensor(source: Tensor, length: int | None) -> Tensor:
        if (source, length) not in masks:
            name = f"{source.name}_{'before' if length is None else f'of_{length}'}"
            while name in tensor_names:
                name += "_"
            tensor_names.add(name)
            tensor = intern(Tensor(name, "int" if length is None else "bool", (*source.dims[:-1], "ends")))
            masks[source, length] = DerivedMask(tensor, source, length)
        return masks[source, length].tensor

    def replace_aggregate(node: Index) -> Index | None:
        mask_range = find_mask_range(node)
        if mask_range is None:
            return None
        *leading, _ = mask_range.read.indices
        if (
            mask_range.length is not None
            and mask_range.least is fold.const(0)
            and mask_range.most is lengths.get(mask_range.read.tensor)
        ):
            length = fold.const(mask_range.length)
            bound = fold.add(mask_range.start, length)
            inside = fold.minimum(fold.maximum(bound, fold.const(0)), fold.add(mask_range.most, length))
            return fold.lookup(derived_tensor(mask_range.read.tensor, mask_range.length), (*leading, inside))
        counts = derived_tensor(mask_range.read.tensor, None)
        ends = (fold.lookup(counts, (*leading, bound)) for bound in (mask_range.high, mask_range.low))
        return fold.less(fold.const(0), fold.sub(*ends))

    relation = checked(rewrite(pattern.attend.visible, replace_aggregate))
    _check(relation)
    return MaskRelation(relation, tuple(masks.values()))


ALONG = 128
"""Maximum number of keys in a tile. Rows of truth tensors that are read along keys are padded to a multiple of it."""

UNIT = 16
"""Bytes of one vector load. Rows of truth tensors must begin at multiples of it."""


def is_along_keys(node: Lookup) -> bool:
    """Whether the keys of a tile read adjacent entries of a truth tensor."""
    *leading, last = node.indices
    leading_parts = (part for index in leading for part in index.below)
    reads_at_key = node.tensor.kind == "bool" and last is fold.place("k") and node.tensor.dims[-1] != "query"
    return reads_at_key and fold.place("k") not in leading_parts


def read_along_keys(mask_relation: MaskRelation) -> frozenset[Tensor]:
    """Return the tensors whose entries the keys of a tile read side by side (`is_along_keys`)."""
    lookups = (node for node in walk(mask_relation.relation) if isinstance(node, Lookup))
    return frozenset(node.tensor for node in lookups if is_along_keys(node))


def gathers_pairs(mask_relation: MaskRelation) -> bool:
    """Whether each pair reads an entry at a separate address: in the row of its query, at the position of its key."""
    lookups = [node for node in walk(mask_relation.relation) if isinstance(node, Lookup) and not is_along_keys(node)]
    return any(_reads_only(node, "q", "k") and _reads_only(node, "k", "q") for node in lookups)


def _reads_only(node: Lookup, name: Literal["q", "k"], other: Literal["q", "k"]) -> bool:
    """Whether an index of the lookup depends on position `name` and not on position `other`."""
    return any(fold.place(name) in index.below and fold.place(other) not in index.below for index in node.indices)


def _check(relation: Index) -> None:
    """Raise NotInKernelsError if kernels cannot compute the relation."""
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
        raise NotInKernelsError("integers that may exceed 32 bits")


@dataclass(frozen=True)
class MaskTiles(ListedWalk):
    """Tile lists that each call makes on the device; the masks of partial tiles are computed from the relation."""

    runs: bool = field(default=False, init=False)
    mask_relation: MaskRelation

    @override
    def arguments(self, sides: Sides) -> tuple[KernelArgument, ...]:
        return tuple(
            argument for argument in super().arguments(sides) if argument.name not in ("partial_kinds", "masks")
        )

    @override
    def start(self, lines: Lines, sides: Sides, texts: IndexText, moved: str) -> None:
        self.pointers(lines)

    @override
    def number(self, lines: Lines) -> None:
        lines.add("tile = tl.load(partial_tiles + at)")

    @override
    def visible(self, lines: Lines, sides: Sides, texts: IndexText) -> None:
        lines.add(f"visible = there[:, None] & ({sides.column} < {sides.columns})[None, :]")
        lines.add(f"visible = visible & {texts.of(self.mask_relation.relation).over(ROWS | COLUMNS).at(6)}")
