"""Kernels for any step equation: token by token, with the states on the chip from the first token to the last.

A program computes all tokens of one head of one batch entry, for all entries of the states or for a block of entries
that never meet others (`StepTape.parts_along`). The backward pass goes from the last stretch of tokens to the first: it
loads the states before a stretch, recomputes the states before each of its tokens, and walks these tokens backward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.recurrences.kernels.adjoint_text import AdjointText
from attnc.compiler.recurrences.kernels.phases import Phases, backwards, remade, whole_behind
from attnc.compiler.recurrences.kernels.stepping import MOST, Stepping
from attnc.compiler.recurrences.kernels.tape_text import TapeText, constant

Stage = Literal["forward", "backward"]
_NAMES = re.compile(r"\b(?:x|ds?)\d+\b")
"""The names of operations' values and adjoints in a kernel text."""


@lru_cache(maxsize=64)
def emit_token_by_token(stepping: Stepping, stage: Stage) -> KernelSource:
    """Return a kernel. Raises NotInKernelsError for a function without text or derivative, and for too large values."""
    if stepping.largest > MOST:
        raise NotInKernelsError("a value that is too large for a chip")
    writer = (_TapeForward if stage == "forward" else _TapeBackward)(stepping)
    writer.write()
    return writer.source(stage)


class _TapeForward(TapeText):
    """The forward kernel: outputs, final states, and with `keeps` the states before stretches."""

    def write(self) -> None:
        """Emit all lines of the kernel."""
        self.begin()
        for n, (i, _, axes) in enumerate(self.states()):
            self.add(f"x{i} = {self.loaded(self.buffer(f'begun{n}', axes, alike=True), axes)}")
        if self.of.keeps:
            with self.lines.block("for this in range(0, stretches):"):
                for n, (i, _, axes) in enumerate(self.states()):
                    self.store(self.buffer(f"kept{n}", axes, "this", "stretches"), axes, f"x{i}")
                self.add("first = this * stretch")
                self._tokens("first", "tl.minimum(first + stretch, tokens)")
        else:
            self._tokens("0", "tokens")
        for n, (i, _, axes) in enumerate(self.states()):
            self.store(self.buffer(f"last{n}", axes, alike=True), axes, f"x{i}")

    def _tokens(self, begin: str, end: str) -> None:
        """Emit a loop over tokens."""
        with self.lines.block(f"for turn in range({begin}, {end}):"):
            self.add("token = turn + tl.full((), 0, tl.int64)")
            self.emit_restart(
                *((f"x{i}", constant(start)) for (i, *_), start in zip(self.states(), self.of.starts, strict=True))
            )
            self.run([self.tape.read, *(after for _, after, _ in self.states())])
            read_axes = self.tape.ops[self.tape.read].axes
            self.store(
                self.buffer("out", read_axes, "token", "tokens", alike=True), read_axes, self.name(self.tape.read)
            )
            updates = [(i, self.name(after)) for i, after, _ in self.states() if after != i]
            if updates:
                self.add(f"{', '.join(f'x{i}' for i, _ in updates)} = {', '.join(text for _, text in updates)}")


