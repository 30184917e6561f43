"""The plans of a pass on a GPU: its kernels, the length of its chunks and the number of its segments.

`apart`: one kernel walks over the chunks and writes the states before them; another reads these states for all chunks
at once. `walk`: one kernel walks and computes the outputs too, so that the state never leaves the chip. Decays, pairs
and triangles of corrections are computed before either, for all chunks at once (Yang et al. 2024, section 3), except
for walks without a gate or with one gate for all rows, which read the rows of inputs directly. If there are too few
heads for the machine, segments of the sequence are walked at once from an empty state, and again from the state before
them: a segment maps the state by a factor if there is only a decay, by a matrix if there is a correction (RECURRENCES,
section 3).
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
from attnc.compiler.simulation.recurrent.kernel_times import ACCUMULATED, Task, fitting, run
from attnc.compiler.simulation.recurrent.recurrence_call import PassPart, RecurrenceCall
from attnc.compiler.simulation.recurrent.recurrence_simulation import PassKernel

Kind = Literal["apart", "walk"]

CHUNKS = (16, 32, 64, 128, 256)
"""Rows of chunks that are tried."""

KERNELS = 64
"""Rows of the chunks of attnc's kernels. A test checks that no other length is predicted to be much faster."""

SLICES = (16, 32, 64, 128)
"""Numbers of columns of a state that a program may hold."""

LEAST = 16
"""Minimum number of rows of a product of tensor cores."""

STATE_BYTES = 4
"""Bytes of an element of a state, which is kept in fp32."""


@dataclass(frozen=True)
class PassPlan:
    """A plan of a pass: chunks of `chunk` rows, `segments` segments, and a program for every `columns` columns.

    `states`: bytes of the states before all chunks.
    """

    kind: Kind
    chunk: int
    segments: int
    columns: int
    kernels: tuple[PassKernel, ...]
    work: Chunk
    states: int

    @cached_property
    def ms(self) -> float:
        """The predicted milliseconds of all kernels."""
        return sum(kernel.ms for kernel in self.kernels)

    def __str__(self) -> str:
        how = "states apart" if self.kind == "apart" else "one walk"
        split = f", {self.segments} segments" if self.segments > 1 else ""
        return f"chunks of {self.chunk}, {how}{split}"


def plans(call: RecurrenceCall, part: PassPart, machine: Machine) -> list[PassPlan]:
    """Return the plans of the forward, `KERNELS` rows first, then by time. Raises MachineError if none fits."""
    walks = call.shape.dtype != "float32" and part.form.kind.can_walk  # for others the kernel would spill registers
    kinds: tuple[Kind, ...] = ("apart", "walk") if walks else ("apart",)
    return _ranked(call, part, machine, [_ForwardPlanner(call, part, machine, kind) for kind in kinds])


def backward_plans(call: RecurrenceCall, part: PassPart, machine: Machine) -> list[PassPlan]:
    """Return the plans of the backward, which reads the states before chunks that the forward kept."""
    return _ranked(call, part, machine, [_BackwardPlanner(call, part, machine, "apart")])


def _ranked(call: RecurrenceCall, part: PassPart, machine: Machine, planners: list[_PassPlanner]) -> list[PassPlan]:
    """Return the plans of all planners, chunks of `KERNELS` rows first, then by time; raise MachineError for none."""
    all_plans = [plan for planner in planners for plan in planner.plans()]
    if not all_plans:
        raise MachineError(
            f"no chunk of `{call.name}` with a state {part.form.state} in {call.shape.dtype} fits the registers and "
            f"shared memory of {machine.name}"
        )
    return sorted(
        all_plans, key=lambda plan: (plan.chunk != KERNELS, plan.ms, plan.segments, plan.chunk, -plan.columns)
    )


