"""The kernel text of a tape: tiles, loads and stores, and the operations of one token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import prod
from typing import cast

from attnc.compiler.ir import Element, Lookup, Number, Tensor, Value, intern
from attnc.compiler.ir.value_nodes import (
    Axes,
    apply,
    element,
    number,
)
from attnc.compiler.kernels.index_text import ExprText, IndexText
from attnc.compiler.kernels.kernel_source import KernelArgument, KernelSource, TileShape, declaration
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.value_text import VALUE_HELPERS, ValueText
from attnc.compiler.recurrences.kernels.stepping import LEAST, Stepping
from attnc.compiler.recurrences.step_tape import Op, StepTape


@dataclass(frozen=True, slots=True)
class TileAddress:
    """The address of a tile: the pointer `base`, and the text `further` of an offset to add to it.

    A matrix's entry offsets are added to the base first: as constants added to one address, they need no registers.
    """

    base: str
    further: str = ""


@dataclass
class TapeText(ABC):
    """Writes a kernel. The value of operation i is named x{i}, its adjoint d{i}."""

    of: Stepping
    lines: Lines = field(default_factory=lambda: Lines(depth=1))
    pointers: dict[str, KernelArgument] = field(default_factory=dict)
    numbers: dict[str, KernelArgument] = field(default_factory=dict)
    helpers: dict[str, None] = field(default_factory=dict)
    places: dict[str | int, str] = field(default_factory=dict)

    @property
    def tape(self) -> StepTape:
        """The tape of a token's operations."""
        return self.of.tape

    def source(self, stage: str) -> KernelSource:
        """Return the kernel source; call `write` first."""
        for name in ("heads", "tokens", "parts", "stretch", "stretches"):
            self.numbers[name] = KernelArgument(name, "i32")
        arguments = (*self.pointers.values(), *self.numbers.values())
        kept = "_kept" if stage == "forward" and self.of.keeps else ""
        function = f"{self.of.name}_token_by_token_{stage}{kept}"
        head = Lines()
        states = ", ".join(f"{name} [{', '.join(map(str, self._state_axes(name)))}]" for name, _ in self.tape.after)
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.of.sizes)
        head.add(
            f"# {self.of.name}, token by token, {stage}: made by attnc.",
            f"# States {states}; {sizes}; {self.of.warps} warps.",
            *("", "import triton", "import triton.language as tl", "", ""),
        )
        for helper in self.helpers:
            head.add(*VALUE_HELPERS[helper].strip().split("\n"), "", "")
        head.add(*declaration(function, arguments))
        tiles = TileShape(LEAST, LEAST, self.of.warps, 1)
        text = str(head) + str(self.lines)
        return KernelSource(
            "token_by_token", function, text, arguments, tiles, self.of.parts, registers=self.of.registers
        )

    @abstractmethod
    def write(self) -> None:
        """Emit all lines of the kernel."""

    def add(self, *lines: str) -> None:
        """Add lines at the current depth."""
        self.lines.add(*lines)

    # --- the program's head and entries

    def begin(self) -> None:
        """Emit the program's head and part, the indices along axes, and the loads of values shared by all tokens."""
        self.add(
            "lane, part = tl.program_id(0).to(tl.int64), tl.program_id(1)",
            "batch, head = lane // heads, lane % heads",
            "slot = lane * parts + part",
        )
        axes = dict.fromkeys(axis for op in self.tape.ops for axis in op.axes)
        for i, axis in enumerate(axes):
            part_offset = f"part * {self.of.block(axis)} + " if axis == self.of.along and self.of.parts > 1 else ""
            self.places[axis] = f"at{i}"
            self.add(f"at{i} = {part_offset}tl.arange(0, {self.of.block(axis)})  # {axis}")
        for i in (*self.tape.leaves, *self.tape.tests):
            name, kind = self.input_tensor(i)
            self.pointers[name] = KernelArgument(name, kind)
            for dim in range(3 if i in self.of.varying else 2):
                self.numbers[f"{name}_{dim}"] = KernelArgument(f"{name}_{dim}", "i64")
            self.add(f"{name}_at = {name} + batch * {name}_0 + head * {name}_1")
            if i not in self.of.varying:
                self.load(i)
        if self.of.resets:
            self.pointers["fresh"] = KernelArgument("fresh", "*i32")
            for dim in range(3):
                self.numbers[f"fresh_{dim}"] = KernelArgument(f"fresh_{dim}", "i64")
            self.add("fresh_at = fresh + batch * fresh_0 + head * fresh_1")

    def input_tensor(self, i: int) -> tuple[str, str]:
        """Return the name and the type of the tensor of a leaf or a test."""
        return (f"leaf{i}", "*fp32") if self.tape.ops[i].kind == "leaf" else (f"test{i}", "*i32")

    def load(self, i: int) -> None:
        """Emit the load of a leaf or a test."""
        axes = self.tape.ops[i].axes
        token = f" + token * {self.input_tensor(i)[0]}_2" if i in self.of.varying else ""
        self.add(f"x{i} = {self.loaded(TileAddress(f'{self.input_tensor(i)[0]}_at{token}'), axes)}")

    def emit_restart(self, *names: tuple[str, str], token: str = "token") -> None:
        """Emit the replacement of variables by start values, (name, text), where states start anew before a token."""
        if self.of.resets:
            self.add(f"begins = tl.load(fresh_at + {token} * fresh_2) != 0")
            self.add(*(f"{name} = tl.where(begins, {text}, {name})" for name, text in names))

    # --- tiles

    def inside(self, axes: Axes, only: tuple[int, ...] = (0, 1)) -> str:
        """Return the mask of a tile's entries that exist, by the axes in `only`; empty if all exist."""
        conditions = []
        for i, axis in enumerate(axes):
            if i in only and self.of.block(axis) * (self.of.parts if axis == self.of.along else 1) != self.of.size(
                axis
            ):
                text = f"{self.places[axis]} < {self.of.size(axis)}"
                conditions.append(text if len(axes) == 1 else f"({text})[{':, None' if i == 0 else 'None, :'}]")
        return " & ".join(conditions)

    def masked(self, text: str, axes: Axes, *only: int) -> str:
        """Return a tile with 0 at entries that do not exist along the axes `only`."""
        mask = self.inside(axes, only)
        return f"tl.where({mask}, {text}, 0.0)" if mask else text

    def shape(self, axes: Axes) -> str:
        """Return the text of a tile's shape."""
        return f"({', '.join(str(self.of.block(axis)) for axis in axes)}{',' if len(axes) == 1 else ''})"

    def offset(self, axes: Axes) -> str:
        """Return the offsets of a tile's entries in contiguous memory."""
        if not axes:
            return ""
        last = self.places[axes[-1]]
        if len(axes) == 1:
            return f" + {last}"
        return f" + {self.places[axes[0]]}[:, None] * {self.of.size(axes[1])} + {last}[None, :]"

    def loaded(self, place: TileAddress, axes: Axes) -> str:
        """Return the text of a load."""
        mask = self.inside(axes)
        return f"tl.load({self._address(place, axes)}{f', mask={mask}, other=0.0' if mask else ''})"

    def store(self, place: TileAddress, axes: Axes, value: str) -> None:
        """Emit a store."""
        mask = self.inside(axes)
        self.add(f"tl.store({self._address(place, axes)}, {value}{f', mask={mask}' if mask else ''})")

    def _address(self, place: TileAddress, axes: Axes) -> str:
        if len(axes) < 2:
            return f"{place.base}{place.further}{self.offset(axes)}"
        return f"{place.base}{self.offset(axes)}{place.further}"

    def buffer(self, name: str, axes: Axes, number: str = "", count: str = "", *, alike: bool = False) -> TileAddress:
        """Declare an fp32 buffer; return the address of the program's values in it, or of item `number` of `count`.

        The buffer has values per head if its axes are divided among the parts of a head, or `alike` (equal in all
        parts); else per slot. A tight kernel computes indices in 32 bits, except for tokens: no memory holds 2³¹
        matrices of its size.
        """
        self.pointers[name] = KernelArgument(name, "*fp32")
        index = "lane" if alike or self.of.parts == 1 or self.of.is_part(axes) else "slot"
        if number and self.of.is_tight and count != "tokens":
            index = f"({index}.to(tl.int32) * {count} + {number}).to(tl.int64)"
        elif number:
            index = f"({index} * {count} + {number})"
        return TileAddress(name, f" + {index} * {prod(self.of.shape(axes))}")

    def _state_axes(self, name: str) -> Axes:
        return next(op.axes for op in self.tape.ops if op.kind == "state" and op.of == name)

    def states(self) -> list[tuple[int, int, Axes]]:
        """Return (operation before the token, operation after the token, axes) for each state."""
        before = {op.of: i for i, op in enumerate(self.tape.ops) if op.kind == "state"}
        return [(before[name], after, self.tape.ops[before[name]].axes) for name, after in self.tape.after]

    # --- operations

    def run(self, wanted: list[int]) -> None:
        """Emit the operations of a token that `wanted` depend on."""
        needed = self.tape.needed(wanted)
        for i, op in enumerate(self.tape.ops):
            if i not in needed or op.kind in ("number", "state"):
                continue
            if op.kind in ("leaf", "test"):
                if i in self.of.varying:
                    self.load(i)
            else:
                self.add(f"x{i} = {self.text(op)}")

    def name(self, i: int) -> str:
        """Return the name of an operation's value, or the text of a constant."""
        op = self.tape.ops[i]
        if op.kind != "number":
            return f"x{i}"
        return constant(float(self.of.size(op.of)) if isinstance(op.of, str) else float(cast("float", op.of)))

    def spread(self, i: int, places: tuple[int, ...], width: int) -> str:
        """Return an operand's text, broadcast to a tile with `width` axes."""
        name = self.name(i)
        if places == (1, 0):
            return f"tl.trans({name})"
        return name if width < 2 or len(places) != 1 else f"{name}[{':, None' if places == (0,) else 'None, :'}]"

    def text(self, op: Op) -> str:
        """Return the text of an operation."""
        operand_axes = [self.tape.ops[i].axes for i in op.operands]
        names = [self.name(i) for i in op.operands]
        match op.kind:
            case "apply":
                return self._applied(op)
            case "sum":
                axis = cast("int", op.of)
                return f"tl.sum({self.masked(names[0], operand_axes[0], axis)}, {axis})"
            case "extreme":
                return f"tl.{op.of}({self.bounded(names[0], operand_axes[0], cast('str', op.of))}, 0)"
            case "product":
                left, right = self.masked(names[0], operand_axes[0], 1), self.masked(names[1], operand_axes[1], 0)
                return self.product(left, right)
            case "root":
                return f"tl.where({names[0]} == 0.0, 0.0, tl.rsqrt(tl.where({names[0]} == 0.0, 1.0, {names[0]})))"
            case "softmax":
                return self._softmax(names[0], operand_axes[0])
            case "diagonal":
                place = self.places[op.axes[0]]
                along = f"{names[0]}[:, None]" if operand_axes[0] else names[0]
                return f"tl.where({place}[:, None] == {place}[None, :], {along}, 0.0)"
            case "pick":
                return f"tl.sum(tl.where({self._picked(operand_axes[0], names[1])}, {names[0]}, 0.0), 0)"
        raise AssertionError(op.kind)

    def product(self, left: str, right: str) -> str:
        """Return the text of a product of two matrices."""
        return f'tl.dot({left}, {right}, input_precision="{self.of.precision}")'

    def bounded(self, text: str, axes: Axes, op: str) -> str:
        """Return a tile whose missing entries along the first axis cannot be the extreme."""
        mask, far = self.inside(axes, (0,)), "-float('inf')" if op == "max" else "float('inf')"
        return f"tl.where({mask}, {text}, {far})" if mask else text

    def _picked(self, axes: Axes, index: str) -> str:
        """Return the mask of the entries at an index along the first axis."""
        indices = self.places[axes[0]]
        return f"({indices} == {index})" if len(axes) == 1 else f"({indices}[:, None] == {index})"

    def _softmax(self, name: str, axes: Axes) -> str:
        last = len(axes) - 1
        mask = self.inside(axes, (last,))
        self.add(f"shown = tl.where({mask}, {name}, -float('inf'))" if mask else f"shown = {name}")
        column = "[:, None]" if last else ""
        self.add(f"largest = tl.max(shown, {last})", f"shown = tl.exp(shown - largest{column})")
        return f"shown / tl.sum(shown, {last}){column}"

    def _applied(self, op: Op) -> str:
        parts = [self.spread(i, at, len(op.axes)) for i, at in zip(op.operands, op.places, strict=True)]
        if op.of == "where":
            return f"tl.where({parts[0]} != 0, {parts[1]}, {parts[2]})"
        return self.formula(op).of(self.applied(op)).text

    def formula(self, op: Op, result_name: str = "") -> ValueText:
        """Return the writer of formulas of an operation's operands, and of its result if `result_name` is given."""
        names = {holder: ExprText(self.spread(i, at, len(op.axes))) for holder, i, at in self._stand_ins(op)}
        result = {self.applied(op): ExprText(result_name)} if result_name else {}
        return ValueText(result | names, _EXACT, _no_element, self.helpers)

    def _stand_ins(self, op: Op) -> list[tuple[Value, int, tuple[int, ...]]]:
        """Return (stand-in, operand, its axes in the result) for the operands that are not constants."""
        triples = zip(self.holders(op), op.operands, op.places, strict=True)
        return [(holder, i, at) for holder, i, at in triples if not isinstance(holder, Number)]

    def holders(self, op: Op) -> list[Value]:
        """Return the values that stand for operands in formulas; constants stand for themselves."""
        return [
            number(float(cast("float", self.tape.ops[i].of)))
            if self.tape.ops[i].kind == "number" and not isinstance(self.tape.ops[i].of, str)
            else element(intern(Tensor(f"operand{n}", "real", ())), ())
            for n, i in enumerate(op.operands)
        ]

    def applied(self, op: Op) -> Value:
        """Return the formula of an elementwise operation."""
        holders = self.holders(op)
        return holders[0] if op.of == "real" else apply(cast("str", op.of), *holders)


def constant(value: float) -> str:
    """Return the text of a number, finite or infinite."""
    return ValueText({}, _EXACT, _no_element).of(number(value)).at(9)


def _no_element(node: Element, indices: tuple[ExprText, ...]) -> ExprText:
    raise AssertionError(node)


def _no_lookup(node: Lookup, indices: tuple[ExprText, ...]) -> ExprText:
    raise AssertionError(node)


_EXACT = IndexText({}, _no_lookup)
