"""The kernels of a call whose sequences are split into segments: each segment as an affine map, and states between.

Over the chunks of a segment, S′ = M S + N. A first walk computes N, from an empty state, and M, for all segments at
once. The states between segments follow, S_s+1 = M_s S_s + N_s. Then the walk that stores the states before chunks runs
in all segments at once. With decay alone, M is the product of the decays of each row and column. With a correction, M
is a matrix, computed by the same walk from the identity instead of a state, without writes. In the backward pass the
adjoint of the state before a segment is Mᵀ times the adjoint after it, and the walk from the identity computes Mᵀ.

M may be large although states are small: the steps of a correction may let states grow in directions that the actual
states do not have. The product with M then loses its digits, or is not finite. A head with such an M (entries above
`GROWN`; unit keys with β from 0 to 2 let no state grow and give no entry above 1) is walked as a whole by the program
of its first segment, as if it were not split.

The cost is a second walk, over all segments but one at once, with a correction widened by as many columns as the state
has rows; so two segments are no faster than one. With decay alone, the second walk could be avoided by adding the
decayed S_s to the states before chunks. But that reads and writes all these states again: for heads of 128 in chunks of
64, 128 KiB per chunk, where a walk reads 32 KiB of 16-bit keys and values.
"""

from __future__ import annotations

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame
from attnc.compiler.recurrences.kernels.state_walk import AdjointWalk, StateWalk, Walk

GROWN = 2.0
"""Maximum magnitude of the entries of M."""


class FirstWalk(Walk):
    """The walk that computes N and M of a segment: M as further columns beside N, or as factors of rows and columns.

    All programs of a segment store the same factors of rows.
    """

    is_first = True

    @property
    def width(self) -> int:
        """The number of columns of N, plus those of M if it is a matrix."""
        return self.problem.segment_width

    @property
    def column_mask(self) -> str:
        """The mask arguments that leave out the columns of M, which have no values."""
        return f", mask=(column < {self.problem.wv})[None, :], other=0.0" if self.problem.form.is_corrected else ""

    def start(self) -> None:
        """Emit the initial state: zeros for N, the identity for M."""
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
        """Emit the decay of the state over the chunk, and the products of decays."""
        form = self.problem.form
        super().decay()
        if form.is_corrected:
            return
        if form.has_total:
            self.add(f"left = left * {'total_rows' if form.gate == 'rows' else 'total_chunk'}")
        if form.columns:
            self.add("left_columns = left_columns * column_left")

    def keep(self, name: str, value: str, column: str) -> None:
        """Store nothing, as solved values depend on the state."""

    def keep_state(self) -> None:
        """Store no state."""

    def end(self) -> None:
        """Emit the stores of N and M."""
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
    """The first forward walk, of all segments except a sequence's last."""

    stage = "segments"
    makes = "What segments make of states"

    def emit_segment(self) -> None:
        """Emit the program's batch entry, head and segment."""
        self.add("lane = tl.program_id(0) // (segments - 1)", "segment = tl.program_id(0) % (segments - 1)")


class SegmentAdjoints(FirstWalk, AdjointWalk):
    """The first backward walk, of all segments except a sequence's first."""

    stage = "adjoint_segments"
    makes = "What segments make of adjoints of states"

    def emit_segment(self) -> None:
        """Emit the program's batch entry, head and segment."""
        self.add("lane = tl.program_id(0) // (segments - 1)", "segment = tl.program_id(0) % (segments - 1) + 1")


