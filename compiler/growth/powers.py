"""Blocks at distances that are powers of two: n log n.

Replacing `x is a power of two` by false gives the relation R₀, replacing it by true gives R₁. Neither contains powers;
the powers add R₁ without R₀ at the distances that are powers of two. If these pairs are proved to be all pairs whose
blocks are at least a least distance apart and whose key is not in the first few blocks, their number is a sum over
1, 2, 4, … with a closed form. Without that proof, this module finds no formula.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.comparison.equality import deciding_length
from attnc.compiler.growth.counts import UncountableError, count
from attnc.compiler.growth.formula import FormulaName, symbol
from attnc.compiler.growth.open_relation import OpenRelation
from attnc.compiler.growth.polynomials import PolynomialVariable
from attnc.compiler.ir import Arith, Compare, Const, Index, Linear, fold
from attnc.compiler.ir.rewrite import rewrite, walk
from attnc.compiler.ir.verify_ir import verified
from attnc.spec.errors import EvaluationError

LONGEST_PROOF = 1 << 14
"""Maximum number of tokens whose pairs are evaluated for a proof."""


@dataclass(frozen=True, slots=True)
class Powers:
    """The relation `rest`, and all pairs of blocks of `block` tokens, 2^j ≥ `least` apart, keys in block ≥ `first`."""

    rest: OpenRelation
    block: int
    least: int
    first: int

    @property
    def smallest(self) -> int:
        """The exponent of the first power."""
        return (self.least - 1).bit_length()

    def sum(self, n: Any, last: Any) -> Any:
        """Sum the pairs at these distances over n tokens; `last` is the largest exponent.

        At a distance of d blocks, n - d·block - first·block queries see a block of keys each.
        """
        import sympy  # slow to import

        j = symbol("j")
        queries = n - (2**j + self.first) * self.block
        return sympy.expand(sympy.summation(self.block * queries, (j, self.smallest, last)))

    def largest(self, letter: str, variable: PolynomialVariable) -> FormulaName:
        """The exponent of the largest distance that occurs; `smallest` - 1 where no distance occurs."""
        blocks = fold.sub(fold.floordiv(variable.value, fold.const(self.block)), fold.const(self.first))
        text = variable.letter if self.block == 1 else f"⌊{variable.letter}/{self.block}⌋"
        text = f"{text} − {self.first}" if self.first else text
        return FormulaName(letter, f"⌊log₂({text})⌋", fold.sub(fold.function("bitlen", blocks), fold.const(1)))

    @property
    def start(self) -> int:
        """The smallest n for which `largest` is defined and correct."""
        return self.block * (self.first + max(1, (1 << self.smallest) // 2))

    def in_tiles(self, tile: int) -> Powers | None:
        """Return the powers counted in tiles, where `rest` has no pairs; None where blocks are not whole tiles."""
        is_whole = self.block % tile == 0
        return replace(self, block=self.block // tile) if is_whole else None


def find_powers(relation: OpenRelation) -> Powers | None:
    """Split a relation into a rest and powers; None where it has no powers, or the split is not proved."""
    if relation.reads_length:
        return None
    atoms = {node: gap for node in walk(relation.visible) if (gap := _gap(node)) is not None}
    gaps = set(atoms.values())
    if len(gaps) != 1:
        return None
    (gap,) = gaps
    block = _block(gap)
    if block is None:
        return None
    without, within = (_replaced(relation.visible, atoms, fold.truth(value)) for value in (False, True))
    added = fold.conjunction(within, fold.negation(without))
    try:
        region = _region(gap, block, added)
        if region is None or not _is_never(fold.conjunction(without, fold.negation(within))):
            return None
    except (EvaluationError, UncountableError):
        return None
    return Powers(OpenRelation(without, without, 1), block, *region)


@verified
def _replaced(relation: Index, atoms: dict[Index, Index], value: Index) -> Index:
    return rewrite(relation, lambda node: value if node in atoms else None)


def _gap(node: Index) -> Index | None:
    """The x of `2 ** (bitlen(x) - 1) == x`; None for other conditions."""
    if not (isinstance(node, Compare) and node.op == "eq" and isinstance(node.value, Linear)):
        return None
    for term, factor in node.value.terms:
        if isinstance(term, Arith) and term.op == "pow" and abs(factor) == 1:
            base, exponent = term.operands
            rest = fold.times(fold.sub(node.value, fold.times(term, factor)), -factor)
            power_exponent = fold.sub(fold.function("bitlen", rest), fold.const(1))
            if isinstance(base, Const) and base.value == 2 and exponent is power_exponent:
                return rest
    return None


def _block(gap: Index) -> int | None:
    """The size of the blocks for which `gap` is the query's block less the key's block; None where it is not."""
    for node in walk(gap):
        divisor = node.operands[1] if isinstance(node, Arith) and node.op == "floordiv" else fold.const(1)
        if isinstance(divisor, Const) and gap is _distance(divisor.value):
            return divisor.value
    return None


def _distance(block: int) -> Index:
    return fold.sub(*(fold.floordiv(place, fold.const(block)) for place in (fold.place("q"), fold.place("k"))))


def _region(gap: Index, block: int, added: Index) -> tuple[int, int] | None:
    """The least distance and the first key block of `added`, if it holds all pairs within these bounds; else None."""
    sides = 8
    while sides * block <= LONGEST_PROOF:
        corners = np.arange(sides, dtype=np.int64) * block
        active = np.ones((sides, sides), dtype=np.bool_)
        rows, columns = np.nonzero(exact_evaluation.mask_at(added, corners + block - 1, corners, active, wide=False))
        if len(rows):
            least, first = int((rows - columns).min()), int(columns.min())
            if least < 1:
                return None
            key_block = fold.floordiv(fold.place("k"), fold.const(block))
            region = fold.conjunction(
                fold.less_equal(fold.const(least), gap), fold.less_equal(fold.const(first), key_block)
            )
            outside, missing = (
                fold.conjunction(added, fold.negation(region)),
                fold.conjunction(region, fold.negation(added)),
            )
            return (least, first) if _is_never(outside) and _is_never(missing) else None
        sides *= 2
    return None


def _is_never(relation: Index) -> bool:
    """Whether a relation provably holds nowhere."""
    n = deciding_length([relation])
    return n is not None and n <= LONGEST_PROOF and count(relation, n, 128).pairs == 0
