"""The kernels of any step equation: token by token, the states on the chip from the first to the last.

A program does all tokens of a lane (a head of a batch entry), of all entries of the states, or of a block of those
that never meet (`Tape.parts_along`). The backward pass goes from stretch to stretch, the last first: it has the states
before each, makes those before each token of a stretch anew, and goes through them from the last token to the first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, cast

from attnc.compiler.derivatives import derivatives
from attnc.compiler.ir import Number
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.source import KernelSource
from attnc.compiler.recurrences.kernels.stepping import MOST, Stepping
from attnc.compiler.recurrences.kernels.tape_text import TapeText, constant
from attnc.compiler.recurrences.tape import Op
from attnc.compiler.values import Axes

Stage = Literal["forward", "backward"]
STEEP = frozenset({"div", "sqrt", "log", "log2", "pow"})
"""Functions whose slope may be infinite: nothing is left of an adjoint of 0, behind a bound for instance."""


@lru_cache(maxsize=64)
def emit_token_by_token(stepping: Stepping, stage: Stage) -> KernelSource:
    """A kernel. Raises NotInKernelsError for a function that has no text, or no derivative."""
    if stepping.largest > MOST:
        raise NotInKernelsError("a value that is too large for a chip")
    writing = (_Forward if stage == "forward" else _Backward)(stepping)
    writing.write()
    return writing.source(stage)


class _Forward(TapeText):
    def write(self) -> None:
        """All lines."""
        self.begin()
        for n, (i, _, axes) in enumerate(self.states()):
            self.add(f"x{i} = {self.loaded(self.buffer(f'begun{n}', axes, alike=True), axes)}")
        with self.lines.block("for turn in range(0, tokens):"):
            self.add("token = turn + tl.full((), 0, tl.int64)")
            if self.of.keeps:
                with self.lines.block("if turn % stretch == 0:"):
                    for n, (i, _, axes) in enumerate(self.states()):
                        self.store(self.buffer(f"kept{n}", axes, "turn // stretch", "stretches"), axes, f"x{i}")
            self.begun_anew(
                *((f"x{i}", constant(start)) for (i, *_), start in zip(self.states(), self.of.starts, strict=True))
            )
            self.run([self.tape.read, *(after for _, after, _ in self.states())])
            own = self.tape.ops[self.tape.read].axes
            self.store(self.buffer("out", own, "token", "tokens", alike=True), own, self.name(self.tape.read))
            later = [(i, self.name(after)) for i, after, _ in self.states() if after != i]
            if later:
                self.add(f"{', '.join(f'x{i}' for i, _ in later)} = {', '.join(text for _, text in later)}")
        for n, (i, _, axes) in enumerate(self.states()):
            self.store(self.buffer(f"last{n}", axes, alike=True), axes, f"x{i}")


class _Backward(TapeText):
    def write(self) -> None:
        """All lines."""
        self.begin()
        for n, (i, _, axes) in enumerate(self.states()):
            found = self.loaded(self.buffer(f"dlast{n}", axes, alike=True), axes)
            alone = self.of.is_part(axes) or self.of.parts == 1
            self.add(f"ds{i} = {found if alone else f'tl.where(part == 0, {found}, 0.0)'}")
        still = [i for i in self.tape.leaves if i not in self.of.varying]
        self.add(*(f"sum{i} = {self._zeros(self.tape.ops[i].axes)}" for i in still))
        with self.lines.block("for later in range(0, stretches):"):
            self._stretch()
        for n, (i, _, axes) in enumerate(self.states()):
            self.store(self.buffer(f"dbegun{n}", axes), axes, f"ds{i}")
        for i in still:
            own = self.tape.ops[i].axes
            self.store(self.buffer(f"dleaf{i}", own), own, f"sum{i}")

    def _zeros(self, axes: Axes) -> str:
        return f"tl.full({self.shape(axes) if axes else '()'}, 0.0, tl.float32)"

    def _stretch(self) -> None:
        states = self.states()
        self.add("first = (stretches - 1 - later) * stretch", "many = tl.minimum(stretch, tokens - first)")
        for n, (i, _, axes) in enumerate(states):
            self.add(f"x{i} = {self.loaded(self.buffer(f'kept{n}', axes, 'stretches - 1 - later', 'stretches'), axes)}")
        self.add("tl.debug_barrier()")
        with self.lines.block("for turn in range(0, many):"):
            self.add("token = first + turn + tl.full((), 0, tl.int64)")
            self.begun_anew(
                *((f"x{i}", constant(start)) for (i, *_), start in zip(states, self.of.starts, strict=True))
            )
            for n, (i, _, axes) in enumerate(states):
                self.store(self.buffer(f"before{n}", axes, "turn", "stretch"), axes, f"x{i}")
            later = [(i, after) for i, after, _ in states if after != i]
            self.run([after for _, after in later])
            if later:
                self.add(f"{', '.join(f'x{i}' for i, _ in later)} = {', '.join(self.name(j) for _, j in later)}")
        self.add("tl.debug_barrier()")
        with self.lines.block("for back in range(0, many):"):
            self.add("turn = many - 1 - back", "token = first + turn + tl.full((), 0, tl.int64)")
            for n, (i, *_) in enumerate(states):
                self._load_before(n, i)
            self._token()

    def _load_before(self, n: int, i: int) -> None:
        """Load a state as it was before the token."""
        own = self.tape.ops[i].axes
        self.add(f"x{i} = {self.loaded(self.buffer(f'before{n}', own, 'turn', 'stretch'), own)}")

    def _token(self) -> None:
        """One token's adjoints."""
        states, read = self.states(), self.tape.read
        ends = [read, *(after for _, after, _ in states)]
        self.run(ends)
        own = self.tape.ops[read].axes
        found: dict[int, str] = {}
        self.add(f"dout_here = {self.loaded(self.buffer('dout', own, 'token', 'tokens', alike=True), own)}")
        self._give(found, read, "dout_here")
        for i, after, _ in states:
            self._give(found, after, f"ds{i}")
        again = {i: n for n, (i, *_) in enumerate(states)} if self.of.is_tight else {}
        for i in reversed(range(len(self.tape.ops))):
            if i in found:
                for j in again.keys() & self.tape.ops[i].operands:
                    self.add(
                        "tl.debug_barrier()  # what follows is loaded again: kept beside what is above, it would spill"
                    )
                    self._load_before(again.pop(j), j)
                self._operands(found, i)
        for i, _, axes in states:
            self.add(f"ds{i} = {found.get(i, self._zeros(axes))}")
        self.begun_anew(*((f"ds{i}", "0.0") for i, *_ in states))
        for i in self.tape.leaves:
            axes = self.tape.ops[i].axes
            if i in self.of.varying:
                given = found.get(i, self._zeros(axes))
                self.store(self.buffer(f"dleaf{i}", axes, "token", "tokens"), axes, given)
            elif i in found:
                self.add(f"sum{i} += {found[i]}")

    def _give(self, found: dict[int, str], i: int, text: str) -> None:
        """Add to the adjoint of an operation."""
        if self.tape.ops[i].kind in ("number", "test"):
            return
        self.add(f"d{i} = {f'd{i} + {text}' if i in found else text}")
        found[i] = f"d{i}"

    def _operands(self, found: dict[int, str], i: int) -> None:
        op, d, x = self.tape.ops[i], f"d{i}", f"x{i}"
        own = [self.tape.ops[j].axes for j in op.operands]
        names = [self.name(j) for j in op.operands]
        match op.kind:
            case "apply":
                self._factors(found, i)
            case "sum":
                axis = cast("int", op.of)
                self._give(found, op.operands[0], self._widened(d, own[0], axis))
            case "extreme":
                first = f"tl.arg{op.of}({self.bounded(names[0], own[0], cast('str', op.of))}, 0, tie_break_left=True)"
                self._give(
                    found, op.operands[0], self._at(own[0], first if len(own[0]) == 1 else f"{first}[None, :]", d)
                )
            case "product":
                left, right = self.masked(names[0], own[0], 0), self.masked(names[1], own[1], 1)
                self._give(found, op.operands[0], self.product(self.masked(d, op.axes, 1), f"tl.trans({right})"))
                self._give(found, op.operands[1], self.product(f"tl.trans({left})", self.masked(d, op.axes, 0)))
            case "root":
                self._give(found, op.operands[0], f"-0.5 * {d} * {x} * {x} * {x}")
            case "softmax":
                last = len(op.axes) - 1
                column = "[:, None]" if last else ""
                whole = self.masked(f"{d} * {x}", op.axes, last)
                self._give(found, op.operands[0], f"{x} * ({d} - tl.sum({whole}, {last}){column})")
            case "diagonal":
                place = self.places[own[0][0]]
                there = f"tl.where({place}[:, None] == {place}[None, :], {d}, 0.0)"
                self._give(found, op.operands[0], f"tl.sum({there}, 1)")
            case "pick":
                self._give(found, op.operands[0], self._at(own[0], names[1], d))

    def _at(self, axes: Axes, place: str, text: str) -> str:
        """A tile that has a value at a place of the first axis, and 0 elsewhere."""
        given = text if len(axes) == 1 else f"{text}[None, :]"
        return f"tl.where({self._picked(axes, place)}, {given}, 0.0)"

    def _widened(self, text: str, axes: Axes, axis: int) -> str:
        """A value as it is along one axis more."""
        if len(axes) == 1:
            return f"{self._zeros(axes)} + {text}"
        return f"tl.broadcast_to({text}[{'None, :' if axis == 0 else ':, None'}], {self.shape(axes)})"

    def _factors(self, found: dict[int, str], i: int) -> None:
        """What a function entry by entry asks of its operands."""
        op = self.tape.ops[i]
        if op.of == "where":
            shown = self.spread(op.operands[0], (), 0)
            for n, text in ((1, f"tl.where({shown} != 0, d{i}, 0.0)"), (2, f"tl.where({shown} != 0, 0.0, d{i})")):
                self._give(found, op.operands[n], self._narrowed(text, op, n))
            return
        if op.of == "share":
            whole = self.spread(op.operands[1], op.places[1], len(op.axes))
            part = f"tl.where({whole} == 0.0, 0.0, d{i} / tl.where({whole} == 0.0, 1.0, {whole}))"
            for n, text in ((0, part), (1, f"-x{i} * {part}")):
                self._give(found, op.operands[n], self._narrowed(text, op, n))
            return
        node, holders = self.applied(op), self.holders(op)
        formula = self.formula(op, f"x{i}")
        slopes = {derivative.atom: derivative.by for derivative in derivatives(node)}
        if node in slopes and node not in holders:
            raise NotInKernelsError(f"the derivative of {op.of}")
        for n, holder in enumerate(holders):
            if holder not in slopes or isinstance(holder, Number):
                continue
            by = slopes[holder]
            text = f"d{i}"
            if not isinstance(by, Number) or by.value != 1:
                text = f"d{i} * {formula.of(by).at(8)}"
            if op.of in STEEP:
                text = f"tl.where(d{i} == 0.0, 0.0, {text})"
            self._give(found, op.operands[n], self._narrowed(text, op, n))

    def _narrowed(self, text: str, op: Op, n: int) -> str:
        """What is given to an operand that is the same along axes of the result: the sum along them."""
        places = op.places[n]
        if places == (1, 0):
            return f"tl.trans({text})"
        left = op.axes
        for axis in reversed(range(len(op.axes))):
            if axis not in places:
                text = f"tl.sum({self.masked(text, left, axis)}, {axis})"
                left = left[:axis] + left[axis + 1 :]
        return text


__all__ = ["Stage", "emit_token_by_token"]
