"""The plans of a pass on a GPU: which kernels, chunks of which length, the sequence in how many segments.

`apart`: the states before chunks are written by one kernel, which walks over the chunks, and read by another for all
chunks at once. `walk`: one kernel walks and gives the outputs too, so that the state never leaves the chip. Decays,
pairs and triangles of corrections are made before either, for all chunks at once (Yang et al. 2024, section 3), but for
walks with one gate for all rows, or none, which take rows as they are given. Where there are too few heads for the
machine, segments of the sequence are walked at once from an empty state, and again from what was before them: what
leads from segment to segment is, with a decay alone, a factor, with a correction a matrix (RECURRENCES, section 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import ceil
from typing import Literal

from attnc.compiler.recurrences.segment_count import fitting_segments
from attnc.compiler.simulation.machine import Machine, MachineError
from attnc.compiler.simulation.recurrent.chunk_work import Amount, Chunk, PassForm, backward, decays, forward
from attnc.compiler.simulation.recurrent.kernel_times import ACCUMULATED, KernelTimes, Task, fitting, run
from attnc.compiler.simulation.recurrent.recurrence_call import PassPart, RecurrenceCall

Kind = Literal["apart", "walk"]

CHUNKS = (16, 32, 64, 128, 256)

KERNELS = 64
"""Rows of the chunks of attnc's kernels. A test holds that no other length is predicted to be much faster."""

SLICES = (16, 32, 64, 128)
"""Columns of a state that a program has."""

LEAST = 16
"""Rows of the smallest product of tensor cores."""

STATE_BYTES = 4


@dataclass(frozen=True)
class PassPlan:
    """A pass in chunks of `chunk` rows, in `segments`, a program for every `columns` columns of the state."""

    kind: Kind
    chunk: int
    segments: int
    columns: int
    runs: tuple[KernelTimes, ...]
    work: Chunk
    states: int

    @cached_property
    def ms(self) -> float:
        """As predicted."""
        return sum(run.ms for run in self.runs)

    @property
    def moved(self) -> int:
        """Bytes."""
        return sum(run.task.moved for run in self.runs)

    @property
    def flop(self) -> float:
        """Floating-point operations in products."""
        return sum(run.task.work.flop for run in self.runs)

    def __str__(self) -> str:
        how = "states apart" if self.kind == "apart" else "one walk"
        split = f", {self.segments} segments" if self.segments > 1 else ""
        return f"chunks of {self.chunk}, {how}{split}"


def plans(call: RecurrenceCall, part: PassPart, machine: Machine) -> list[PassPlan]:
    """The forward's, the fastest first. Raises MachineError where there is none."""
    walks = call.shape.dtype != "float32" and part.form.gate != "columns"  # others have no such kernel: it would spill
    kinds: tuple[Kind, ...] = ("apart", "walk") if walks else ("apart",)
    return _ranked(call, part, machine, [_ForwardPlanner(call, part, machine, kind) for kind in kinds])


def backward_plans(call: RecurrenceCall, part: PassPart, machine: Machine) -> list[PassPlan]:
    """The backward's, from the states before chunks that the forward kept."""
    return _ranked(call, part, machine, [_BackwardPlanner(call, part, machine, "apart")])


def _ranked(call: RecurrenceCall, part: PassPart, machine: Machine, makers: list[_PassPlanner]) -> list[PassPlan]:
    found = [plan for maker in makers for plan in maker.plans()]
    if not found:
        raise MachineError(
            f"no chunk of `{call.name}` with a state {part.form.state} in {call.shape.dtype} fits {machine.name}'s "
            "registers and shared memory"
        )
    return sorted(found, key=lambda plan: (plan.chunk != KERNELS, plan.ms, plan.segments, plan.chunk, -plan.columns))


