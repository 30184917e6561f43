"""The serial kernels: states from chunk to chunk, and their adjoints from the last chunk to the first."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame


class Walk(RecurrenceFrame):
    """The base of serial kernels: a program walks the chunks of a segment of a head, for a block of state columns.

    A segment has `span` chunks, the last segment of a head the remainder; a head that is not split is one segment.
    """

    turns: ClassVar[str]
    """The head of the loop over chunks."""
    is_first: ClassVar[bool] = False
    """Whether segments are walked before the states that they start from are known."""

    @property
    def width(self) -> int:
        """The number of columns that programs walk with."""
        return self.problem.wv

    @property
    def column_mask(self) -> str:
        """The mask arguments of a scratch load along columns; empty if all columns exist."""
        return ""

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p = self.problem
        self.number("segments", "span")
        self.emit_segment()
        self.add("begin = segment * span", "stop = tl.minimum(begin + span, chunks)")
        if p.form.is_corrected and not self.is_first:
            self.pointers["whole"] = KernelArgument("whole", "*i32")
            self.add(
                "is_whole = tl.load(whole + lane, mask=segments > 1, other=0) != 0  # the first segment has all chunks",
                "begin = tl.where(is_whole, 0, begin)",
                "stop = tl.where(is_whole, tl.where(segment == 0, chunks, 0), stop)",
            )
        self.emit_rows()
        self.block_columns("channel", p.wk, p.wk)
        self.block_columns("column", self.width, self.columns, "tl.program_id(1)")
        self.start()
        with self.lines.block(self.turns):
            self.turn()
        self.end()

    def emit_segment(self) -> None:
        """Emit the program's batch entry, head and segment."""
        self.add("lane = tl.program_id(0) // segments", "segment = tl.program_id(0) % segments")

    @abstractmethod
    def start(self) -> None:
        """Emit the state that the walk starts from."""

    @abstractmethod
    def turn(self) -> None:
        """Emit the work on one chunk."""

    def keep(self, name: str, value: str, column: str) -> None:
        """Emit the store of a result for the chunk's rows."""
        self.add(f"tl.store({self.scratch_tile(name, column, self.problem.wv)}, {value})")

    @abstractmethod
    def keep_state(self) -> None:
        """Emit the store of the state at the chunk's edge, except at segment borders, where it is stored already."""

    def end(self) -> None:
        """Emit the lines after the last chunk."""

    def decay(self) -> None:
        """Emit the decay of the state over the chunk."""
        total = self.load_total("channel")
        if total:
            self.add(f"state = state * {total}")
        if self.problem.form.columns:
            self.pointers["total_columns"] = KernelArgument("total_columns", "*fp32")
            self.add(f"column_left = tl.load(total_columns + at * {self.problem.wv} + column)")
            self.add("state = state * column_left[None, :]")


class StateWalk(Walk):
    """The forward walk: the states before chunks, and the values that corrections solve for."""

    stage = "states"
    makes = "States before chunks"
    turns = "for chunk in range(begin, stop):"

    def start(self) -> None:
        """Emit the load of the state before the segment."""
        self.add("at = lane * tl.full((), 1, tl.int64) * chunks + begin")
        self.add(f"state = tl.load({self.states('states', 'channel', 'column')})")

    def turn(self) -> None:
        """Emit the work on one chunk."""
        p, form = self.problem, self.problem.form
        self.emit_steps()
        if not form.is_corrected:
            self.values()
        else:
            self._solve()
        for writer, value in zip(form.writers, form.values, strict=True):
            self.add(f"{writer}_rows = tl.load({self.scratch_tile(f'{writer}_out', 'channel', p.wk)})")
            if form.is_rank_one and value == "v":
                self.values()
        self.read()
        self.decay()
        for writer, value in zip(form.writers, form.values, strict=True):
            self.add(f"state = {p.dot(f'tl.trans({writer}_rows)', f'{value}_values', 'state')}")
        self.keep_state()

    def keep_state(self) -> None:
        """Emit the store of the state after the chunk; where the next segment starts it is stored already."""
        is_stored = "(chunk + 1 < stop) | (stop == chunks)"
        self.add(f"tl.store({self.states('states', 'channel', 'column', 1)}, state, mask={is_stored})")

    def read(self) -> None:
        """Emit reads of the state before the chunk: none, as another kernel reads for all chunks at once."""

    def values(self) -> None:
        """Emit the load of the values that the chunk's rows write."""
        if self.problem.form.columns:
            self.add(f"v_values = tl.load({self.scratch_tile('v_out', 'column', self.problem.wv)})")
        else:
            self.emit_address("v")
            self.load("v_values", "v", "column", self.width)

    def _solve(self) -> None:
        p = self.problem
        solved = f"{self.scratch_tile('solved_values', 'column', p.wv)}{self.column_mask}"
        self.add(
            f"reads = tl.load({self.scratch_tile('solved_reads', 'channel', p.wk)})",
            f"solved = tl.load({solved}).to(tl.float32)",
            f"p_values = {p.rounded('(' + p.dot('reads', p.rounded('state'), 'solved') + ')')}",
        )
        self.keep("p", "p_values", "column")


class AdjointWalk(Walk):
    """The backward walk: the adjoint of the state before each chunk, and of the chunk's solved values.

    ∂p = A_q,writerᵀ ∂o + writer_out ∂S′        ∂S = total ⊙ ∂S′ + q_inᵀ ∂o + Wᵀ ∂p
    """

    stage = "adjoints"
    makes = "Adjoints of the states before chunks"
    turns = "for turn in range(begin, stop):"

    def start(self) -> None:
        """Emit the load of the adjoint of the state after the segment."""
        self.add("at = lane * tl.full((), 1, tl.int64) * chunks + stop - 1")
        self.add(f"state = tl.load({self.states('ends', 'channel', 'column', 1)})")

    def turn(self) -> None:
        """Emit the work on one chunk."""
        p, form = self.problem, self.problem.form
        self.add("chunk = begin + stop - 1 - turn")
        self.emit_steps()
        if form.columns:
            self.add(f"douts = tl.load({self.scratch_tile('dout_in', 'column', p.wv)})")
        else:
            self.emit_address("dout")
            self.load("douts", "dout", "column", self.width)
        if form.is_corrected:
            self._solve()
        self.add(f"q_rows = tl.load({self.scratch_tile('q_in', 'channel', p.wk)})")
        self.decay()
        self.add(f"state = {p.dot('tl.trans(q_rows)', 'douts', 'state')}")
        if form.is_corrected:
            self.add(f"state = {p.dot('tl.trans(reads)', 'dp_values', 'state')}")
        self.keep_state()

    def keep_state(self) -> None:
        """Emit the store of the adjoint before the chunk; where the previous segment ends it is stored already."""
        is_stored = "(chunk > begin) | (begin == 0)"
        self.add(f"tl.store({self.states('ends', 'channel', 'column')}, state, mask={is_stored})")

    def _solve(self) -> None:
        p, form = self.problem, self.problem.form
        writer = form.writers[-1]
        self.add(
            f"{writer}_rows = tl.load({self.scratch_tile(f'{writer}_out', 'channel', p.wk)})",
            f"pairs = tl.load({self.matrix(form.pair_name(0, len(form.writers) - 1))})",
            f"solved = {p.dot('tl.trans(pairs)', 'douts')}",
            f"dp_values = {p.rounded('(' + p.dot(f'{writer}_rows', p.rounded('state'), 'solved') + ')')}",
        )
        self.keep("dp", "dp_values", "column")
        self.add(f"reads = tl.load({self.scratch_tile('solved_reads', 'channel', p.wk)})")
