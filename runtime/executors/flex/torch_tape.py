"""Compile a pointwise condition or score to torch operations without branches, which vmap and torch.compile accept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

_ARGUMENTS = ("batch", "head", "q", "k", "score")

_Slot = tuple[str, int]
"""An "argument", "constant" or "step" with its index; positions on the tape are assigned at the end."""


@dataclass(frozen=True)
class TorchTape:
    """A list of operations; each takes results of earlier ones, the five arguments, or `constants`.

    Arithmetic is on int64. Operands that a condition does not need are computed too, with arbitrary but safe values: a
    division by 0 divides by 1, and an index outside a table reads its first or last entry.
    """

    constants: tuple[int | Tensor, ...]
    steps: tuple[tuple[Operation, tuple[int, ...]], ...]
    result: int

    def mask_mod(self) -> MaskMod:
        """Return the tape of a condition as a plain function."""
        return cast("MaskMod", self._function("mask_mod", "b, h, q_idx, kv_idx"))

    def score_mod(self) -> ScoreMod:
        """Return the tape of a score as a plain function."""
        return cast("ScoreMod", self._function("score_mod", "score, b, h, q_idx, kv_idx"))

    def _function(self, name: str, arguments: str) -> Operation:
        """Return a function with a code object of its own, in which numbers are literals.

        Numbers in a closure are inputs to torch.compile. The second mask that a process compiles has different numbers
        in the same cells, which then become symbols, and FlexAttention's CPU code does not compile with symbols.
        """
        operations = list(dict.fromkeys(operation for operation, _ in self.steps))
        tensors = [x for x in self.constants if isinstance(x, Tensor)]
        for tensor in tensors:  # keeps the sizes of tables from becoming symbols
            torch._dynamo.mark_static(tensor)
        tensor_numbers = iter(range(len(tensors)))
        operands = [*(f"x{i}" for i in range(4)), "score" if "score" in arguments else ""]
        operands += [f"t{next(tensor_numbers)}" if isinstance(x, Tensor) else repr(x) for x in self.constants]
        body = [f"x{i} = {x}.to(int64)" for i, x in enumerate(("b", "h", "q_idx", "kv_idx"))]
        for operation, operand_slots in self.steps:
            operands.append(f"x{len(operands)}")
            call_arguments = ", ".join(operands[i] for i in operand_slots)
            body.append(f"{operands[-1]} = f{operations.index(operation)}({call_arguments})")
        closed_names = [f"f{i}" for i in range(len(operations))] + [f"t{i}" for i in range(len(tensors))]
        lines = [
            f"def make({', '.join(['int64', *closed_names])}):",
            f"    def {name}({arguments}):",
            *(f"        {line}" for line in body),
            f"        return {operands[self.result]}",
            f"    return {name}",
        ]
        namespace: dict[str, Any] = {}
        exec(compile("\n".join(lines), f"<attnc {name}>", "exec"), namespace)
        function: Operation = namespace["make"](torch.int64, *operations, *tensors)
        return function


def write_tape(source: Pointwise, device: torch.device | str, inputs: Mapping[str, Tensor] | None = None) -> TorchTape:
    """Return the tape of a condition, or of a score that reads `inputs`, with its tables on a device."""
    return _Writer(source, torch.device(device), inputs or {}).tape()


class _Writer:
    def __init__(self, source: Pointwise, device: torch.device, inputs: Mapping[str, Tensor]) -> None:
        self._source = source
        self._device = device
        self._inputs = inputs
        self._constants: list[int | Tensor] = []
        self._steps: list[tuple[Operation, tuple[_Slot, ...]]] = []
        self._slots: dict[Index, _Slot] = {}
        self._tables: dict[str, Tensor] = {}

    def tape(self) -> TorchTape:
        root = self._source.condition
        for node in walk(root):
            self._slots[node] = self._write(node)
        result = self._slots[root]
        if result[0] == "constant" and not isinstance(self._constants[result[1]], Tensor):
            result = self._step(_constant_like, self._argument_slot("q"), result)
        return self._with_positions(result)

    def _with_positions(self, result: _Slot) -> TorchTape:
        starts = {"argument": 0, "constant": 5, "step": 5 + len(self._constants)}

        def position_of(slot: _Slot) -> int:
            return starts[slot[0]] + slot[1]

        steps = tuple((operation, tuple(map(position_of, operands))) for operation, operands in self._steps)
        return TorchTape(tuple(self._constants), steps, position_of(result))

    def _argument_slot(self, name: str) -> _Slot:
        return "argument", _ARGUMENTS.index(name)

    def _constant_slot(self, value: int | Tensor) -> _Slot:
        self._constants.append(value)
        return "constant", len(self._constants) - 1

    def _step(self, operation: Operation, *operands: _Slot) -> _Slot:
        """Append an operation and return its slot.

        Operations on numbers only, such as coordinates along an axis of length 1, are computed at once.
        """
        numbers = [self._constants[i] for kind, i in operands if kind == "constant"]
        if len(numbers) == len(operands) and all(isinstance(x, int) for x in numbers):
            result = operation(*map(torch.tensor, numbers))
            return self._constant_slot(result.to(self._device) if result.is_floating_point() else result.item())
        self._steps.append((operation, operands))
        return "step", len(self._steps) - 1

    def _chain(self, operation: Operation, operands: Sequence[_Slot]) -> _Slot:
        return reduce(lambda a, b: self._step(operation, a, b), operands)

    def _write(self, node: Index) -> _Slot:  # noqa: C901  one case a node kind
        slots = self._slots
        match node:
            case Const(value=value):
                return self._constant_slot(value)
            case Truth(value=truth):
                return self._constant_slot(truth)
            case Position(name=name) | HeadIndex(name=name):
                return self._argument_slot(name)
            case Linear():
                return self._sum(node)
            case Compare(op=op, value=value):
                return self._step(_at_least_0 if op == "ge" else _is_0, slots[value])
            case Bool(op=op, operands=operands):
                return self._chain(_and if op == "and" else _or, [slots[o] for o in operands])
            case Not(operand=operand):
                return self._step(_not, slots[operand])
            case ExactSelect():
                return self._step(_where, *(slots[child] for child in node.children()))
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

    def _write_float(self, node: Any) -> _Slot:
        """Write a node of a score; numbers become fp32 tensors, the only numbers that functions accept."""
        slots: Any = self._slots
        match node:
            case ir.Number(value=value):
                return self._constant_slot(torch.tensor(value, dtype=torch.float32, device=self._device))
            case ir.Ratio(num=Const(value=num), den=Const(value=den)):
                return self._constant_slot(torch.tensor(num / den, dtype=torch.float32, device=self._device))
            case ir.Ratio(num=num, den=den):
                return self._step(_ratio, slots[num], slots[den])
            case ir.Element(tensor=tensor) if tensor is SCORE:
                return self._argument_slot("score")
            case ir.Element(tensor=tensor, indices=indices):
                return self._read(self._inputs[tensor.name].to(self._device), indices)
            case ir.Apply(op=op, operands=operands):
                return self._step(FUNCTIONS[op], *(slots[operand] for operand in operands))
            case ir.FloatSelect():
                return self._step(_where, *(slots[child] for child in node.children()))
        raise AssertionError(f"not pointwise: {node}")

    def _sum(self, node: Linear) -> _Slot:
        parts = []
        for term, factor in node.terms:
            slot = self._slots[term]
            parts.append(slot if factor == 1 else self._step(_times, slot, self._constant_slot(factor)))
        if node.constant:
            parts.append(self._constant_slot(node.constant))
        return self._chain(_plus, parts)

    def _coordinate(self, node: Coord) -> _Slot:
        quotient = fold.floordiv(fold.sub(node.position, node.offset), node.stride)
        value = quotient if node.extent is None else fold.mod(quotient, node.extent)
        for node_part in walk(value):
            if node_part not in self._slots:
                self._slots[node_part] = self._write(node_part)
        return self._slots[value]

    def _arithmetic(self, node: Arith) -> _Slot:
        operands = [self._slots[operand] for operand in node.operands]
        if node.op in ("mul", "min", "max"):
            return self._chain(OPERATIONS[node.op], operands)
        return self._step(OPERATIONS[node.op], *operands)

    def _lookup(self, name: str, indices: tuple[Index, ...]) -> _Slot:
        if name not in self._tables:
            array = torch.from_numpy(self._source.tables[name].copy())
            self._tables[name] = (array if array.dtype == torch.bool else array.long()).to(self._device)
        return self._read(self._tables[name], indices)

    def _read(self, table: Tensor, indices: tuple[Index, ...]) -> _Slot:
        """Read an entry of a table; constant indices are applied now, as `flex_attention` indexes by tensors only."""
        if not table.numel():  # no entry of an empty table is used
            table = table.new_zeros(tuple(max(size, 1) for size in table.shape))
        fixed = tuple(
            _clamped_constant(index.value, size) if isinstance(index, Const) else slice(None)
            for index, size in zip(indices, table.shape, strict=True)
        )
        open_indices = [index for index in indices if not isinstance(index, Const)]
        table = table[fixed].contiguous()
        table_slot = self._constant_slot(table)
        if not open_indices:
            return table_slot
        return self._step(
            _entry,
            table_slot,
            *(self._clamped_index(index, size) for index, size in zip(open_indices, table.shape, strict=True)),
        )

    def _clamped_index(self, index: Index, length: int) -> _Slot:
        """Clamp an index to the entries of a table."""
        if isinstance(index, Position | HeadIndex):
            return self._slots[index]
        return self._step(_clamped, self._slots[index], self._constant_slot(length - 1))


def _clamped_constant(index: int, length: int) -> int:
    return min(max(index, 0), length - 1)


# --- operations: on tensors; some operands may be numbers -------------------------------------------------------------


def _constant_like(like: Tensor, truth: bool) -> Tensor:
    return torch.full_like(like, truth, dtype=torch.bool)


def _plus(a: Any, b: Any) -> Any:
    return a + b


def _times(a: Any, b: Any) -> Any:
    return a * b


def _at_least_0(x: Any) -> Any:
    return x >= 0


def _is_0(x: Any) -> Any:
    return x == 0


def _and(a: Any, b: Any) -> Any:
    return a & b


def _or(a: Any, b: Any) -> Any:
    return a | b


def _not(x: Any) -> Any:
    return torch.logical_not(x)


def _ratio(num: Any, den: Any) -> Tensor:
    num, den = _pair(num, den)
    quotient: Tensor = num.to(torch.float64) / torch.where(den == 0, 1, den).to(torch.float64)
    return quotient.to(torch.float32)


def _where(condition: Any, then: Any, otherwise: Any) -> Any:
    return torch.where(condition, then, otherwise)


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


def _magnitude(x: Tensor) -> Tensor:
    return torch.abs(x)


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


def _xor(a: Any, b: Any) -> Any:
    return a ^ b


OPERATIONS: dict[str, Operation] = {
    "mul": _times,
    "floordiv": _floor_divided,
    "mod": _remainder,
    "pow": _power,
    "min": _minimum,
    "max": _maximum,
    "abs": _magnitude,
    "isqrt": _root,
    "bitlen": _bit_length,
    "bitand": _and,
    "bitor": _or,
    "xor": _xor,
}
"""The call in torch of each operation of integers."""
