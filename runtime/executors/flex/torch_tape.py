"""Compile a pointwise condition or score to torch operations without branches, which vmap and torch.compile accept."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import (
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    ExactSelect,
    HeadIndex,
    Index,
    Linear,
    Lookup,
    Not,
    Position,
    TableRead,
    Truth,
    fold,
    intern,
)
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.passes.pointwise import Pointwise
from attnc.runtime.values.functions import FUNCTIONS

Operation = Callable[..., Any]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A FlexAttention mask_mod: integer tensors (batch entry, head, row, key) of one shape to a bool tensor."""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A FlexAttention score_mod: the score and the arguments of a mask_mod to a score."""

SCORE = intern(ir.Tensor("the score of flex_attention", "real", ()))
"""The tensor that represents the score argument of a score_mod."""

_ARGUMENTS = {"batch": "b", "head": "h", "q": "q_idx", "k": "kv_idx"}
"""The arguments of a mask_mod by the variable that each holds."""

Operand = str | int | Tensor
"""A name in the text of a function, a number, or a table."""


def write_mask_mod(source: Pointwise, device: torch.device | str) -> MaskMod:
    """Return a condition as a plain function, with its tables on a device."""
    writer = _Writer(source, torch.device(device), {})
    return cast("MaskMod", writer.function("mask_mod", "b, h, q_idx, kv_idx"))


def write_score_mod(source: Pointwise, device: torch.device | str, inputs: Mapping[str, Tensor]) -> ScoreMod:
    """Return a score that reads `inputs` as a plain function, with its tables on a device."""
    writer = _Writer(source, torch.device(device), inputs)
    return cast("ScoreMod", writer.function("score_mod", "score, b, h, q_idx, kv_idx"))


class _Writer:
    """The text of a function: a line for each operation, on results of earlier lines.

    Arithmetic is on int64. Operands that a condition does not need are computed too, with arbitrary but safe values: a
    division by 0 divides by 1, and an index outside a table reads its first or last entry.
    """

    def __init__(self, source: Pointwise, device: torch.device, inputs: Mapping[str, Tensor]) -> None:
        self._source = source
        self._device = device
        self._inputs = inputs
        self._lines = [f"{x} = {x}.to(int64)" for x in _ARGUMENTS.values()]
        self._closed: dict[str, Operation | Tensor] = {}
        self._operands: dict[Index, Operand] = {}
        self._tables: dict[str, Tensor] = {}

    def function(self, name: str, arguments: str) -> Operation:
        """Return a function with a code object of its own, in which numbers are literals.

        Numbers in a closure are inputs to torch.compile. The second mask that a process compiles has different numbers
        in the same cells, which then become symbols, and FlexAttention's CPU code does not compile with symbols.
        """
        result = self._written(self._source.condition)
        if isinstance(result, int):
            result = self._step(_constant_like, _ARGUMENTS["q"], result)
        text = self._text(result)
        lines = [
            f"def make({', '.join(['int64', *self._closed])}):",
            f"    def {name}({arguments}):",
            *(f"        {line}" for line in self._lines),
            f"        return {text}",
            f"    return {name}",
        ]
        for x in self._closed.values():  # keeps the sizes of tables from becoming symbols
            if isinstance(x, Tensor):
                torch._dynamo.mark_static(x)
        namespace: dict[str, Any] = {}
        exec(compile("\n".join(lines), f"<attnc {name}>", "exec"), namespace)
        function: Operation = namespace["make"](torch.int64, *self._closed.values())
        return function

    def _text(self, operand: Operand) -> str:
        """Return an operand as text; a table becomes a name that the function closes over."""
        return self._closed_name("t", operand) if isinstance(operand, Tensor) else str(operand)

    def _closed_name(self, letter: str, value: Operation | Tensor) -> str:
        known = next((name for name, closed in self._closed.items() if closed is value), None)
        name = known or f"{letter}{len(self._closed)}"
        self._closed[name] = value
        return name

    def _step(self, operation: Operation, *operands: Operand) -> Operand:
        """Append an operation and return its result.

        Operations on numbers only, such as coordinates along an axis of length 1, are computed at once.
        """
        if all(isinstance(x, int) for x in operands):
            number: Tensor = operation(*map(torch.tensor, operands))
            return number.to(self._device) if number.is_floating_point() else cast("int", number.item())
        texts = ", ".join(map(self._text, operands))
        self._lines.append(f"x{len(self._lines)} = {self._closed_name('f', operation)}({texts})")
        return self._lines[-1].partition(" ")[0]

    def _chain(self, operation: Operation, operands: Sequence[Operand]) -> Operand:
        return reduce(lambda a, b: self._step(operation, a, b), operands)

    def _written(self, root: Index) -> Operand:
        for node in walk(root):
            if node not in self._operands:
                self._operands[node] = self._write(node)
        return self._operands[root]

    def _write(self, node: Index) -> Operand:  # noqa: C901  one case a node kind
        known = self._operands
        match node:
            case Const(value=value):
                return value
            case Truth(value=truth):
                return truth
            case Position(name=name) | HeadIndex(name=name):
                return _ARGUMENTS[name]
            case Linear():
                return self._sum(node)
            case Compare(op=op, value=value):
                return self._step(_at_least_0 if op == "ge" else _is_0, known[value])
            case Bool(op=op, operands=operands):
                return self._chain(operator.and_ if op == "and" else operator.or_, [known[o] for o in operands])
            case Not(operand=operand):
                return self._step(torch.logical_not, known[operand])
            case ExactSelect():
                return self._step(torch.where, *(known[child] for child in node.children()))
            case Coord():
                return self._coordinate(node)
            case Arith():
                return self._arithmetic(node)
            case TableRead(values=values, index=index):
                table = torch.tensor(values, dtype=torch.int64, device=self._device)
                return self._read(table, (index,))
            case Lookup(tensor=tensor, indices=indices):
                return self._lookup(tensor.name, indices)
        return self._write_float(node)

    def _write_float(self, node: Any) -> Operand:
        """Write a node of a score; numbers become fp32 tensors, the only numbers that functions accept."""
        known: Any = self._operands
        match node:
            case ir.Number(value=value):
                return torch.tensor(value, dtype=torch.float32, device=self._device)
            case ir.Ratio(num=Const(value=num), den=Const(value=den)):
                return torch.tensor(num / den, dtype=torch.float32, device=self._device)
            case ir.Ratio(num=num, den=den):
                return self._step(_ratio, known[num], known[den])
            case ir.Element(tensor=tensor) if tensor is SCORE:
                return "score"
            case ir.Element(tensor=tensor, indices=indices):
                return self._read(self._inputs[tensor.name].to(self._device), indices)
            case ir.Apply(op=op, operands=operands):
                return self._step(FUNCTIONS[op], *(known[operand] for operand in operands))
            case ir.FloatSelect():
                return self._step(torch.where, *(known[child] for child in node.children()))
        raise AssertionError(f"not pointwise: {node}")

    def _sum(self, node: Linear) -> Operand:
        known = self._operands
        parts = [known[term] if n == 1 else self._step(operator.mul, known[term], n) for term, n in node.terms]
        return self._chain(operator.add, [*parts, node.constant] if node.constant else parts)

    def _coordinate(self, node: Coord) -> Operand:
        quotient = fold.floordiv(fold.sub(node.position, node.offset), node.stride)
        value = quotient if node.extent is None else fold.mod(quotient, node.extent)
        return self._written(value)

    def _arithmetic(self, node: Arith) -> Operand:
        operands = [self._operands[operand] for operand in node.operands]
        if node.op in ("mul", "min", "max"):
            return self._chain(OPERATIONS[node.op], operands)
        return self._step(OPERATIONS[node.op], *operands)

    def _lookup(self, name: str, indices: tuple[Index, ...]) -> Operand:
        if name not in self._tables:
            array = torch.from_numpy(self._source.tables[name].copy())
            self._tables[name] = (array if array.dtype == torch.bool else array.long()).to(self._device)
        return self._read(self._tables[name], indices)

    def _read(self, table: Tensor, indices: tuple[Index, ...]) -> Operand:
        """Read an entry of a table; constant indices are applied now, as `flex_attention` indexes by tensors only."""
        if not table.numel():  # no entry of an empty table is used
            table = table.new_zeros(tuple(max(size, 1) for size in table.shape))
        fixed = tuple(
            min(max(index.value, 0), size - 1) if isinstance(index, Const) else slice(None)
            for index, size in zip(indices, table.shape, strict=True)
        )
        open_indices = [index for index in indices if not isinstance(index, Const)]
        table = table[fixed].contiguous()
        if not open_indices:
            return table
        clamped = (self._clamped_index(index, size) for index, size in zip(open_indices, table.shape, strict=True))
        return self._step(_entry, table, *clamped)

    def _clamped_index(self, index: Index, length: int) -> Operand:
        """Clamp an index to the entries of a table."""
        if isinstance(index, Position | HeadIndex):
            return self._operands[index]
        return self._step(_clamped, self._operands[index], length - 1)


# --- operations: on tensors; some operands may be numbers -------------------------------------------------------------


def _constant_like(like: Tensor, truth: bool) -> Tensor:
    return torch.full_like(like, truth, dtype=torch.bool)


def _at_least_0(x: Any) -> Any:
    return x >= 0


def _is_0(x: Any) -> Any:
    return x == 0


def _ratio(num: Any, den: Any) -> Tensor:
    num, den = _pair(num, den)
    quotient: Tensor = num.to(torch.float64) / torch.where(den == 0, 1, den).to(torch.float64)
    return quotient.to(torch.float32)


def _entry(table: Tensor, *indices: Any) -> Tensor:
    return table[indices]


def _clamped(x: Tensor, last: int) -> Tensor:
    return torch.clamp(x, 0, last)


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Return both operands as tensors; at least one is a tensor."""
    a = a if isinstance(a, Tensor) else torch.full_like(b, a)
    return a, b if isinstance(b, Tensor) else torch.full_like(a, b)


