"""The kernel text of adjoints: what each operation of a tape adds to the adjoints of its operands."""

from __future__ import annotations

from typing import cast

from attnc.compiler.ir import Number
from attnc.compiler.ir.derivatives import derivatives
from attnc.compiler.ir.value_nodes import Axes
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.recurrences.kernels.tape_text import TapeText
from attnc.compiler.recurrences.step_tape import Op

STEEP = frozenset({"div", "sqrt", "log", "log2", "pow"})
"""Functions whose derivative may be infinite; an adjoint of 0, for instance behind a clamp, must stay 0."""


class AdjointText(TapeText):
    """Writes a kernel that goes through a token's operations from the last to the first."""

    def gives(self, i: int) -> list[tuple[int, str]]:
        """Return (operand, text) for each term that operation `i` adds to the adjoint of an operand."""
        op, d, x = self.tape.ops[i], f"d{i}", f"x{i}"
        operand_axes = [self.tape.ops[j].axes for j in op.operands]
        names = [self.name(j) for j in op.operands]
        match op.kind:
            case "apply":
                return self._elementwise(i)
            case "sum":
                axis = cast("int", op.of)
                return [(op.operands[0], self._widened(d, operand_axes[0], axis))]
            case "extreme":
                bounded = self.bounded(names[0], operand_axes[0], cast("str", op.of))
                first = f"tl.arg{op.of}({bounded}, 0, tie_break_left=True)"
                place = first if len(operand_axes[0]) == 1 else f"{first}[None, :]"
                return [(op.operands[0], self._at(operand_axes[0], place, d))]
            case "product":
                left, right = self.masked(names[0], operand_axes[0], 0), self.masked(names[1], operand_axes[1], 1)
                rows = self.product(self.masked(d, op.axes, 1), f"tl.trans({right})")
                columns = self.product(f"tl.trans({left})", self.masked(d, op.axes, 0))
                return [(op.operands[0], rows), (op.operands[1], columns)]
            case "root":
                return [(op.operands[0], f"-0.5 * {d} * {x} * {x} * {x}")]
            case "softmax":
                last = len(op.axes) - 1
                column = "[:, None]" if last else ""
                weighted = self.masked(f"{d} * {x}", op.axes, last)
                return [(op.operands[0], f"{x} * ({d} - tl.sum({weighted}, {last}){column})")]
            case "diagonal":
                place = self.places[op.axes[0]]
                diagonal = f"tl.where({place}[:, None] == {place}[None, :], {d}, 0.0)"
                rows = f"tl.sum({self.masked(diagonal, op.axes, 0, 1)}, 1)"
                return [(op.operands[0], rows if operand_axes[0] else f"tl.sum({rows}, 0)")]
            case "pick":
                return [(op.operands[0], self._at(operand_axes[0], names[1], d))]
        return []

    def zeros(self, axes: Axes) -> str:
        """Return the text of a tile of zeros."""
        return f"tl.full({self.shape(axes) if axes else '()'}, 0.0, tl.float32)"

    def _at(self, axes: Axes, place: str, text: str) -> str:
        """Return a tile with a value at one index of the first axis, and 0 elsewhere."""
        expanded = text if len(axes) == 1 else f"{text}[None, :]"
        return f"tl.where({self._picked(axes, place)}, {expanded}, 0.0)"

    def _widened(self, text: str, axes: Axes, axis: int) -> str:
        """Return a value broadcast along one more axis."""
        if len(axes) == 1:
            return f"{self.zeros(axes)} + {text}"
        return f"tl.broadcast_to({text}[{'None, :' if axis == 0 else ':, None'}], {self.shape(axes)})"

    def _elementwise(self, i: int) -> list[tuple[int, str]]:
        """Return (operand, text) for each adjoint term of an elementwise function."""
        op = self.tape.ops[i]
        if op.of == "where":
            condition = self.spread(op.operands[0], (), 0)
            sides = (1, f"tl.where({condition} != 0, d{i}, 0.0)"), (2, f"tl.where({condition} != 0, 0.0, d{i})")
            return [(op.operands[n], self._narrowed(text, op, n)) for n, text in sides]
        if op.of == "share":
            divisor = self.spread(op.operands[1], op.places[1], len(op.axes))
            quotient = f"tl.where({divisor} == 0.0, 0.0, d{i} / tl.where({divisor} == 0.0, 1.0, {divisor}))"
            sides = (0, quotient), (1, f"-x{i} * {quotient}")
            return [(op.operands[n], self._narrowed(text, op, n)) for n, text in sides]
        node, holders = self.applied(op), self.holders(op)
        formula = self.formula(op, f"x{i}")
        slopes = {derivative.atom: derivative.by for derivative in derivatives(node)}
        if node in slopes and node not in holders:
            raise NotInKernelsError(f"the derivative of {op.of}")
        terms = []
        for n, holder in enumerate(holders):
            if holder not in slopes or isinstance(holder, Number):
                continue
            slope = slopes[holder]
            text = f"d{i}"
            if not isinstance(slope, Number) or slope.value != 1:
                text = f"d{i} * {formula.of(slope).at(8)}"
            if op.of in STEEP and not self._is_scaled(op):
                text = f"tl.where(d{i} == 0.0, 0.0, {text})"
            terms.append((op.operands[n], self._narrowed(text, op, n)))
        return terms

    def _is_scaled(self, op: Op) -> bool:
        """Check whether a function is a division by a nonzero constant, whose derivative is finite everywhere."""
        divisor = self.tape.ops[op.operands[-1]]
        return op.of == "div" and divisor.kind == "number" and divisor.of != 0

    def _narrowed(self, text: str, op: Op, n: int) -> str:
        """Return an operand's adjoint summed along the axes of the result that the operand lacks."""
        places = op.places[n]
        if places == (1, 0):
            return f"tl.trans({text})"
        remaining = op.axes
        for axis in reversed(range(len(op.axes))):
            if axis not in places:
                text = f"tl.sum({self.masked(text, remaining, axis)}, {axis})"
                remaining = remaining[:axis] + remaining[axis + 1 :]
        return text
