"""A pointwise condition as operations of torch: without branches, so that it can be mapped over and compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from attnc.compiler import fold, ir
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
    intern,
)
from attnc.compiler.pointwise import Pointwise
from attnc.compiler.rewrite import walk
from attnc.runtime.functions import FUNCTIONS

Operation = Callable[..., Any]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's mask_mod: integer tensors of one shape (batch entry, head, row, key) to bool."""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's score_mod: the score, and the same, to a score."""

SCORE = intern(ir.Tensor("the score of flex_attention", "real", ()))
"""The tensor that stands for the score argument of a score_mod."""

_ARGUMENTS = ("batch", "head", "q", "k", "score")

_Slot = tuple[str, int]
"""An "argument", "constant" or "step" by its number: places on the tape follow when all are known."""


@dataclass(frozen=True)
class TorchTape:
    """Operations one after another: each on numbers that are known by then, the five arguments and `constants` first.

    Arithmetic is on int64. Operands that a condition does not ask for are computed too, and what they are is nothing:
    a division by 0 divides by 1, an index outside of a table reads its first or last entry.
    """

    constants: tuple[int | Tensor, ...]
    steps: tuple[tuple[Operation, tuple[int, ...]], ...]
    result: int

    def mask_mod(self) -> MaskMod:
        """The tape of a condition as a plain function."""
        return cast("MaskMod", self._function("mask_mod", "b, h, q_idx, kv_idx"))

    def score_mod(self) -> ScoreMod:
        """The tape of a score as a plain function."""
        return cast("ScoreMod", self._function("score_mod", "score, b, h, q_idx, kv_idx"))

    def _function(self, name: str, arguments: str) -> Operation:
        """Return a function with a code object of its own, in which numbers are literals.

        Numbers that a closure holds are inputs to torch.compile. The second mask that one process compiles has others
        in the same cells, so that they become symbols, and code of FlexAttention for a CPU does not compile with these.
        """
        operations = list(dict.fromkeys(operation for operation, _ in self.steps))
        tensors = [x for x in self.constants if isinstance(x, Tensor)]
        for tensor in tensors:  # nor are sizes of tables symbols
            torch._dynamo.mark_static(tensor)
        held = iter(range(len(tensors)))
        operands = [*(f"x{i}" for i in range(4)), "score" if "score" in arguments else ""]
        operands += [f"t{next(held)}" if isinstance(x, Tensor) else repr(x) for x in self.constants]
        body = [f"x{i} = {x}.to(int64)" for i, x in enumerate(("b", "h", "q_idx", "kv_idx"))]
        for operation, read in self.steps:
            operands.append(f"x{len(operands)}")
            called = ", ".join(operands[i] for i in read)
            body.append(f"{operands[-1]} = f{operations.index(operation)}({called})")
        closed = [f"f{i}" for i in range(len(operations))] + [f"t{i}" for i in range(len(tensors))]
        lines = [
            f"def make({', '.join(['int64', *closed])}):",
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
    """The tape of a condition, or of a score that reads `inputs`, with its tables on a device."""
    return _Writer(source, torch.device(device), inputs or {}).written()


class _Writer:
    def __init__(self, source: Pointwise, device: torch.device, inputs: Mapping[str, Tensor]) -> None:
        self._source = source
        self._device = device
        self._inputs = inputs
        self._constants: list[int | Tensor] = []
        self._steps: list[tuple[Operation, tuple[_Slot, ...]]] = []
        self._slots: dict[Index, _Slot] = {}
        self._tables: dict[str, Tensor] = {}

    def written(self) -> TorchTape:
        root = self._source.condition
        for node in walk(root):
            self._slots[node] = self._made(node)
        found = self._slots[root]
        if found[0] == "constant" and not isinstance(self._constants[found[1]], Tensor):
            found = self._step(_constantly, self._argument("q"), found)
        return self._numbered(found)

    def _numbered(self, result: _Slot) -> TorchTape:
        starts = {"argument": 0, "constant": 5, "step": 5 + len(self._constants)}

        def at(slot: _Slot) -> int:
            return starts[slot[0]] + slot[1]

        steps = tuple((operation, tuple(map(at, operands))) for operation, operands in self._steps)
        return TorchTape(tuple(self._constants), steps, at(result))

    def _argument(self, name: str) -> _Slot:
        return "argument", _ARGUMENTS.index(name)

    def _number(self, value: int | Tensor) -> _Slot:
        self._constants.append(value)
        return "constant", len(self._constants) - 1

    def _step(self, operation: Operation, *operands: _Slot) -> _Slot:
        """A step; numbers alone, such as coordinates along an axis of length 1, are computed at once."""
        numbers = [self._constants[i] for kind, i in operands if kind == "constant"]
        if len(numbers) == len(operands) and all(isinstance(x, int) for x in numbers):
            result = operation(*map(torch.tensor, numbers))
            return self._number(result.to(self._device) if result.is_floating_point() else result.item())
        self._steps.append((operation, operands))
        return "step", len(self._steps) - 1

    def _chain(self, operation: Operation, operands: Sequence[_Slot]) -> _Slot:
        return reduce(lambda a, b: self._step(operation, a, b), operands)

    def _made(self, node: Index) -> _Slot:  # noqa: C901  one case a node kind
        of = self._slots
        match node:
            case Const(value=value):
                return self._number(value)
            case Truth(value=truth):
                return self._number(truth)
            case Position(name=name) | HeadIndex(name=name):
                return self._argument(name)
            case Linear():
                return self._sum(node)
            case Compare(op=op, value=value):
                return self._step(_at_least_0 if op == "ge" else _is_0, of[value])
            case Bool(op=op, operands=operands):
                return self._chain(_and if op == "and" else _or, [of[o] for o in operands])
            case Not(operand=operand):
                return self._step(_not, of[operand])
            case ExactSelect():
                return self._step(_where, *(of[child] for child in node.children()))
            case Coord():
                return self._coordinate(node)
            case Arith():
                return self._arithmetic(node)
            case TableRead(values=values, index=index):
                table = torch.tensor(values, dtype=torch.int64, device=self._device)
                return self._read(table, (index,))
            case Lookup(tensor=tensor, indices=indices):
                return self._looked_up(tensor.name, indices)
        return self._made_float(node)

    def _made_float(self, node: Any) -> _Slot:
        """Emit a node of a score; numbers are tensors of fp32, the only ones that functions take."""
        of: Any = self._slots
        match node:
            case ir.Number(value=value):
                return self._number(torch.tensor(value, dtype=torch.float32, device=self._device))
            case ir.Ratio(num=Const(value=num), den=Const(value=den)):
                return self._number(torch.tensor(num / den, dtype=torch.float32, device=self._device))
            case ir.Ratio(num=num, den=den):
                return self._step(_ratio, of[num], of[den])
            case ir.Element(tensor=tensor) if tensor is SCORE:
                return self._argument("score")
            case ir.Element(tensor=tensor, indices=indices):
                return self._read(self._inputs[tensor.name].to(self._device), indices)
            case ir.Apply(op=op, operands=operands):
                return self._step(FUNCTIONS[op], *(of[operand] for operand in operands))
            case ir.FloatSelect():
                return self._step(_where, *(of[child] for child in node.children()))
        raise AssertionError(f"not pointwise: {node}")

    def _sum(self, node: Linear) -> _Slot:
        parts = []
        for term, factor in node.terms:
            own = self._slots[term]
            parts.append(own if factor == 1 else self._step(_times, own, self._number(factor)))
        if node.constant:
            parts.append(self._number(node.constant))
        return self._chain(_plus, parts)

    def _coordinate(self, node: Coord) -> _Slot:
        quotient = fold.floordiv(fold.sub(node.position, node.offset), node.stride)
        value = quotient if node.extent is None else fold.mod(quotient, node.extent)
        for below in walk(value):
            if below not in self._slots:
                self._slots[below] = self._made(below)
        return self._slots[value]

    def _arithmetic(self, node: Arith) -> _Slot:
        operands = [self._slots[operand] for operand in node.operands]
        if node.op in ("mul", "min", "max"):
            return self._chain(_OPERATIONS[node.op], operands)
        return self._step(_OPERATIONS[node.op], *operands)

    def _looked_up(self, name: str, indices: tuple[Index, ...]) -> _Slot:
        if name not in self._tables:
            array = torch.from_numpy(self._source.tables[name].copy())
            self._tables[name] = (array if array.dtype == torch.bool else array.long()).to(self._device)
        return self._read(self._tables[name], indices)

    def _read(self, table: Tensor, indices: tuple[Index, ...]) -> _Slot:
        """An entry: constant indices are taken beforehand, as `flex_attention` reads a place by tensors alone."""
        if not table.numel():  # nothing asks for an entry of it
            table = table.new_zeros(tuple(max(size, 1) for size in table.shape))
        at = tuple(
            _within(index.value, size) if isinstance(index, Const) else slice(None)
            for index, size in zip(indices, table.shape, strict=True)
        )
        rest = [index for index in indices if not isinstance(index, Const)]
        table = table[at].contiguous()
        held = self._number(table)
        if not rest:
            return held
        return self._step(
            _entry, held, *(self._inside(index, size) for index, size in zip(rest, table.shape, strict=True))
        )

    def _inside(self, index: Index, length: int) -> _Slot:
        """An index that is an entry's, whatever it was."""
        if isinstance(index, Position | HeadIndex):
            return self._slots[index]
        return self._step(_clamped, self._slots[index], self._number(length - 1))


def _within(index: int, length: int) -> int:
    return min(max(index, 0), length - 1)


# --- operations: on tensors; some operands may be numbers -------------------------------------------------------------


def _constantly(like: Tensor, truth: bool) -> Tensor:
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
    found: Tensor = num.to(torch.float64) / torch.where(den == 0, 1, den).to(torch.float64)
    return found.to(torch.float32)


def _where(condition: Any, then: Any, otherwise: Any) -> Any:
    return torch.where(condition, then, otherwise)


def _entry(table: Tensor, *at: Any) -> Tensor:
    return table[at]


def _clamped(x: Tensor, most: int) -> Tensor:
    return torch.clamp(x, 0, most)


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors; one of them is."""
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


def _least(a: Any, b: Any) -> Tensor:
    return torch.minimum(*_pair(a, b))


def _most(a: Any, b: Any) -> Tensor:
    return torch.maximum(*_pair(a, b))


def _magnitude(x: Tensor) -> Tensor:
    return torch.abs(x)


# Compilers of FlexAttention write an operand out at each of its uses: what uses one often takes them long.


def _power(base: Any, exponent: Any) -> Tensor:
    """Compute an integer power. Past exponent 63 only the bases 0, 1 and -1 have a value that fits, by the parity."""
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
    """The square root of a number of up to 62 bits, rounded down."""
    root = torch.sqrt(torch.clamp(n, min=0).to(torch.float64)).to(torch.int64)
    root = torch.where(root * root > n, root - 1, root)
    return torch.where((root + 1) * (root + 1) <= n, root + 1, root)


def _xor(a: Any, b: Any) -> Any:
    return a ^ b


_OPERATIONS: dict[str, Operation] = {
    "mul": _times,
    "floordiv": _floor_divided,
    "mod": _remainder,
    "pow": _power,
    "min": _least,
    "max": _most,
    "abs": _magnitude,
    "isqrt": _root,
    "bitlen": _bit_length,
    "bitand": _and,
    "bitor": _or,
    "xor": _xor,
}
