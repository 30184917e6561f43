"""Kernels of column decay at a chunk's edges: values decayed to its end, output gradients decayed from its start."""

from __future__ import annotations

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.decay_text import DecaySweep, load_segments
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame


class ColumnEdges(RecurrenceFrame):
    """Values decayed to the ends of chunks: a program computes a chunk and a block of columns."""

    stage = "columns"
    makes = "Values at the ends of chunks, and what is left of columns after them"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p, form = self.problem, self.problem.form
        self.emit_chunk()
        load_segments(self)
        self.block_columns("column", p.wv, self.columns, "tl.program_id(1)")
        for name in ("gate_columns", self.read):
            self.emit_address(name)
        self.load("gates", "gate_columns", "column")
        self.load("x", self.read, "column")
        sweep = DecaySweep(self, "gates", self.columns, not form.before, form.before)
        with sweep.levels():
            pass
        edges = sweep.edges([form.before])
        self.store(edges.into[form.before], edges.out_of, edges.total)

    read = "v"

    def store(self, into: str, out_of: str, total: str) -> None:
        """Emit the stores of the results."""
        p = self.problem
        self.pointers["total_columns"] = KernelArgument("total_columns", "*fp32")
        self.add(f"tl.store({self.scratch_tile('v_out', 'column', p.wv)}, {p.rounded(f'(x * {out_of})')})")
        self.add(f"tl.store(total_columns + at * {p.wv} + column, {total})")


class ColumnReads(ColumnEdges):
    """Output gradients decayed from the starts of chunks."""

    stage = "column_reads"
    makes = "Gradients of outputs at the starts of chunks"
    read = "dout"

    def store(self, into: str, out_of: str, total: str) -> None:
        """Emit the stores of the results."""
        p = self.problem
        self.add(f"tl.store({self.scratch_tile('dout_in', 'column', p.wv)}, {p.rounded(f'(x * {into})')})")
