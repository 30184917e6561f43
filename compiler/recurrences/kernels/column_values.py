"""The kernels that only column decay needs: rows decayed to a chunk's edges, gradients of pairs, of v and of gates.

A pair's weight differs between columns. At each level it is split between the value and the output, so that
∂A = Σ_level mask ⊙ (∂o ⊙ rise) (v ⊙ fall)ᵀ and ∂v = Σ_level fall ⊙ (mask ⊙ A)ᵀ (∂o ⊙ rise) + ∂v through the state.
"""

from __future__ import annotations

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.column_gradients import ColumnGradients
from attnc.compiler.recurrences.kernels.decay_text import (
    AT_LEVEL,
    CROSSED_AFTER,
    DecaySweep,
    crossed,
    crossed_at_level,
    load_segments,
)
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


class ColumnPairs(ColumnGradients):
    """Gradients of pairs: a program computes a chunk, one block of columns after another."""

    stage = "column_pairs"
    makes = "Gradients of pairs"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p, form = self.problem, self.problem.form
        self.emit_chunk()
        load_segments(self)
        for name in ("v", "dout", "gate_columns"):
            self.emit_address(name)
        self.begin_pairs()
        if not form.before:
            self.add(f"down_sum = tl.zeros(({p.length},), tl.float32)")
        self.over_columns(self._levels)
        if not form.before:
            own_pairs = "tl.where(row[:, None] == row[None, :], down_sum[:, None], 0.0)"
            self.add(f"{form.pair_name(0, 0)}_sum += {own_pairs}")
        self.store_pairs()

    def _levels(self) -> None:
        p, form = self.problem, self.problem.form
        self.load("douts", "dout", "column")
        self.load("v_values", "v", "column")
        self.load("gates", "gate_columns", "column")
        if not form.before:
            self.add("down_sum += tl.sum(douts.to(tl.float32) * v_values.to(tl.float32), 1)")
        sweep = DecaySweep(self, "gates", self.columns, not form.before, form.before)
        with sweep.levels():
            rises, fall = sweep.factors()
            self.add(
                f"up = {p.rounded(f'(douts * {rises[form.before]})')}",
                f"down = {p.rounded(f'(v_values * {fall})')}",
                f"{form.pair_name(0, 0)}_sum += tl.where({AT_LEVEL}, {p.dot('up', 'tl.trans(down)')}, 0.0)",
            )


class ColumnValues(ColumnGradients):
    """Gradients of v and the columns' gates: a program computes a chunk and a block of columns.

    Edges come first, then levels, to keep few registers alive.
    """

    stage = "column_values"
    makes = "Gradients of values and of columns' gates"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p, form = self.problem, self.problem.form
        self.emit_chunk()
        load_segments(self)
        self.block_columns("column", p.wv, self.columns, "tl.program_id(1)")
        for name in ("v", "dout", "dv", "gate_columns", "dgate_columns"):
            self.emit_address(name)
        self.load("gates", "gate_columns", "column")
        sweep = DecaySweep(self, "gates", self.columns, not form.before, form.before)
        with sweep.levels():
            pass
        self._edges(sweep)
        with sweep.levels():
            self._at_level(sweep)
        self.put("dgate_columns", "column", "dgates")
        self.put("dv", "column", p.rounded("dvs"))

    def _edges(self, sweep: DecaySweep) -> None:
        p, form = self.problem, self.problem.form
        edges = sweep.edges([form.before])
        size = f"({p.length}, {self.columns})"
        self.add(
            *(f"{name} = tl.zeros({size}, tl.float32)" for name in ("dvs", "reads")),
            f"kept_sum = tl.zeros(({self.columns},), tl.float32)",
        )
        self.add_products([("reads", "q_in", "states", 0), ("dvs", "k_out", "ends", 1)])
        self.load("douts", "dout", "column")
        self.load("v_values", "v", "column")
        self.add(
            f"dvs = dvs * {edges.out_of}",
            f"dgates = tl.dot({crossed(form.before)}, reads * {edges.into[form.before]} * douts{p.sum_precision})",
            f"dgates += tl.dot({CROSSED_AFTER}, dvs * v_values{p.sum_precision})",
            f"dgates += (kept_sum * {edges.total})[None, :]",
            f"pairs = tl.load({self.matrix(form.pair_name(0, 0))})",
        )
        if not form.before:
            own_weight = "tl.sum(tl.where(row[:, None] == row[None, :], pairs.to(tl.float32), 0.0), 1)"
            self.add(f"dvs += {own_weight}[:, None] * douts")

    def add_of_channels(self) -> None:
        """Emit the gradient of the columns' total decay; `state` holds the adjoint of the state after the chunk."""
        self.add(f"first_state = tl.load({self.states('states', 'channel', 'column')})")
        total = self.load_total("channel")
        product = f"first_state * state * {total}" if total else "first_state * state"
        self.add(f"kept_sum += tl.sum({product}, 0)")

    def _at_level(self, sweep: DecaySweep) -> None:
        p, form = self.problem, self.problem.form
        rises, fall = sweep.factors()
        self.add(
            f"up = {p.rounded(f'(douts * {rises[form.before]})')}",
            f"down = {p.rounded(f'(v_values * {fall})')}",
            f"near = tl.where({AT_LEVEL}, pairs, 0.0).to(pairs.dtype)",
            f"fallen = {p.dot('tl.trans(near)', 'up')}",
            f"dvs += fallen * {fall}",
            f"terms = {p.dot('near', 'down')} * up + fallen * down",
            f"dgates += tl.dot({crossed_at_level(self, form.before)}, terms{p.sum_precision})",
        )