@dataclass(frozen=True)
class _PassPlanner(ABC):
    """Makes the plans of one kind for a pass."""

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
            kernels = tuple(run(self.machine, self.call.shape.dtype, task) for task in tasks)
            yield PassPlan(self.kind, chunk, segments, columns, kernels, self._work(chunk), self._states(chunk))

    def _segments(self, chunk: int, columns: int) -> int:
        """Return the number of segments that the executor uses: as many as the machine can run at once."""
        form = self.part.form
        programs = self.call.shape.lanes * ceil(form.columns / columns) * ceil(form.rows / self._rows(columns))
        return fitting_segments(programs, self.chunks(chunk), self.machine.sms)

    def chunks(self, chunk: int) -> int:
        """Return the number of chunks of a sequence."""
        return self.part.form.kind.chunks(self.call.shape.n_q, chunk)

    @abstractmethod
    def _tasks(self, chunk: int, columns: int, segments: int) -> list[Task]: ...

    def _work(self, chunk: int) -> Chunk:
        return forward(self.part.form, chunk, least=LEAST)

    def _fits(self, chunk: int, columns: int) -> bool:
        """Whether the largest program fits on an SM."""
        form, machine = self.part.form, self.machine
        if form.kind.is_corrected and 8 * chunk * chunk > machine["shared_kib"] * 1024:
            return False  # a triangle and its inverse, in fp32
        return self._programs_on_sm(chunk, columns) >= 1

    def _programs_on_sm(self, chunk: int, columns: int) -> int:
        """Return the number of walking programs that fit on an SM."""
        form = self.part.form
        sides = 3 if form.kind.is_corrected else 2
        rows = min(chunk, 64) if self.kind == "apart" else chunk
        held = self._rows(columns) * columns
        shared = rows * (sides * form.rows + columns) * self.number
        if self.kind == "walk":
            held += chunk * chunk + chunk * columns
            shared += chunk * chunk * self.number
        return 0 if held > 2 * ACCUMULATED else max(fitting(self.machine, held, shared), 0)

    def _rows(self, columns: int) -> int:
        """Return the rows of a state that a program holds: all rows if it walks or a correction reads them."""
        form = self.part.form
        may_split = not form.kind.is_corrected and self.kind == "apart"
        return min(form.rows, max(ACCUMULATED // columns // 2, 16)) if may_split else form.rows

    @property
    def number(self) -> int:
        """Bytes of an element of the call's dtype."""
        return 4 if self.call.shape.dtype == "float32" else 2

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _states(self, chunk: int) -> int:
        """Return the bytes of the states before all chunks."""
        return self.call.shape.lanes * self.chunks(chunk) * self.part.form.entries * STATE_BYTES

    def _vector_bytes(self, width: int) -> int:
        """Return the bytes of a vector of `width` elements for every row of every chunk."""
        return self.call.shape.lanes * self.call.shape.n_q * self.part.form.micro * width * self.number

    @property
    def results(self) -> int:
        """The bytes of the tensors that the pass computes."""
        return self.call.size(self.part.reads)

    @property
    def written(self) -> int:
        """The bytes of corrected keys and values, which are computed before the states are known."""
        form = self.part.form
        return self._vector_bytes(form.rows + form.columns) if form.kind.is_corrected else 0

    def _sides(self, chunk: int) -> int:
        """Return the bytes of readers and writers, decayed to the edges of their chunks, and of their pairs."""
        form = self.part.form
        readers = form.reads + form.kind.is_corrected
        return self._vector_bytes(form.rows * (readers + form.writers) + chunk * readers * form.writers)

    # --- kernels -----------------------------------------------------------------------------------------------------

    def _walking_task(
        self, name: str, chunk: int, columns: int, segments: int, work: Amount, moved: int, links: int
    ) -> Task:
        """Return the task of a kernel that walks over the chunks."""
        form, shape = self.part.form, self.call.shape
        rows = ceil(form.rows / self._rows(columns))
        programs = shape.lanes * segments * ceil(form.columns / columns) * rows
        count, steps = self.chunks(chunk), ceil(self.chunks(chunk) / segments)
        beside = min(self._programs_on_sm(chunk, columns), max(ceil(programs / self.machine.sms), 1))
        return Task(name, moved, work * (count * shape.lanes), programs, steps, links, beside)

    def _parallel_task(self, name: str, chunk: int, work: Amount, moved: int, columns: int | None = None) -> Task:
        """Return the task of a kernel for all chunks at once.

        With `columns`, a program computes that many columns and repeats the work that all columns share.
        """
        blocks = 1 if columns is None else ceil(self.part.form.columns / columns)
        times = self.chunks(chunk) * self.call.shape.lanes
        return Task(name, moved, work * times, times * blocks)

    def _preparing_task(self, chunk: int, work: Amount) -> Task:
        """Return the task of all chunks before states are known: decays, pairs, and the triangles of corrections."""
        name = "triangles" if self.part.form.kind.is_corrected else "decays and pairs"
        moved = self.call.size(self.part.sources) + self._sides(chunk) + self.written
        return self._parallel_task(name, chunk, work, moved)

    def _joining_tasks(
        self, chunk: int, columns: int, segments: int, keys: int, serial: Amount, links: int
    ) -> list[Task]:
        """Return the additional tasks of several segments: a walk from empty states, and the joining of segments."""
        form, lanes = self.part.form, self.call.shape.lanes
        if segments == 1:
            return []
        ends = lanes * segments * form.entries * 4
        widening = 1 + form.rows / form.columns if form.kind.is_corrected else 1.0
        walk = self._walking_task("segments", chunk, columns, segments, serial * widening, keys, links)
        matrix_entries = form.rows * form.rows if form.kind.is_corrected else 0
        ends += lanes * segments * matrix_entries * 4
        joining = Amount(exact=2.0 * matrix_entries * form.columns * segments * lanes)
        programs = lanes * ceil(form.columns / columns)
        segment_walk = Task(
            walk.name, walk.moved + ends, walk.work, ceil(walk.programs * widening), walk.steps, links, walk.beside
        )
        return [segment_walk, Task("segments joined", 2 * ends, joining, programs, segments, 1)]


@dataclass(frozen=True)
class _ForwardPlanner(_PassPlanner):
    """Makes the plans of the forward."""

    def _tasks(self, chunk: int, columns: int, segments: int) -> list[Task]:
        part, call, form = self.part, self.call, self.part.form
        work = self._work(chunk)
        if self.kind == "walk" and segments == 1 and form.kind.can_fuse:
            return self._fused_tasks(chunk, columns, work)
        corrected_bytes = self._vector_bytes(form.columns) if form.kind.is_corrected else 0
        values = 0 if form.kind.is_delta else call.size(part.values)
        tasks = [self._preparing_task(chunk, work.local)]
        links = 2 if form.kind.is_corrected else 1
        keys = self._vector_bytes(form.rows * form.writers) + values + self.written
        tasks += self._joining_tasks(chunk, columns, segments, keys, work.serial, links)
        query_bytes = self._vector_bytes(form.reads * (form.rows + chunk * form.writers))
        if self.kind == "walk":
            walk_work, moved = work.serial + work.output, keys + query_bytes + self.results
            return [*tasks, self._walking_task("outputs", chunk, columns, segments, walk_work, moved, links + 2)]
        states = self._states(chunk)
        tasks.append(
            self._walking_task("states", chunk, columns, segments, work.serial, keys + corrected_bytes + states, links)
        )
        moved = query_bytes + values + corrected_bytes + states + self.results
        return [*tasks, self._parallel_task("outputs", chunk, work.output, moved, form.columns)]

    def _fused_tasks(self, chunk: int, columns: int, work: Chunk) -> list[Task]:
        """Return the tasks of one walk that reads inputs directly, with the weights of pairs computed before it."""
        part, call, form = self.part, self.call, self.part.form
        decay_work = decays(form, chunk)
        pairs = Amount(work.local.products) * ceil(form.columns / columns)
        moved = call.size(part.queries | part.keys | part.values) + self.results
        weights = self._vector_bytes(chunk) if form.kind.has_weights else 0
        walk = self._walking_task("outputs", chunk, columns, 1, work.serial + work.output + pairs, moved + weights, 3)
        if not form.kind.has_weights:
            return [walk]
        return [self._parallel_task("weights", chunk, decay_work, call.size(part.gates) + weights), walk]


@dataclass(frozen=True)
class _BackwardPlanner(_PassPlanner):
    """Makes the plans of the backward."""

    def _work(self, chunk: int) -> Chunk:
        return backward(self.part.form, chunk, least=LEAST)

    def _tasks(self, chunk: int, columns: int, segments: int) -> list[Task]:
        part, call, form = self.part, self.call, self.part.form
        work = self._work(chunk)
        states, source_bytes = self._states(chunk), call.size(part.sources)
        corrected_bytes, links = (self._vector_bytes(form.columns), 2) if form.kind.is_corrected else (0, 1)
        tasks = [self._preparing_task(chunk, work.local)]
        keys = self._vector_bytes(form.rows * form.reads) + self.results + self.written
        tasks += self._joining_tasks(chunk, columns, segments, keys, work.serial, links)
        tasks.append(
            self._walking_task(
                "adjoints of states", chunk, columns, segments, work.serial, keys + corrected_bytes + states, links
            )
        )
        gradients = source_bytes  # gradients are as large as their tensors
        moved = source_bytes + gradients + self.results + 2 * states + 2 * corrected_bytes + self._sides(chunk)
        return [*tasks, self._parallel_task("gradients", chunk, work.output, moved)]


def _slices(form: PassForm) -> list[int]:
    """Return the numbers of columns of a program to try, without those that leave columns idle."""
    return [width for width in SLICES if width <= max(form.columns, SLICES[0])]
