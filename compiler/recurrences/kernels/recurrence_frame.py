"""The base of all recurrence kernels: headers, a program's chunk, loads and stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from attnc.compiler.kernels.kernel_source import (
    BYTES,
    TYPES,
    VECTOR,
    KernelArgument,
    KernelSource,
    TileShape,
    declaration,
)
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.recurrences.kernels.helpers import HELPERS
from attnc.compiler.recurrences.kernels.recurrence_problem import RecurrenceProblem
from attnc.compiler.recurrences.recurrence_class import ONCE_A_TOKEN

OF_STEPS = frozenset({"gate", "beta"})
"""Tensors with one number per step."""
_STRIDES = (("batch", "i64"), ("head", "i64"), ("token", "i32"))


@dataclass
class RecurrenceFrame(ABC):
    """Writes a kernel. Subclasses name its stage and emit its lines.

    `rows`, `columns`: the widths of blocks along the state's rows and columns.
    """

    problem: RecurrenceProblem
    rows: int
    columns: int
    warps: int
    stages: int
    lines: Lines = field(default_factory=lambda: Lines(depth=1))
    pointers: dict[str, KernelArgument] = field(default_factory=dict)
    numbers: dict[str, KernelArgument] = field(default_factory=dict)
    helpers: list[str] = field(default_factory=list)

    stage: ClassVar[str]
    makes: ClassVar[str] = ""
    """The results of the kernel in words, if they are equal for all classes."""

    @abstractmethod
    def write(self) -> None:
        """Emit all lines of the kernel."""

    def in_words(self) -> str:
        """Return the results of the kernel in words, for the header of its text."""
        return self.makes

    def source(self) -> KernelSource:
        """Write the kernel and return its source."""
        self.write()
        p = self.problem
        function = f"{p.form.slug}_{self.stage}"
        self.number("heads", "chunks", "steps", "tokens")
        arguments = (*self.pointers.values(), *self.numbers.values())
        assert not self._overwritten(), f"arguments that are assigned to: {self._overwritten()}"
        head = Lines()
        words = self.in_words()
        head.add(
            f"# Linear recurrence ({p.form}): made by attnc.",
            f"# {words}. Heads of {p.dk} and {p.dv} in {p.dtype}, chunks of {p.length} rows, {self.warps} warps.",
            *("", "import triton", "import triton.language as tl", "", ""),
        )
        for helper in dict.fromkeys(self.helpers):
            head.add(*HELPERS[helper].strip().split("\n"), "", "")
        head.add(*declaration(function, arguments))
        tiles = TileShape(p.length, self.columns, self.warps, self.stages)
        return KernelSource(self.stage, function, str(head) + str(self.lines), arguments, tiles)

    def _overwritten(self) -> set[str]:
        """Return the arguments that lines assign to; Triton rejects that, but only in loops."""
        parts = (line.strip().partition(" ") for line in self.lines.lines)
        assigned = {name for name, _, rest in parts if rest.startswith(("= ", "+= ", "-= "))}
        return assigned & {*self.pointers, *self.numbers}

    def add(self, *lines: str) -> None:
        """Add lines at the current depth."""
        self.lines.add(*lines)

    def number(self, *names: str) -> None:
        """Declare integer arguments of the kernel."""
        for name in names:
            self.numbers[name] = KernelArgument(name, "i32")

    # --- the program's chunk

    def emit_chunk(self) -> None:
        """Emit the program's chunk and lane (a head of a batch entry)."""
        self.add("lane = tl.program_id(0) // chunks", "chunk = tl.program_id(0) % chunks")
        self.emit_rows()
        self.emit_steps()

    def emit_rows(self) -> None:
        """Emit the row indices of a chunk."""
        self.add(f"row = tl.arange(0, {self.problem.length})")

    def emit_steps(self) -> None:
        """Emit the steps of the rows, and the chunk's index in scratch memory."""
        p = self.problem
        self.add(
            "at = lane * tl.full((), 1, tl.int64) * chunks + chunk",
            f"first = chunk * tl.full((), {p.used}, tl.int64)",
            "step = first.to(tl.int32) + row",
            "there = step < steps" if p.used == p.length else f"there = (row < {p.used}) & (step < steps)",
        )
        if p.form.micro > 1:
            self.add(f"asked = there & (row % {p.form.micro} == {p.form.read_at})")

    def over_blocks(self, name: str, width: int, block: int, body: Callable[[], None]) -> None:
        """Emit a body for every block of a width: in a loop, unless there is one block."""

        def emit() -> None:
            self.block_columns(name, width, block)
            body()

        if block < width:
            with self.lines.block(f"for {name}_block in range(0, {width // block}):"):
                emit()
        else:
            emit()

    def over_channels(self, body: Callable[[], None]) -> None:
        """Emit a body for every block of the state's rows."""
        self.over_blocks("channel", self.problem.wk, self.rows, body)

    def over_columns(self, body: Callable[[], None]) -> None:
        """Emit a body for every block of the state's columns."""
        self.over_blocks("column", self.problem.wv, self.columns, body)

    def block_columns(self, name: str, width: int, block: int, number: str = "") -> None:
        """Emit the column indices `name` of a block."""
        start = f"{number or f'{name}_block'} * {block} + " if block < width else ""
        self.add(f"{name} = {start}tl.arange(0, {block})")

    # --- tensors of the call

    def emit_address(self, name: str) -> str:
        """Declare a tensor of the call and emit its address at the chunk; return the address's name."""
        unit = self._declared(name)
        token = self._token(name)
        first = "first" if token == "row" else f"chunk * tl.full((), {self.problem.per_chunk}, tl.int64)"
        parts = (f"{name}_0", f"{name}_1", f"{name}_2") if not unit else _parts(name)
        where = f"(lane // heads) * {parts[0]} + (lane % heads) * {parts[1]} + {first} * {parts[2]}"
        self.add(f"{name}_at = {name} + ({where}) * {unit}" if unit else f"{name}_at = {name} + {where}")
        return f"{name}_at"

    def _declared(self, name: str) -> int:
        """Declare a tensor of the call; return how many numbers a unit of its strides has, 0 if strides count numbers.

        Tensors are (batch, head, token, width) or (batch, head, step).
        """
        of_steps = name in OF_STEPS or name in ("dgate_steps", "dbeta")
        kind = "float32" if of_steps or name in IN_FP32 else self.problem.dtype
        if of_steps:
            self.pointers[name] = KernelArgument(name, "*fp32")
            for i in range(3):
                self.numbers[f"{name}_{i}"] = KernelArgument(f"{name}_{i}", "i64")
            return 0
        self.pointers[name] = KernelArgument(name, f"*{TYPES[kind]}")
        for dim, number in _STRIDES:
            self.numbers[f"{name}_{dim}"] = KernelArgument(f"{name}_{dim}", number)
        return VECTOR // BYTES[kind]

    def _token(self, name: str) -> str:
        micro = self.problem.form.micro
        return f"(row // {micro})" if micro > 1 and name.removeprefix("d") in ONCE_A_TOKEN else "row"

    def _row_mask(self, name: str) -> str:
        return "asked" if self.problem.form.micro > 1 and name.removeprefix("d") in ONCE_A_TOKEN else "there"

    def tile(self, name: str, column: str, real: int, width: int) -> tuple[str, str]:
        """Return the addresses of a tile of the call's tensor, and its mask; `real` of `width` columns exist."""
        unit = VECTOR // (4 if name in IN_FP32 else BYTES[self.problem.dtype])
        address = f"{name}_at + {self._token(name)}[:, None] * ({name}_token * {unit}) + {column}[None, :]"
        mask = f"{self._row_mask(name)}[:, None]"
        return address, mask if real == width else f"{mask} & ({column} < {real})[None, :]"

    def load(self, variable: str, name: str, column: str, width: int = 0) -> None:
        """Emit the load of a tile of the call's tensor, with `width` columns; 0: as many as the state."""
        real, state_width = self._widths(name)
        width = width or state_width
        address, mask = self.tile(name, column, real, width)
        self.add(f"{variable} = tl.load({address}, mask={mask}, other=0.0)")

    def put(self, name: str, column: str, value: str) -> None:
        """Emit the store of a tile of the call's tensor."""
        real, width = self._widths(name)
        address, mask = self.tile(name, column, real, width)
        self.add(f"tl.store({address}, {value}, mask={mask})")

    def _widths(self, name: str) -> tuple[int, int]:
        p = self.problem
        return (p.dv, p.wv) if name in OF_COLUMNS else (p.dk, p.wk)

    def load_steps(self, variable: str, name: str) -> None:
        """Emit the load of a number for each step."""
        self.emit_address(name)
        self.add(f"{variable} = tl.load({name}_at + row * {name}_2, mask=there, other=0.0)")

    # --- scratch

    def scratch(self, name: str, width: int, kind: str = "") -> str:
        """Declare scratch (chunks of all heads, length, width); return the address of the chunk's rows."""
        self.pointers[name] = KernelArgument(name, f"*{kind or self.problem.operand}")
        return f"{name} + at * {self.problem.length * width}"

    def scratch_tile(self, name: str, column: str, width: int, kind: str = "") -> str:
        """Return the addresses of a tile of a chunk's scratch rows."""
        return f"{self.scratch(name, width, kind)} + (row[:, None] * {width} + {column}[None, :])"

    def matrix(self, name: str, kind: str = "") -> str:
        """Return the addresses of a chunk's scratch matrix over pairs of rows."""
        return self.scratch_tile(name, "row", self.problem.length, kind)

    def vector(self, name: str) -> str:
        """Return the addresses of a chunk's scratch numbers, one per row, in fp32."""
        return f"{self.scratch(name, 1, 'fp32')} + row"

    def states(self, name: str, row: str, column: str, ahead: int = 0) -> str:
        """Return the addresses of a tile of the state before a chunk, or `ahead` chunks later."""
        p = self.problem
        self.pointers[name] = KernelArgument(name, "*fp32")
        past = f" + {ahead}" if ahead else ""
        return f"{name} + (at + lane{past}) * {p.wk * p.wv} + ({row}[:, None] * {p.wv} + {column}[None, :])"

    def load_total(self, row: str) -> str:
        """Emit the load of a chunk's total decay; return the factor for a tile of the state, or an empty text."""
        p = self.problem
        if p.form.gate == "rows":
            self.pointers["total"] = KernelArgument("total", "*fp32")
            self.add(f"total_rows = tl.load(total + at * {p.wk} + {row})")
            return "total_rows[:, None]"
        if not p.form.has_total:
            return ""
        self.pointers["total"] = KernelArgument("total", "*fp32")
        self.add("total_chunk = tl.load(total + at)")
        return "total_chunk"


OF_COLUMNS = frozenset({"v", "dv", "out", "dout", "gate_columns", "dgate_columns"})
"""Tensors as wide as the state has columns; others are as wide as it has rows."""
IN_FP32 = frozenset({"gate_rows", "gate_columns", "dgate_rows", "dgate_columns"})


def _parts(name: str) -> tuple[str, str, str]:
    return f"{name}_batch", f"{name}_head", f"{name}_token"
