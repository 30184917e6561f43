"""The kernel of elementwise states: x_t = decay_t · x_{t-1} + write_t, or the running maximum.

A program computes all tokens of a head for a block of entries, chunk by chunk: an associative scan within a chunk, with
the state before the chunk as part of its first step. A chunk with a factor above 1 runs token by token, because the
scan's intermediates from an empty state may be larger than the real states.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from attnc.compiler.kernels.kernel_source import KernelArgument, KernelSource, TileShape, declaration
from attnc.compiler.kernels.text_lines import Lines

CHUNK = 32
WARPS = 4
MOST_ENTRIES = 64
"""Maximum number of entries of a block."""

Op = Literal["real", "complex", "max"]


@dataclass(frozen=True, slots=True)
class ScanKind:
    """The kind of a scan, on which its kernel text depends.

    `op`: the step; `shared`: a token has one factor for all entries; `emptied`: tokens may empty the state before their
    step; `backwards`: from the last token to the first; `entries`: the number of entries of a block, a power of two.
    """

    op: Op
    shared: bool
    emptied: bool
    backwards: bool
    entries: int

    @property
    def function(self) -> str:
        """The kernel's name."""
        flags = {"shared": self.shared, "emptied": self.emptied, "backwards": self.backwards}
        return "_".join((f"scan_{self.op}", *(word for word, is_set in flags.items() if is_set)))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the input tensors by token."""
        return ("write", *([] if self.op == "max" else ["decay"]), *(["emptied"] if self.emptied else []))

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the real numbers of an entry: one, or two for a complex number."""
        return ("x", "y") if self.op == "complex" else ("x",)


_COMBINED = {
    "real": '''
@triton.jit
def combined(factor_a, x_a, factor_b, x_b):
    """One step after another. Nothing of what is empty, or forgotten whole, is left, whatever the other factor is."""
    left = (x_a != 0) & (factor_b != 0)
    return factor_b * factor_a, tl.where(left, factor_b * x_a, 0.0) + x_b
''',
    "complex": '''
@triton.jit
def combined(factor_a, turn_a, x_a, y_a, factor_b, turn_b, x_b, y_b):
    """One step after another, of numbers factor + i turn and x + i y. Of what is forgotten whole nothing is left."""
    left = ((x_a != 0) | (y_a != 0)) & ((factor_b != 0) | (turn_b != 0))
    x = tl.where(left, factor_b * x_a - turn_b * y_a, 0.0) + x_b
    y = tl.where(left, factor_b * y_a + turn_b * x_a, 0.0) + y_b
    return factor_b * factor_a - turn_b * turn_a, factor_b * turn_a + turn_b * factor_a, x, y
''',
    "max": '''
@triton.jit
def combined(factor_a, x_a, factor_b, x_b):
    """One step after another; a factor is 0 where nothing before it counts, else 1."""
    larger = tl.maximum(x_a, x_b, propagate_nan=tl.PropagateNan.ALL)
    return factor_a * factor_b, tl.where(factor_b != 0, larger, x_b)
''',
}


@lru_cache(maxsize=256)
def emit_scan(kind: ScanKind) -> KernelSource:
    """Return the kernel of a kind."""
    pointers = [
        KernelArgument(name, "*i32" if name == "emptied" else "*fp32") for name in (*kind.tensors, "start", "out")
    ]
    strides = [
        KernelArgument(f"{name}_{dim}", "i64") for name in (*kind.tensors, "start", "out") for dim in _dims(name)
    ]
    numbers = [KernelArgument(name, "i32") for name in ("heads", "tokens", "entries")]
    arguments = (*pointers, *strides, *numbers)
    head = Lines()
    head.add(
        f"# States entry by entry ({kind.function.removeprefix('scan_').replace('_', ' ')}): made by attnc.",
        f"# Blocks of {kind.entries} entries, chunks of {CHUNK} tokens, {WARPS} warps.",
        *("", "import triton", "import triton.language as tl", "", ""),
        *_COMBINED[kind.op].strip().split("\n"),
        *("", ""),
        *declaration(kind.function, arguments),
    )
    text = str(head) + str(_ScanWriter(kind, Lines(depth=1)).written())
    tiles = TileShape(CHUNK, kind.entries, WARPS, 1)
    return KernelSource("scan", kind.function, text, arguments, tiles, parts=0)


def _dims(name: str) -> range:
    return range(2) if name == "start" else range(3)