class SegmentJoin(RecurrenceFrame):
    """The states between segments with decay alone: a program computes a head, for a block of columns."""

    stage = "joined"
    makes = "States between segments"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p = self.problem
        self.number("segments", "span")
        self.add("lane = tl.program_id(0)")
        self.block_columns("channel", p.wk, p.wk)
        self.block_columns("column", p.wv, self.columns, "tl.program_id(1)")
        self.walk()

    def walk(self) -> None:
        """Emit the loop from the first segment to the last but one."""
        self.add("at = lane * tl.full((), 1, tl.int64) * chunks")
        self.add(f"state = tl.load({self.states('states', 'channel', 'column')})")
        with self.lines.block("for segment in range(0, segments - 1):"):
            at_segment(self)
            self.pass_segment()
            self.add("at = lane * tl.full((), 1, tl.int64) * chunks + (segment + 1) * span")
            self.add(f"tl.store({self.states('states', 'channel', 'column')}, state)")

    def pass_segment(self) -> None:
        """Emit S ← M S + N."""
        form = self.problem.form
        if form.has_total:
            self.add(f"left = tl.load({segment_factors(self, 'total')})")
            self.add(f"state = state * {'left[:, None]' if form.gate == 'rows' else 'left'}")
        if form.columns:
            self.add(f"state = state * tl.load({segment_factors(self, 'total_columns')})[None, :]")
        self.add(f"state = state + tl.load({segment_tile(self, 'channel', 'column')})")


class SegmentProduct(SegmentJoin):
    """The states between segments with a correction: M is a matrix, and its products are exact to fp32."""

    stage = "multiplied"

    def walk(self) -> None:
        """Emit the loop over segments, and the store of whether the head has an M with too large entries."""
        self.add("grown = tl.full((), 0, tl.int32)")
        super().walk()
        self.pointers["whole"] = KernelArgument("whole", "*i32")
        self.add("tl.store(whole + lane, grown)")

    def pass_segment(self) -> None:
        """Emit S ← M S + N for one block of M's columns after another, with the matching rows of the state."""
        p, block = self.problem, self.rows
        self.add(f"found = tl.load({segment_tile(self, 'channel', 'column')})")
        self.add(f"parts = tl.reshape(state, ({p.wk // block}, {block}, {self.columns}))")
        with self.lines.block(f"for inner_block in range(0, {p.wk // block}):"):
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
    """The adjoints between segments with decay alone, from the last segment to the second."""

    stage = "adjoints_joined"
    makes = "Adjoints of the states between segments"

    def walk(self) -> None:
        """Emit the loop from the last segment to the second."""
        self.add("at = (lane * tl.full((), 1, tl.int64) + 1) * chunks - 1")
        self.add(f"state = tl.load({self.states('ends', 'channel', 'column', 1)})")
        with self.lines.block("for turn in range(1, segments):"):
            self.add("segment = segments - turn")
            at_segment(self)
            self.pass_segment()
            self.add("at = lane * tl.full((), 1, tl.int64) * chunks + segment * span")
            self.add(f"tl.store({self.states('ends', 'channel', 'column')}, state)")


class AdjointProduct(SegmentProduct, AdjointJoin):
    """The adjoints between segments with a correction."""

    stage = "adjoints_multiplied"


def at_segment(frame: RecurrenceFrame) -> None:
    """Emit the index of the segment in scratch."""
    frame.add("at_segment = lane * tl.full((), 1, tl.int64) * segments + segment")


def segment_tile(frame: RecurrenceFrame, row: str, column: str) -> str:
    """Return the addresses of a tile of a segment's N and M."""
    p = frame.problem
    frame.pointers["segment_states"] = KernelArgument("segment_states", "*fp32")
    at = f"at_segment * {p.wk * p.segment_width}"
    return f"segment_states + {at} + ({row}[:, None] * {p.segment_width} + {column}[None, :])"


def segment_factors(frame: RecurrenceFrame, of: str) -> str:
    """Return the addresses of a segment's decay factors: of rows or the whole state, or of columns."""
    p, name = frame.problem, f"segment_{of}"
    frame.pointers[name] = KernelArgument(name, "*fp32")
    if of == "total_columns":
        return f"{name} + at_segment * {p.wv} + column"
    return f"{name} + at_segment * {p.wk} + channel" if p.form.gate == "rows" else f"{name} + at_segment"
