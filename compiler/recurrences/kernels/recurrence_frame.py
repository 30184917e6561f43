"""The base of all recurrence kernels: headers, a program's place, loads and stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from attnc.compiler.kernels.kernel_source import TYPES, VECTOR, KernelArgument, KernelSource, declaration
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.recurrences.kernels.helpers import HELPERS
from attnc.compiler.recurrences.kernels.recurrence_problem import RecurrenceProblem
from attnc.compiler.simulation.gpu_clocks import BYTES, TileShape

ONCE_A_TOKEN = frozenset({"q", "dq", "out", "dout", "bonus", "dbonus"})
"""Tensors with a row for a token; others have one for a step."""
OF_STEPS = frozenset({"gate", "beta"})
"""Tensors with one number for a step."""
_STRIDES = (("batch", "i64"), ("head", "i64"), ("token", "i32"))


@dataclass
class RecurrenceFrame(ABC):
    """A kernel that is being written. Sub-classes say which it is, and write its lines.

    `rows`: the width of a block of the state's rows; `columns`: of its columns.
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
    """The results of the kernel, in words, where they are equal for all classes."""

    @abstractmethod
    def write(self) -> None:
        """All lines."""

    def in_words(self) -> str:
        """The results of the kernel, in words."""
        return self.makes

    def source(self) -> KernelSource:
        """The kernel."""
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
        """Triton refuses it in loops, and only there."""
        found = (line.strip().partition(" ") for line in self.lines.lines)
        assigned = {name for name, _, rest in found if rest.startswith(("= ", "+= ", "-= "))}
        return assigned & {*self.pointers, *self.numbers}

    def add(self, *lines: str) -> None:
        """Lines at the current depth."""
        self.lines.add(*lines)

    def number(self, *names: str) -> None:
        """Declare counts that the kernel is given."""
        for name in names:
            self.numbers[name] = KernelArgument(name, "i32")

    # --- where a program stands

    def of_chunk(self) -> None:
        """A program has a chunk of a lane, which is a head of a batch entry."""
        self.add("lane = tl.program_id(0) // chunks", "chunk = tl.program_id(0) % chunks")
        self.numbered()
        self.place()

    def numbered(self) -> None:
        """The rows of a chunk."""
        self.add(f"row = tl.arange(0, {self.problem.length})")

    def place(self) -> None:
        """Emit the steps of the rows, and the chunk's place in scratch memory."""
        p = self.problem
        self.add(
            "at = lane * tl.full((), 1, tl.int64) * chunks + chunk",
            f"first = chunk * tl.full((), {p.used}, tl.int64)",
            "step = first.to(tl.int32) + row",
            "there = step < steps" if p.used == p.length else f"there = (row < {p.used}) & (step < steps)",
        )
        if p.form.micro > 1:
            self.add(f"asked = there & (row % {p.form.micro} == {p.read_at})")

    def blocks(self, name: str, width: int, block: int) -> str:
        """The head of a loop over blocks of a width; the block's columns are `name`, see `block_columns`."""
        return f"for {name}_block in range(0, {width // block}):"

    def block_columns(self, name: str, width: int, block: int, number: str = "") -> None:
        """The columns of a block."""
        start = f"{number or f'{name}_block'} * {block} + " if block < width else ""
        self.add(f"{name} = {start}tl.arange(0, {block})")

    # --- tensors of the call

    def given(self, name: str) -> str:
        """A tensor (batch, head, token, width) or (batch, head, step); the name of its address at the chunk."""
        unit = self._declared(name)
        token = self._token(name)
        first = "first" if token == "row" else f"chunk * tl.full((), {self.problem.per_chunk}, tl.int64)"
        parts = (f"{name}_0", f"{name}_1", f"{name}_2") if not unit else _parts(name)
        where = f"(lane // heads) * {parts[0]} + (lane % heads) * {parts[1]} + {first} * {parts[2]}"
        self.add(f"{name}_at = {name} + ({where}) * {unit}" if unit else f"{name}_at = {name} + {where}")
        return f"{name}_at"

    def _declared(self, name: str) -> int:
        """Declare a tensor of the call; numbers in the unit of its strides, 0 where they are counted one by one."""
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
        return f"(row // {micro})" if micro > 1 and name in ONCE_A_TOKEN else "row"

    def _there(self, name: str) -> str:
        return "asked" if self.problem.form.micro > 1 and name in ONCE_A_TOKEN else "there"

    def tile(self, name: str, column: str, real: int, width: int) -> tuple[str, str]:
        """The addresses of a tile of the call's tensor, and its mask; `real` columns of `width` are there."""
        unit = VECTOR // (4 if name in IN_FP32 else BYTES[self.problem.dtype])
        address = f"{name}_at + {self._token(name)}[:, None] * ({name}_token * {unit}) + {column}[None, :]"
        mask = f"{self._there(name)}[:, None]"
        return address, mask if real == width else f"{mask} & ({column} < {real})[None, :]"

    def load(self, variable: str, name: str, column: str, width: int = 0) -> None:
        """Load a tile of a tensor of the call, of so many columns; 0: as many as the state has."""
        real, own = self._widths(name)
        width = width or own
        address, mask = self.tile(name, column, real, width)
        self.add(f"{variable} = tl.load({address}, mask={mask}, other=0.0)")

    def put(self, name: str, column: str, value: str) -> None:
        """Store a tile of a tensor of the call."""
        real, width = self._widths(name)
        address, mask = self.tile(name, column, real, width)
        self.add(f"tl.store({address}, {value}, mask={mask})")

    def _widths(self, name: str) -> tuple[int, int]:
        p = self.problem
        return (p.dv, p.wv) if name in OF_COLUMNS else (p.dk, p.wk)

    def load_steps(self, variable: str, name: str) -> None:
        """Load a number for each step."""
        self.given(name)
        self.add(f"{variable} = tl.load({name}_at + row * {name}_2, mask=there, other=0.0)")

    # --- scratch

    def scratch(self, name: str, width: int, kind: str = "") -> str:
        """The address of a chunk's rows of scratch (chunks of all lanes, length, width), declared."""
        self.pointers[name] = KernelArgument(name, f"*{kind or self.problem.operand}")
        return f"{name} + at * {self.problem.length * width}"

    def kept(self, name: str, column: str, width: int, kind: str = "") -> str:
        """The addresses of a tile of a chunk's rows."""
        return f"{self.scratch(name, width, kind)} + (row[:, None] * {width} + {column}[None, :])"

    def matrix(self, name: str, kind: str = "") -> str:
        """The addresses of a chunk's matrix over pairs of rows."""
        return self.kept(name, "row", self.problem.length, kind)

    def vector(self, name: str) -> str:
        """The addresses of a chunk's numbers, fp32."""
        return f"{self.scratch(name, 1, 'fp32')} + row"

    def states(self, name: str, row: str, column: str, ahead: int = 0) -> str:
        """The addresses of a tile of the state before a chunk, or before the next one."""
        p = self.problem
        self.pointers[name] = KernelArgument(name, "*fp32")
        past = f" + {ahead}" if ahead else ""
        return f"{name} + (at + lane{past}) * {p.wk * p.wv} + ({row}[:, None] * {p.wv} + {column}[None, :])"

    def load_total(self, row: str) -> str:
        """Load what is left of a state after a chunk; an expression to multiply a tile of the state by, or empty."""
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
"""Tensors as wide as the state's columns; others are as wide as its rows."""
IN_FP32 = frozenset({"gate_rows", "gate_columns", "dgate_rows", "dgate_columns", "dbonus"})


def _parts(name: str) -> tuple[str, str, str]:
    return f"{name}_batch", f"{name}_head", f"{name}_token"