@dataclass
class _ScanWriter:
    """Writes the body of a scan kernel."""

    kind: ScanKind
    lines: Lines

    def written(self) -> Lines:
        """Emit and return the body's lines."""
        kind, add = self.kind, self.lines.add
        add(
            "lane = tl.program_id(0)",
            "batch, head = lane // heads, lane % heads",
            f"entry = tl.program_id(1) * {kind.entries} + tl.arange(0, {kind.entries})",
            "inside = entry < entries",
            f"row = tl.arange(0, {CHUNK})",
        )
        for name in (*kind.tensors, "start", "out"):
            add(f"{name}_at = {name} + batch * {name}_0 + head * {name}_1")
        for i, part in enumerate(kind.parts):
            add(f"{part}_state = tl.load(start_at + {self._entry('entry', i)}, mask=inside, other=0.0)")
        with self.lines.block(f"for first in range(0, tokens, {CHUNK}):"):
            self._chunk()
        return self.lines

    def _entry(self, entry: str, part: int) -> str:
        return entry if self.kind.op != "complex" else f"2 * {entry} + {part}"

    def _chunk(self) -> None:
        kind, add = self.kind, self.lines.add
        add("taken = first + row", "there = taken < tokens")
        add(f"token = {'tokens - 1 - taken' if kind.backwards else 'taken'}.to(tl.int64)")
        add("both = there[:, None] & inside[None, :]")
        nothing = '-float("inf")' if kind.op == "max" else "0.0"
        for i, part in enumerate(kind.parts):
            at = f"write_at + token[:, None] * write_2 + {self._entry('entry[None, :]', i)}"
            add(f"{part} = tl.load({at}, mask=both, other={nothing})")
        self._factors("token[:, None]", "entry[None, :]", "both", "there[:, None]", f"({CHUNK}, {kind.entries})")
        if kind.op == "max":
            self._scanned()
            return
        size = "factor * factor + turn * turn" if kind.op == "complex" else "tl.abs(factor)"
        with self.lines.block(f"if tl.max(tl.max({size}, 1), 0) > 1:"):
            self._one_by_one()
        with self.lines.block("else:"):
            self._scanned()

    def _factors(self, token: str, entry: str, mask: str, token_mask: str, shape: str, prefix: str = "") -> None:
        """Emit the factors of the steps at some tokens, 1 where there are none; `token_mask`: of tokens, or empty."""
        kind, add = self.kind, self.lines.add
        names = [prefix + name for name in ("factor", "turn")[: len(kind.parts)]]
        if kind.op == "max":
            add(f"factor = tl.full({shape}, 1.0, tl.float32)")
        else:
            factor_entry = "0" if kind.shared else entry
            load_mask = token_mask if kind.shared else mask
            for i, name in enumerate(names):
                at = f"decay_at + {token} * decay_2 + {self._entry(factor_entry, i)}"
                guard = f", mask={load_mask}, other={1.0 - i}" if load_mask else ""
                add(f"{name} = tl.load({at}{guard})")
                if kind.shared:
                    add(f"{name} = tl.broadcast_to({name}, {shape})")
        if kind.emptied:
            guard = f", mask={token_mask}, other=0" if token_mask else ""
            add(f"{prefix}emptying = tl.load(emptied_at + {token} * emptied_2{guard}) != 0")
            for name in names:
                add(f"{name} = tl.where({prefix}emptying, 0.0, {name})")

    def _one_by_one(self) -> None:
        """Emit a loop over the tokens of a chunk."""
        kind, add = self.kind, self.lines.add
        with self.lines.block(f"for turn_of in range(first, tl.minimum(first + {CHUNK}, tokens)):"):
            add(f"here = tl.full((), 0, tl.int64) + {'tokens - 1 - turn_of' if kind.backwards else 'turn_of'}")
            self._factors("here", "entry", "inside", "", f"({kind.entries},)", "own_")
            for i, part in enumerate(kind.parts):
                at = f"write_at + here * write_2 + {self._entry('entry', i)}"
                add(f"{part}_written = tl.load({at}, mask=inside, other=0.0)")
            add(f"{', '.join(f'{part}_next' for part in kind.parts)} = {self._step()}")
            if kind.emptied:
                for part in kind.parts:
                    add(f"{part}_next = tl.where(own_emptying, {part}_written, {part}_next)")
            for i, part in enumerate(kind.parts):
                add(
                    f"{part}_state = {part}_next",
                    f"tl.store(out_at + here * out_2 + {self._entry('entry', i)}, {part}_state, mask=inside)",
                )

    def _step(self) -> str:
        if self.kind.op == "complex":
            x = "own_factor * x_state - own_turn * y_state + x_written"
            return f"{x}, own_factor * y_state + own_turn * x_state + y_written"
        return "own_factor * x_state + x_written"

    def _scanned(self) -> None:
        """Emit the associative scan of a chunk."""
        kind, add = self.kind, self.lines.add
        factors = ("factor", "turn")[: len(kind.parts)]
        results = ", ".join(f"{name}_after" for name in (*factors, *kind.parts))
        first_steps = ", ".join(f"{name}_begun" for name in (*factors, *kind.parts))
        steps = ", ".join((*factors, *kind.parts))
        add("# The state before the chunk is a part of its first step.")
        states = ", ".join(f"tl.broadcast_to({part}_state[None, :], ({CHUNK}, {kind.entries}))" for part in kind.parts)
        add(f"{first_steps} = combined({', '.join(factors)}, {states}, {steps})")
        for part in kind.parts:
            add(f"{part} = tl.where(row[:, None] == 0, {part}_begun, {part})")
        add(f"{results} = tl.associative_scan(({steps}), 0, combined)")
        for i, part in enumerate(kind.parts):
            at = f"out_at + token[:, None] * out_2 + {self._entry('entry[None, :]', i)}"
            add(f"tl.store({at}, {part}_after, mask=both)")
            add(f"{part}_state = tl.sum(tl.where(row[:, None] == {CHUNK - 1}, {part}_after, 0.0), 0)")