@dataclass(frozen=True)
class _PassPlanner(ABC):
    """Plans of one kind."""

    call: RecurrenceCall
    part: PassPart
    machine: Machine
    kind: Kind

    def plans(self) -> Iterator[PassPlan]:
        form = self.part.form
        for chunk, columns in product(CHUNKS, _slices(form)):
            if form.micro > chunk or not self._fits(chunk, columns):
                continue
            segments = self._segments(chunk, columns)
            tasks = self._tasks(chunk, columns, segments)
            runs = tuple(run(self.machine, self.call.shape.dtype, task) for task in tasks)
            yield PassPlan(self.kind, chunk, segments, columns, runs, self._work(chunk), self._states(chunk))

    def _segments(self, chunk: int, columns: int) -> int:
        """Return the segments that the executor uses: as many as the machine has room for."""
        form = self.part.form
        programs = self.call.shape.lanes * ceil(form.columns / columns) * ceil(form.rows / self._rows(columns))
        return fitting_segments(programs, self.chunks(chunk), self.machine.sms)

    def chunks(self, chunk: int) -> int:
        """Return the number of chunks of a sequence."""
        return ceil(self.call.shape.n_q / max(chunk // self.part.form.micro, 1))

    @abstractmethod
    def _tasks(self, chunk: int, columns: int, segments: int) -> list[Task]: ...

    def _work(self, chunk: int) -> Chunk:
        return forward(self.part.form, chunk, least=LEAST)

    def _fits(self, chunk: int, columns: int) -> bool:
        """Whether the largest program has room on an SM."""
        form, machine = self.part.form, self.machine
        if form.correction != "none" and 8 * chunk * chunk > machine["shared_kib"] * 1024:
            return False  # a triangle and its inverse, in fp32
        return self._beside(chunk, columns) >= 1

    def _beside(self, chunk: int, columns: int) -> int:
        """Walking programs that an SM has room for."""
        form = self.part.form
        sides = 2 if form.correction == "none" else 3
        rows = min(chunk, 64) if self.kind == "apart" else chunk
        held = self._rows(columns) * columns
        shared = rows * (sides * form.rows + columns) * self.number
        if self.kind == "walk":
            held += chunk * chunk + chunk * columns
            shared += chunk * chunk * self.number
        return 0 if held > 2 * ACCUMULATED else max(fitting(self.machine, held, shared), 0)

    def _rows(self, columns: int) -> int:
        """Rows of a state that a program has: all that a correction reads."""
        form = self.part.form
        free = form.correction == "none" and self.kind == "apart"
        return min(form.rows, max(ACCUMULATED // columns // 2, 16)) if free else form.rows

    @property
    def number(self) -> int:
        """Bytes of a number of the call's dtype."""
        return 4 if self.call.shape.dtype == "float32" else 2

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _states(self, chunk: int) -> int:
        """Bytes of the states before all chunks."""
        return self.call.shape.lanes * self.chunks(chunk) * self.part.form.entries * STATE_BYTES

    def _made(self, width: int) -> int:
        """Bytes of a vector of this width for every row of every chunk."""
        return self.call.shape.lanes * self.call.shape.n_q * self.part.form.micro * width * self.number

    @property
    def results(self) -> int:
        """Bytes of what is read of the states."""
        return self.call.size(self.part.reads)

    @property
    def written(self) -> int:
        """Bytes of what corrections make of keys and values before the states are known."""
        form = self.part.form
        return 0 if form.correction == "none" else self._made(form.rows + form.columns)

    def _sides(self, chunk: int) -> int:
        """Bytes of readers and writers as the edges of chunks see them, and of their pairs."""
        form = self.part.form
        readers = form.reads + (form.correction != "none")
        return self._made(form.rows * (readers + form.writers) + chunk * readers * form.writers)

    # --- kernels -----------------------------------------------------------------------------------------------------

    def _walking(
        self, name: str, chunk: int, columns: int, segments: int, work: Amount, moved: int, links: int
    ) -> Task:
        """A kernel that walks over the chunks."""
        form, shape = self.part.form, self.call.shape
        rows = ceil(form.rows / self._rows(columns))
        programs = shape.lanes * segments * ceil(form.columns / columns) * rows
        count, own = self.chunks(chunk), ceil(self.chunks(chunk) / segments)
        beside = min(self._beside(chunk, columns), max(ceil(programs / self.machine.sms), 1))
        return Task(name, moved, work * (count * shape.lanes), programs, own, links, beside)

    def _for_all(self, name: str, chunk: int, work: Amount, moved: int, columns: int | None = None) -> Task:
        """A kernel for all chunks at once; what is not by columns it computes for every `columns` columns anew."""
        blocks = 1 if columns is None else ceil(self.part.form.columns / columns)
        many = self.chunks(chunk) * self.call.shape.lanes
        return Task(name, moved, work * many, many * blocks)

    def _prepared(self, chunk: int, work: Amount) -> Task:
        """Return the work on all chunks before states are known: decays, pairs, and the systems of corrections."""
        name = "decays and pairs" if self.part.form.correction == "none" else "triangles"
        moved = self.call.size(self.part.sources) + self._sides(chunk) + self.written
        return self._for_all(name, chunk, work, moved)

    def _joined(self, chunk: int, columns: int, segments: int, keys: int, serial: Amount, links: int) -> list[Task]:
        """Return the additional work of a split sequence: a walk from zero states, and the joining."""
        form, lanes = self.part.form, self.call.shape.lanes
        if segments == 1:
            return []
        ends = lanes * segments * form.entries * 4
        wide = 1.0 if form.correction == "none" else 1 + form.rows / form.columns
        walk = self._walking("segments", chunk, columns, segments, serial * wide, keys, links)
        more = 0 if form.correction == "none" else form.rows * form.rows
        ends += lanes * segments * more * 4
        joining = Amount(exact=2.0 * more * form.columns * segments * lanes)
        programs = lanes * ceil(form.columns / columns)
        wider = Task(
            walk.name, walk.moved + ends, walk.work, ceil(walk.programs * wide), walk.steps, links, walk.beside
        )
        return [wider, Task("segments joined", 2 * ends, joining, programs, segments, 1)]


@dataclass(frozen=True)
class _ForwardPlanner(_PassPlanner):
    def _tasks(self, chunk: int, columns: int, segments: int) -> list[Task]:
        part, call, form = self.part, self.call, self.part.form
        work = self._work(chunk)
        if self.kind == "walk" and segments == 1 and form.correction == "none" and form.gate in ("none", "scalar"):
            return self._fused(chunk, columns, work)
        found = self._made(form.columns) if form.correction != "none" else 0
        values = call.size(part.values) if form.correction != "delta" else 0
        tasks = [self._prepared(chunk, work.local)]
        links = 1 if form.correction == "none" else 2
        keys = self._made(form.rows * form.writers) + values + self.written
        tasks += self._joined(chunk, columns, segments, keys, work.serial, links)
        asked = self._made(form.reads * (form.rows + chunk * form.writers))
        if self.kind == "walk":
            both, moved = work.serial + work.output, keys + asked + self.results
            return [*tasks, self._walking("outputs", chunk, columns, segments, both, moved, links + 2)]
        states = self._states(chunk)
        tasks.append(self._walking("states", chunk, columns, segments, work.serial, keys + found + states, links))
        moved = asked + values + found + states + self.results
        return [*tasks, self._for_all("outputs", chunk, work.output, moved, form.columns)]

    def _fused(self, chunk: int, columns: int, work: Chunk) -> list[Task]:
        """One walk over rows as they are given; weights of pairs are made before it, of all chunks at once."""
        part, call, form = self.part, self.call, self.part.form
        own = decays(form, chunk)
        pairs = Amount(work.local.products) * ceil(form.columns / columns)
        moved = call.size(part.queries | part.keys | part.values) + self.results
        weights = self._made(chunk) if form.gate == "scalar" else 0
        walk = self._walking("outputs", chunk, columns, 1, work.serial + work.output + pairs, moved + weights, 3)
        if form.gate == "none":
            return [walk]
        return [self._for_all("weights", chunk, own, call.size(part.gates) + weights), walk]


@dataclass(frozen=True)
class _BackwardPlanner(_PassPlanner):
    def _work(self, chunk: int) -> Chunk:
        return backward(self.part.form, chunk, least=LEAST)

    def _tasks(self, chunk: int, columns: int, segments: int) -> list[Task]:
        part, call, form = self.part, self.call, self.part.form
        work = self._work(chunk)
        states, everything = self._states(chunk), call.size(part.sources)
        corrected = form.correction != "none"
        found, links = (self._made(form.columns), 2) if corrected else (0, 1)
        prepared = self._prepared(chunk, work.local)
        tasks = [prepared]
        keys = self._made(form.rows * form.reads) + self.results + self.written
        tasks += self._joined(chunk, columns, segments, keys, work.serial, links)
        tasks.append(
            self._walking("adjoints of states", chunk, columns, segments, work.serial, keys + found + states, links)
        )
        gradients = everything  # as large as what they are of
        moved = everything + gradients + self.results + 2 * states + 2 * found + self._sides(chunk)
        return [*tasks, self._for_all("gradients", chunk, work.output, moved)]


def _slices(form: PassForm) -> list[int]:
    """Columns of a program, from those that leave none without work."""
    return [width for width in SLICES if width <= max(form.columns, SLICES[0])]


__all__ = ["CHUNKS", "Kind", "PassPlan", "backward_plans", "plans"]
