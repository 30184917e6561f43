"""Exact expressions as Triton text, for kernels: integers of 32 bits, or of 64 bits if 32 might be too few.

The axes of a text are the sides of a tile along which its value differs: none, rows ("r"), columns ("c") or both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from attnc.compiler.analysis.token_ranges import FAR
from attnc.compiler.ir import (
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    ExactSelect,
    Extent,
    HeadIndex,
    Index,
    Linear,
    Lookup,
    Not,
    Position,
    TableRead,
    Truth,
    fold,
    is_truth,
)
from attnc.compiler.ir.integer_operations import INTEGER_OPERATIONS
from attnc.compiler.ir.magnitude import Magnitudes
from attnc.compiler.ir.node_words import plural
from attnc.compiler.ir.rewrite import walk

Axes = frozenset[str]
NO_AXES: Axes = frozenset()
ROWS: Axes = frozenset("r")
COLUMNS: Axes = frozenset("c")

LONGEST = 1 << 28
"""Maximum number of tokens of a sequence for which numbers are shown to fit into 32 bits."""


class NotInKernelsError(Exception):
    """Raised if no kernel computes an expression; the message names it, to complete `there are no kernels for …`."""


@dataclass(frozen=True, slots=True)
class ExprText:
    """The text of an expression, its axes, and how tightly it binds (9: an atom)."""

    text: str
    axes: Axes = NO_AXES
    binds: int = 9

    def at(self, binds: int) -> str:
        """Return the text, in parentheses if it binds less tightly than `binds`."""
        return self.text if self.binds >= binds else f"({self.text})"

    def over(self, axes: Axes) -> ExprText:
        """Return the text as an operand over more axes: a column or a row of the tile."""
        if self.axes == axes or not self.axes or len(axes) < 2:
            return self
        return ExprText(f"{self.at(9)}[:, None]" if self.axes == ROWS else f"{self.at(9)}[None, :]", axes)


def aligned(*texts: ExprText) -> tuple[Axes, tuple[ExprText, ...]]:
    """Return the joint axes of expressions, and the expressions over these axes."""
    axes = NO_AXES.union(*(text.axes for text in texts))
    return axes, tuple(text.over(axes) for text in texts)


HELPERS: Mapping[str, str] = {
    "floor_div": '''\
@triton.jit
def floor_div(a, b):
    """`a // b`, rounded down."""
    return a // b - tl.where((a % b != 0) & ((a < 0) != (b < 0)), 1, 0)
''',
    "floor_mod": '''\
@triton.jit
def floor_mod(a, b):
    """The rest of `a // b`, rounded down."""
    rest = a % b
    return rest + tl.where((rest != 0) & ((rest < 0) != (b < 0)), b, 0)
''',
    "bit_length": '''\
@triton.jit
def bit_length(n):
    """The number of binary digits of n >= 0."""
    length = tl.where(n > 0, 1, 0)
    for half in tl.static_range(5):
        shift = 16 >> half
        high = (n >> shift) > 0
        length += tl.where(high, shift, 0)
        n = tl.where(high, n >> shift, n)
    return length
''',
}
"""Texts of the functions that a kernel may call, by name."""


@dataclass(frozen=True, slots=True)
class TritonOperation:
    """The text of an operation of integers in Triton, with `{0}` and `{1}` for its operands.

    `binds`: how tightly the text binds; `levels`: how tightly operands must bind. `helper`: the function of `HELPERS`
    that it calls. `size`: a bound on the magnitude of the result by bounds on those of the operands; None for no bound.
    """

    text: str
    binds: int = 9
    levels: tuple[int, int] = (0, 0)
    helper: str | None = None
    size: Callable[..., int | None] = lambda *sizes: max(sizes) + 1


def _on_bits(sign: str) -> TritonOperation:
    return TritonOperation(f"{{0}} {sign} {{1}}", 3, (9, 9), size=lambda a, b: 2 * max(a, b))


TRITON_OPERATIONS: Mapping[str, TritonOperation | None] = {
    "mul": TritonOperation("{0} * {1}", 7, (7, 8), size=lambda a, b: a * b),
    "floordiv": TritonOperation("floor_div({0}, {1})", helper="floor_div"),
    "mod": TritonOperation("floor_mod({0}, {1})", helper="floor_mod"),
    "pow": TritonOperation("(1 << {1})", levels=(0, 9), size=lambda *_: None),
    "min": TritonOperation("tl.minimum({0}, {1})"),
    "max": TritonOperation("tl.maximum({0}, {1})"),
    "abs": TritonOperation("tl.abs({0})"),
    "bitlen": TritonOperation("bit_length({0})", helper="bit_length"),
    "bitand": _on_bits("&"),
    "bitor": _on_bits("|"),
    "xor": _on_bits("^"),
    "isqrt": None,
}
"""The texts of operations of integers; None for operations that kernels do not compute. The base of `pow` is 2."""


def is_kernel_operation(node: Arith) -> bool:
    """Whether kernels compute an operation of integers."""
    return TRITON_OPERATIONS[node.op] is not None and (node.op != "pow" or node.operands[0] is fold.const(2))


@dataclass
class IndexText:
    """A writer of exact expressions. `names` has the texts of leaves; `read` returns the text of an input's element.

    `wide_place`: the position whose name has 64 bits, if 32 are too few for the ends of ranges. An expression that does
    not read the position has 64 bits too if it may need them, or if it is combined with `FAR`, which Triton refuses to
    combine with 32-bit integers.
    """

    names: Mapping[Index, ExprText]
    read: Callable[[Lookup, tuple[ExprText, ...]], ExprText]
    helpers: dict[str, None] = field(default_factory=dict)
    in_64_bits: bool = False
    wide_place: Index | None = None
    _known: dict[Index, ExprText] = field(default_factory=dict)

    def forget(self) -> None:
        """Forget all texts, because the loads of the next texts have other masks."""
        self._known.clear()

    def of(self, node: Index) -> ExprText:
        """Return the text of an expression. Raises NotInKernelsError."""
        if node not in self._known:
            text = self.wide().of(node) if self._is_narrow(node) and not fits_32_bits(node) else self._write(node)
            leaf = node in self.names or isinstance(node, TableRead | Lookup)
            self._known[node] = _in_64_bits(text) if leaf and self.in_64_bits and not is_truth(node) else text
        return self._known[node]

    def wide(self) -> IndexText:
        """Return a writer of the same expressions whose leaves are cast to 64 bits."""
        return IndexText(self.names, self.read, self.helpers, in_64_bits=True)

    def _is_narrow(self, node: Index) -> bool:
        """Whether the names in an expression have 32 bits although the row's position has 64."""
        return self.wide_place is not None and not isinstance(node, Const) and self.wide_place not in walk(node)

    def _same_width(self, nodes: Sequence[Index]) -> list[ExprText]:
        """Return the texts of integers that must have the same width: 64 bits if one of them is FAR."""
        far = any(isinstance(node, Const) and abs(node.value) == FAR for node in nodes)
        return [(self.wide() if far and self._is_narrow(node) else self).of(node) for node in nodes]

    def _write(self, node: Index) -> ExprText:  # noqa: C901  one case a node kind
        if node in self.names:
            return self.names[node]
        match node:
            case Const(value=value):
                return _constant(value)
            case Truth(value=value):
                return ExprText("True" if value else "False")
            case Linear():
                return self._sum(node)
            case Compare():
                return self._comparison(node)
            case Bool(op=op, operands=operands):
                axes, parts = aligned(*map(self.of, operands))
                return ExprText((" & " if op == "and" else " | ").join(part.at(6) for part in parts), axes, 4)
            case Not(operand=operand):
                inner = self.of(operand)
                return ExprText(f"~{inner.at(8)}", inner.axes, 8)
            case ExactSelect(condition=condition):
                sides = self._same_width((node.then, node.otherwise))
                axes, (test, then, otherwise) = aligned(self.of(condition), *sides)
                return ExprText(f"tl.where({test.text}, {then.text}, {otherwise.text})", axes)
            case Coord():
                return self._coordinate(node)
            case Arith():
                return self._arithmetic(node)
            case TableRead(values=values, index=index):
                return self._table(values, index)
            case Lookup():
                return self.read(node, tuple(map(self.of, node.indices)))
        raise NotInKernelsError(plural(node))

    def _sum(self, node: Linear) -> ExprText:
        terms = sorted(node.terms, key=lambda pair: pair[1] < 0)
        axes, parts = aligned(*(self.of(term) for term, _ in terms))
        text = ""
        for part, (_, factor) in zip(parts, terms, strict=True):
            summand = part.at(6) if abs(factor) == 1 else f"{abs(factor)} * {part.at(8)}"
            text = _append_term(text, summand, factor < 0)
        if node.constant:
            text = _append_term(text, str(abs(node.constant)), node.constant < 0)
        return ExprText(text, axes, 5)

    def _comparison(self, node: Compare) -> ExprText:
        terms, constant = fold.parts(node.value)
        left = fold.linear([(t, c) for t, c in terms if c > 0], max(constant, 0) if any(c > 0 for _, c in terms) else 0)
        right = fold.sub(left, node.value)
        axes, (a, b) = aligned(self.of(left), self.of(right))
        return ExprText(f"{a.at(5)} {'>=' if node.op == 'ge' else '=='} {b.at(5)}", axes, 3)

    def _coordinate(self, node: Coord) -> ExprText:
        quotient = fold.floordiv(fold.sub(node.position, node.offset), node.stride)
        return self.of(quotient if node.extent is None else fold.mod(quotient, node.extent))

    def _arithmetic(self, node: Arith) -> ExprText:
        if not is_kernel_operation(node):
            raise NotInKernelsError(node.op)
        operation = TRITON_OPERATIONS[node.op]
        assert operation is not None
        axes, parts = aligned(*self._same_width(node.operands))
        if node.op in ("floordiv", "mod") and (text := _unsigned_quotient(node, parts, axes)) is not None:
            return text
        if operation.helper is not None:
            self.helpers[operation.helper] = None
        levels = operation.levels
        if len(parts) == 1:
            return ExprText(operation.text.format(parts[0].at(levels[0])), axes, operation.binds)
        written, *rest = (part.at(levels[i > 0]) for i, part in enumerate(parts))
        for part in rest:
            written = operation.text.format(written, part)
        return ExprText(written, axes, operation.binds)

    def _table(self, values: tuple[int, ...], index: Index) -> ExprText:
        position = self.of(index)
        text = str(values[-1])
        for i, value in reversed(list(enumerate(values[:-1]))):
            text = f"tl.where({position.at(5)} == {i}, {value}, {text})"
        return ExprText(text, position.axes)