@dataclass
class _TapeBackward(AdjointText):
    """The backward kernel: the adjoints of leaves and of the states before the first token.

    A tight kernel passes states and their adjoints from token to token in memory (`before`, `dbegun`).
    """

    phases: Phases | None = None

    def write(self) -> None:
        """Emit all lines of the kernel."""
        self.begin()
        for n, (i, _, axes) in enumerate(self.states()):
            loaded = self.loaded(self.buffer(f"dlast{n}", axes, alike=True), axes)
            is_whole = self.of.is_part(axes) or self.of.parts == 1
            self.add(f"ds{i} = {loaded if is_whole else f'tl.where(part == 0, {loaded}, 0.0)'}")
            if self.of.is_tight:
                self.store(self.buffer(f"dbegun{n}", axes), axes, f"ds{i}")
        constant_leaves = [i for i in self.tape.leaves if i not in self.of.varying]
        self.add(*(f"sum{i} = {self.zeros(self.tape.ops[i].axes)}" for i in constant_leaves))
        with self.lines.block("for later in range(0, stretches):"):
            self._stretch()
        for n, (i, _, axes) in enumerate(self.states()):
            if not self.of.is_tight:
                self.store(self.buffer(f"dbegun{n}", axes), axes, f"ds{i}")
        for i in constant_leaves:
            leaf_axes = self.tape.ops[i].axes
            self.store(self.buffer(f"dleaf{i}", leaf_axes), leaf_axes, f"sum{i}")

    def _stretch(self) -> None:
        """Emit the backward pass of one stretch of tokens."""
        self.add("this = stretches - 1 - later", "first = this * stretch", "many = tl.minimum(stretch, tokens - first)")
        (self._replay_in_memory if self.of.is_tight else self._replay)()
        self.add("tl.debug_barrier()")
        with self.lines.block("for back in range(0, many):"):
            self.add("turn = many - 1 - back", "token = first + turn + tl.full((), 0, tl.int64)")
            if self.of.is_tight:
                self.add("tl.debug_barrier()")
            else:
                for n in range(len(self.states())):
                    self._load_before(n)
            self._token()

    def _replay(self) -> None:
        """Emit the recomputation of the states before each token of a stretch, and their stores."""
        states = self.states()
        self._load_kept(*range(len(states)))
        self.add("tl.debug_barrier()")
        with self.lines.block("for turn in range(0, many):"):
            self.add("token = first + turn + tl.full((), 0, tl.int64)")
            self._store_before(*range(len(states)))
            updates = [(i, after) for i, after, _ in states if after != i]
            self.run([after for _, after in updates])
            if updates:
                self.add(f"{', '.join(f'x{i}' for i, _ in updates)} = {', '.join(self.name(j) for _, j in updates)}")

    def _replay_in_memory(self) -> None:
        """Emit the recomputation with states in memory, so that one state at a time is on the chip."""
        states = self.states()
        self.add("turn, token = 0, first + tl.full((), 0, tl.int64)", "tl.debug_barrier()")
        for n in range(len(states)):
            self._load_kept(n)
            self._store_before(n)
        with self.lines.block("for turn in range(0, many - 1):"):
            self.add("token = first + turn + tl.full((), 0, tl.int64)", "tl.debug_barrier()")
            self.phases = Phases(self.tape)
            self.run([after for _, after, _ in states])
            for n, (i, after, axes) in enumerate(states):
                self._ready([f"x{after}"])
                self.add(f"after{i} = {self.name(after)}")
                self.emit_restart((f"after{i}", constant(self.of.starts[n])), token="(token + 1)")
                self.store(self.buffer(f"before{n}", axes, "turn + 1", "stretch"), axes, f"after{i}")

    def _load_kept(self, *which: int) -> None:
        """Emit loads of the states before a stretch."""
        for n in which:
            i, _, axes = self.states()[n]
            self.add(f"x{i} = {self.loaded(self.buffer(f'kept{n}', axes, 'this', 'stretches'), axes)}")

    def _store_before(self, *which: int) -> None:
        """Emit stores of the states before the token."""
        states = self.states()
        self.emit_restart(*((f"x{states[n][0]}", constant(self.of.starts[n])) for n in which))
        for n in which:
            i, _, axes = states[n]
            self.store(self.buffer(f"before{n}", axes, "turn", "stretch"), axes, f"x{i}")

    def _load_before(self, n: int) -> None:
        """Emit the load of a state before the token."""
        i, _, axes = self.states()[n]
        self.add(f"x{i} = {self.loaded(self.buffer(f'before{n}', axes, 'turn', 'stretch'), axes)}")

    def run(self, wanted: list[int]) -> None:
        """Emit the operations that `wanted` depend on; a tight kernel computes matrices only where they are read."""
        if self.phases is None:
            super().run(wanted)
            return
        needed = self.tape.needed(wanted)
        for i, op in enumerate(self.tape.ops):
            if i in needed and i not in remade(self.tape) and op.kind != "number":
                self._ready(f"x{j}" for j in op.operands)
                self.make(i)
                self.phases.note(f"x{i}")

    def make(self, i: int) -> None:
        """Emit the load or the computation of a value."""
        if self.tape.ops[i].kind == "state":
            self._load_before([state for state, *_ in self.states()].index(i))
        elif self.tape.ops[i].kind in ("leaf", "test"):
            self.load(i)
        else:
            self.add(f"x{i} = {self.text(self.tape.ops[i])}")

    def _ready(self, reads: Iterable[str]) -> None:
        """Emit the matrices that the next line reads, unless the current phase has computed them."""
        if self.phases is None:
            return
        ends, missing = self.phases.request(reads)
        if ends:
            self.add("tl.debug_barrier()")
        for i in missing:
            self.make(i)

    def _token(self) -> None:
        """Emit the adjoints of one token."""
        states, read = self.states(), self.tape.read
        self.phases = Phases(self.tape) if self.of.is_tight else None
        self.run([read, *(after for _, after, _ in states)])
        read_axes = self.tape.ops[read].axes
        adjoints: dict[int, str] = {}
        self.add(f"dout_here = {self.loaded(self.buffer('dout', read_axes, 'token', 'tokens', alike=True), read_axes)}")
        self._give(adjoints, read, "dout_here")
        if not self.of.is_tight:
            for i, after, _ in states:
                self._give(adjoints, after, f"ds{i}")
        done: set[int] = set()
        for i in backwards(self.tape):
            done.add(i)
            if self.of.is_tight:
                self._load_adjoints(adjoints, i)
            if self.tape.ops[i].kind == "leaf":
                self._leaf(adjoints, i)
            for j, text in self.gives(i) if i in adjoints else []:
                self._give(adjoints, j, text)
            if self.of.is_tight:
                self._store_adjoints(adjoints, i, done)
        if not self.of.is_tight:
            self.add(*(f"ds{i} = {adjoints.get(i, self.zeros(axes))}" for i, _, axes in states))
            self.emit_restart(*((f"ds{i}", "0.0") for i, *_ in states))

    def _load_adjoints(self, adjoints: dict[int, str], i: int) -> None:
        """Emit the adjoints of the states whose value after the token is operation `i`."""
        assert self.phases is not None
        for n, (j, after, axes) in enumerate(self.states()):
            if after == i and self.tape.ops[i].kind != "number":
                self.add(f"ds{j} = {self.loaded(self.buffer(f'dbegun{n}', axes), axes)}")
                self.phases.note(f"ds{j}")
                self._give(adjoints, i, f"ds{j}")

    def _store_adjoints(self, adjoints: dict[int, str], i: int, done: set[int]) -> None:
        """Emit stores of the adjoints of states that are complete once operation `i` is done."""
        for n, (j, _, axes) in enumerate(self.states()):
            needed = whole_behind(self.tape, j)
            if i in needed and needed <= done:
                self.add(f"ds{j} = {adjoints.get(j, self.zeros(axes))}")
                self.emit_restart((f"ds{j}", "0.0"))
                self.store(self.buffer(f"dbegun{n}", axes), axes, f"ds{j}")

    def _leaf(self, adjoints: dict[int, str], i: int) -> None:
        """Emit the store of a leaf's adjoint, or its addition to the sum over tokens."""
        axes = self.tape.ops[i].axes
        if i in self.of.varying:
            self.store(self.buffer(f"dleaf{i}", axes, "token", "tokens"), axes, adjoints.get(i, self.zeros(axes)))
        elif i in adjoints:
            self.add(f"sum{i} += {adjoints[i]}")

    def _give(self, adjoints: dict[int, str], i: int, text: str) -> None:
        """Emit an addition to the adjoint of an operation."""
        if self.tape.ops[i].kind in ("number", "test"):
            return
        reads = _NAMES.findall(text)
        self._ready(reads)
        self.add(f"d{i} = {f'd{i} + {text}' if i in adjoints else text}")
        adjoints[i] = f"d{i}"
        if self.phases is not None:
            self.phases.note(f"d{i}", reads if len(self.tape.ops[i].axes) == 2 else ())