def _floor_divided(a: Any, b: Any) -> Tensor:
    if isinstance(b, int):
        return torch.div(a, b, rounding_mode="floor")
    a, b = _pair(a, b)
    return torch.div(a, torch.where(b == 0, 1, b), rounding_mode="floor")


def _remainder(a: Any, b: Any) -> Tensor:
    if isinstance(b, int):
        return torch.remainder(a, b)
    a, b = _pair(a, b)
    return torch.remainder(a, torch.where(b == 0, 1, b))


def _minimum(a: Any, b: Any) -> Tensor:
    return torch.minimum(*_pair(a, b))


def _maximum(a: Any, b: Any) -> Tensor:
    return torch.maximum(*_pair(a, b))


# Compilers of FlexAttention repeat an operand's text at each use, so operations that use one often compile slowly.


def _power(base: Any, exponent: Any) -> Tensor:
    """Return an integer power. Past exponent 63 only bases 0, 1 and -1 have a value that fits; parity decides it."""
    if isinstance(base, int) and base == 2:
        return 1 << torch.clamp(exponent, 0, 62)
    base, exponent = _pair(base, exponent)
    rest = torch.where(exponent > 63, 62 + exponent % 2, torch.clamp(exponent, min=0))
    result = torch.ones_like(base)
    for _ in range(6):
        result = result * torch.where(rest % 2 == 1, base, 1)
        base, rest = base * base, rest >> 1
    return result


def _bit_length(n: Tensor) -> Tensor:
    """Return the bit length, 44 bits at a time: log2(2 n + 1) is an integer for n = 0 alone, and never nearly one."""
    return torch.where(n < 1 << 40, _short_length(n), 40 + _short_length(n >> 40))


def _short_length(n: Tensor) -> Tensor:
    return torch.log2((2 * torch.clamp(n, 0, 1 << 44) + 1).to(torch.float64)).to(torch.int64)


def _root(n: Tensor) -> Tensor:
    """Return the square root of a number of up to 62 bits, rounded down."""
    root = torch.sqrt(torch.clamp(n, min=0).to(torch.float64)).to(torch.int64)
    root = torch.where(root * root > n, root - 1, root)
    return torch.where((root + 1) * (root + 1) <= n, root + 1, root)


OPERATIONS: dict[str, Operation] = {
    "mul": operator.mul,
    "floordiv": _floor_divided,
    "mod": _remainder,
    "pow": _power,
    "min": _minimum,
    "max": _maximum,
    "abs": torch.abs,
    "isqrt": _root,
    "bitlen": _bit_length,
    "bitand": operator.and_,
    "bitor": operator.or_,
    "xor": operator.xor,
}
"""The call in torch of each operation of integers."""