def _unsigned_quotient(node: Arith, parts: Sequence[ExprText], axes: Axes) -> ExprText | None:
    """Return the text of a quotient or rest by signs of operands that are known; None if they are not."""
    (dividend, divisor), (a, b), is_mod = node.operands, parts, node.op == "mod"
    is_positive = isinstance(divisor, Const) and divisor.value > 0
    if is_nonnegative(dividend) and (is_positive or is_nonnegative(divisor)):
        return ExprText(f"{a.at(7)} {'%' if is_mod else '//'} {b.at(8)}", axes, 7)
    if isinstance(divisor, Const) and is_positive and not divisor.value & (divisor.value - 1):
        bits = divisor.value.bit_length() - 1
        return ExprText(f"({a.at(9)} & {divisor.value - 1})" if is_mod else f"({a.at(9)} >> {bits})", axes)
    return None


def _constant(value: int) -> ExprText:
    if abs(value) == FAR:
        return ExprText("FAR") if value > 0 else ExprText("-FAR", binds=8)
    return ExprText(str(value), binds=9 if value >= 0 else 8)


def _in_64_bits(text: ExprText) -> ExprText:
    cast = ".to(tl.int64)"
    if text.text.endswith(cast) or text.text.isdecimal():  # a literal takes the width of the other operand
        return text
    return ExprText(text.at(9) + cast, text.axes)


