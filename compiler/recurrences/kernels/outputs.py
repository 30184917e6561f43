"""The kernel that computes outputs from the states before chunks and from values within them."""

from __future__ import annotations

from attnc.compiler.recurrences.kernels.decay_text import AT_LEVEL, DecaySweep, load_segments
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame


class Outputs(RecurrenceFrame):
    """Outputs of stored states: a program computes a chunk and a block of columns."""

    stage = "outputs"
    makes = "Outputs"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p, form = self.problem, self.problem.form
        self.emit_chunk()
        self.block_columns("column", p.wv, self.columns, "tl.program_id(1)")
        self.add(f"found = tl.zeros(({p.length}, {self.columns}), tl.float32)")
        self.over_channels(self._read)
        if "v" in form.values:
            self.emit_address("v")
            self.load("v_values", "v", "column")
        if form.columns:
            self._levels()
        else:
            for w, value in enumerate(form.values):
                if value == "p":
                    self.add(f"p_values = tl.load({self.scratch_tile('p', 'column', p.wv)})")
                self.add(f"{value}_pairs = tl.load({self.matrix(form.pair_name(0, w))})")
                self.add(f"found = {p.dot(f'{value}_pairs', f'{value}_values', 'found')}")
        self.emit_address("out")
        self.put("out", "column", p.rounded("found"))

    def _read(self) -> None:
        p = self.problem
        self.add(
            f"reads = tl.load({self.scratch_tile('q_in', 'channel', p.wk)})",
            f"state = tl.load({self.states('states', 'channel', 'column')})",
            f"found = {p.dot('reads', p.rounded('state'), 'found')}",
        )

    def _levels(self) -> None:
        """Emit pairs under column decay: a pair's weight differs by column and is split between value and output."""
        p, form = self.problem, self.problem.form
        load_segments(self)
        self.emit_address("gate_columns")
        self.load("gates", "gate_columns", "column")
        self.add(f"pairs = tl.load({self.matrix(form.pair_name(0, 0))})")
        self.add(f"within = tl.zeros(({p.length}, {self.columns}), tl.float32)")
        sweep = DecaySweep(self, "gates", self.columns, not form.before, form.before)
        with sweep.levels():
            rises, fall = sweep.factors()
            self.add(f"down = {p.rounded(f'(v_values * {fall})')}")
            near = f"tl.where({AT_LEVEL}, pairs, 0.0).to(pairs.dtype)"
            self.add(f"within += {p.dot(near, 'down')} * {rises[form.before]}")
        into = sweep.edges([form.before]).into[form.before]
        self.add(f"found = found * {into} + within")
        if not form.before:
            self.add("own_weight = tl.sum(tl.where(row[:, None] == row[None, :], pairs.to(tl.float32), 0.0), 1)")
            self.add("found += own_weight[:, None] * v_values")
