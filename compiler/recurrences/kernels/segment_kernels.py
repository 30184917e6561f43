"""The kernels of a call whose lanes are split into segments: what a segment makes of any state, and the states between.

Over the chunks of a segment S′ = M S + N. A first walk finds N, from an empty state, and M, for all segments at once.
The states between segments follow from these, S_s+1 = M_s S_s + N_s, and then the walk that stores states before chunks
starts at all of them at once. With a decay alone M is the product of what is left of each row and column; with a
correction it is a matrix, found by the same walk from the identity in place of a state, with nothing written. Backward
the adjoint of the state before a segment is that of the one after it times Mᵀ, and so the walk from the identity gives
Mᵀ.

A matrix M may be large where states are small: where steps of a correction let states grow, but those that are there
are not in their way. What it is then multiplied with has lost its digits, or it is no number any more. A lane that has
such an M (entries above `GROWN`; keys of length 1 with β from 0 to 2, which let no state grow, have none above 1) is
walked whole by the program of its first segment, as if it were not split.

The cost: a walk more, of all segments but one at once, with as many columns more as the state has rows where there is a
correction; two segments are therefore no faster than one. With a decay alone the second walk could be spared by adding
what is left of S_s to the states before chunks; but that reads and writes all of them once more: of heads of 128 in
chunks of 64, 128 KiB a chunk, where a walk reads 32 KiB of keys and values in 16 bits.
"""

from __future__ import annotations

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame
from attnc.compiler.recurrences.kernels.state_walk import AdjointWalk, StateWalk, Walk

GROWN = 2.0
"""Maximum magnitude of the entries of M."""