def _append_term(text: str, part: str, negative: bool) -> str:
    if not text:
        return f"-{part}" if negative else part
    return f"{text} {'-' if negative else '+'} {part}"


def is_nonnegative(node: Index) -> bool:
    """Whether an integer is certainly not negative, given that positions and sizes are not; False says nothing."""
    match node:
        case Const(value=value):
            return value >= 0
        case Position() | Extent() | HeadIndex() | Coord():
            return True
        case Linear():
            return node.constant >= 0 and all(factor > 0 and is_nonnegative(term) for term, factor in node.terms)
        case Arith(op="max", operands=operands):
            return any(map(is_nonnegative, operands))
        case Arith(op="min" | "mul" | "floordiv", operands=operands):
            return all(map(is_nonnegative, operands))
        case Arith(op="mod", operands=(_, divisor)):
            return isinstance(divisor, Const) and divisor.value > 0
        case Arith(op=op) if INTEGER_OPERATIONS[op].is_natural:
            return True
        case TableRead(values=values):
            return min(values) >= 0
        case ExactSelect(then=then, otherwise=otherwise):
            return is_nonnegative(then) and is_nonnegative(otherwise)
        case _:
            return False


def fits_32_bits(root: Index) -> bool:
    """Whether every number in an expression is certainly below 2^31 in size, for sequences of up to LONGEST tokens.

    The constant FAR, which becomes 2^30, must not be added to anything.
    """
    return _KernelMagnitudes(LONGEST, {}, 1 << 31).of(root) is not None


class _KernelMagnitudes(Magnitudes):
    """Bounds on the numbers that a kernel computes."""

    def leaf(self, node: Index) -> int | None:
        match node:
            case Const(value=value) if abs(value) == FAR:
                return 1 << 30
            case Extent() | Lookup():
                return LONGEST
            case HeadIndex():
                return 1 << 16
            case _:
                return super().leaf(node)

    def operation(self, node: Arith, operands: list[int]) -> int | None:
        operation = TRITON_OPERATIONS[node.op]
        return None if operation is None else operation.size(*operands)