class FirstWalk(Walk):
    """N of a segment, and M: beside N in columns of its own, or as factors for its rows and columns.

    All programs of a segment store the same factors for its rows.
    """

    is_first = True

    @property
    def width(self) -> int:
        """The number of columns of N, and of M beside it."""
        return self.problem.segment_width

    @property
    def where_there(self) -> str:
        """Columns of M are of no value."""
        return f", mask=(column < {self.problem.wv})[None, :], other=0.0" if self.problem.form.is_corrected else ""

    def start(self) -> None:
        """Nothing, and the identity."""
        p, form = self.problem, self.problem.form
        if form.is_corrected:
            self.add(f"state = tl.where(channel[:, None] + {p.wv} == column[None, :], 1.0, 0.0)")
            return
        self.add(f"state = tl.zeros(({p.wk}, {self.columns}), tl.float32)")
        if form.has_total:
            shape = f"({p.wk},)" if form.gate == "rows" else "()"
            self.add(f"left = tl.full({shape}, 1.0, tl.float32)")
        if form.columns:
            self.add(f"left_columns = tl.full(({self.columns},), 1.0, tl.float32)")

    def decay(self) -> None:
        """The state times what is left of it after the chunk, and the products of that."""
        form = self.problem.form
        super().decay()
        if form.is_corrected:
            return
        if form.has_total:
            self.add(f"left = left * {'total_rows' if form.gate == 'rows' else 'total_chunk'}")
        if form.columns:
            self.add("left_columns = left_columns * column_left")

    def keep(self, name: str, value: str, column: str) -> None:
        """Nothing: what is solved for depends on the state."""

    def keep_state(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Store N and M."""
        form = self.problem.form
        at_segment(self)
        self.add(f"tl.store({segment_tile(self, 'channel', 'column')}, state)")
        if form.is_corrected:
            return
        if form.has_total:
            self.add(f"tl.store({segment_factors(self, 'total')}, left)")
        if form.columns:
            self.add(f"tl.store({segment_factors(self, 'total_columns')}, left_columns)")


class SegmentStates(FirstWalk, StateWalk):
    """The states of all segments but a sequence's last."""

    stage = "segments"
    makes = "What segments make of states"

    def stand(self) -> None:
        """Emit the program's batch entry, head and segment."""
        self.add("lane = tl.program_id(0) // (segments - 1)", "segment = tl.program_id(0) % (segments - 1)")


class SegmentAdjoints(FirstWalk, AdjointWalk):
    """The adjoints of all segments but a sequence's first."""

    stage = "adjoint_segments"
    makes = "What segments make of adjoints of states"

    def stand(self) -> None:
        """Emit the program's batch entry, head and segment."""
        self.add("lane = tl.program_id(0) // (segments - 1)", "segment = tl.program_id(0) % (segments - 1) + 1")


class SegmentJoin(RecurrenceFrame):
    """The states between segments, one after another, with a decay alone: a program does a lane, a block of columns."""

    stage = "joined"
    makes = "States between segments"

    def write(self) -> None:
        """All lines."""
        p = self.problem
        self.number("segments", "span")
        self.add("lane = tl.program_id(0)")
        self.block_columns("channel", p.wk, p.wk)
        self.block_columns("column", p.wv, self.columns, "tl.program_id(1)")
        self.walk()

    def walk(self) -> None:
        """From the first segment to the one before the last."""
        self.add("at = lane * tl.full((), 1, tl.int64) * chunks")
        self.add(f"state = tl.load({self.states('states', 'channel', 'column')})")
        with self.lines.block("for segment in range(0, segments - 1):"):
            at_segment(self)
            self.pass_segment()
            self.add("at = lane * tl.full((), 1, tl.int64) * chunks + (segment + 1) * span")
            self.add(f"tl.store({self.states('states', 'channel', 'column')}, state)")

    def pass_segment(self) -> None:
        """M S + N."""
        form = self.problem.form
        if form.has_total:
            self.add(f"left = tl.load({segment_factors(self, 'total')})")
            self.add(f"state = state * {'left[:, None]' if form.gate == 'rows' else 'left'}")
        if form.columns:
            self.add(f"state = state * tl.load({segment_factors(self, 'total_columns')})[None, :]")
        self.add(f"state = state + tl.load({segment_tile(self, 'channel', 'column')})")


class SegmentProduct(SegmentJoin):
    """States between segments with a correction, M a matrix; its products with the state are exact to fp32."""

    stage = "multiplied"

    def walk(self) -> None:
        """As without a correction; stored is whether the lane has an M that is too large."""
        self.add("grown = tl.full((), 0, tl.int32)")
        super().walk()
        self.pointers["whole"] = KernelArgument("whole", "*i32")
        self.add("tl.store(whole + lane, grown)")

    def pass_segment(self) -> None:
        """M S + N, block of M's columns by block: there the state's rows are picked out of it."""
        p, block = self.problem, self.rows
        self.add(f"found = tl.load({segment_tile(self, 'channel', 'column')})")
        self.add(f"parts = tl.reshape(state, ({p.wk // block}, {block}, {self.columns}))")
        with self.lines.block(self.blocks("inner", p.wk, block)):
            self.block_columns("inner", p.wk, block, "inner_block")
            self.add(
                f"own = tl.arange(0, {p.wk // block})[:, None, None] == inner_block",
                "part = tl.sum(tl.where(own, parts, 0.0), 0)",
                f"maps = tl.load({segment_tile(self, 'channel', f'(inner + {p.wv})')})",
                f"grown += tl.sum(tl.sum(tl.where(tl.abs(maps) <= {GROWN}, 0, 1), 1), 0)",
                f"found = tl.dot(maps, part, found{p.exact_precision})",
            )
        self.add("state = found")


class AdjointJoin(SegmentJoin):
    """Adjoints between segments, from the last segment to the second."""

    stage = "adjoints_joined"
    makes = "Adjoints of the states between segments"

    def walk(self) -> None:
        """From the last segment to the second."""
        self.add("at = (lane * tl.full((), 1, tl.int64) + 1) * chunks - 1")
        self.add(f"state = tl.load({self.states('ends', 'channel', 'column', 1)})")
        with self.lines.block("for turn in range(1, segments):"):
            self.add("segment = segments - turn")
            at_segment(self)
            self.pass_segment()
            self.add("at = lane * tl.full((), 1, tl.int64) * chunks + segment * span")
            self.add(f"tl.store({self.states('ends', 'channel', 'column')}, state)")


class AdjointProduct(SegmentProduct, AdjointJoin):
    """Adjoints between segments with a correction."""

    stage = "adjoints_multiplied"


def at_segment(frame: RecurrenceFrame) -> None:
    """Where the segment stands in scratch."""
    frame.add("at_segment = lane * tl.full((), 1, tl.int64) * segments + segment")


def segment_tile(frame: RecurrenceFrame, row: str, column: str) -> str:
    """The addresses of a tile of what a segment makes, N and M beside it."""
    p = frame.problem
    frame.pointers["segment_states"] = KernelArgument("segment_states", "*fp32")
    at = f"at_segment * {p.wk * p.segment_width}"
    return f"segment_states + {at} + ({row}[:, None] * {p.segment_width} + {column}[None, :])"


def segment_factors(frame: RecurrenceFrame, of: str) -> str:
    """The addresses of what is left of the state after a segment: of its rows or all of it, of its columns."""
    p, name = frame.problem, f"segment_{of}"
    frame.pointers[name] = KernelArgument(name, "*fp32")
    if of == "total_columns":
        return f"{name} + at_segment * {p.wv} + column"
    return f"{name} + at_segment * {p.wk} + channel" if p.form.gate == "rows" else f"{name} + at_segment"
