"""The kernel for few tokens: one after another, with the state on the chip from the first to the last."""

from __future__ import annotations

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.recurrence_frame import OF_COLUMNS, RecurrenceFrame


class StepKernel(RecurrenceFrame):
    """A program computes all tokens of a head, for a block of state columns, in fp32 and without tile products."""

    stage = "step"
    makes = "Outputs and the state after them, token by token"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p, form = self.problem, self.problem.form
        self.add("lane = tl.program_id(0)", f"channel = tl.arange(0, {p.wk})")
        self.block_columns("column", p.wv, self.columns, "tl.program_id(1)")
        self.add(
            f"inside = {self._inside('channel', p.dk, p.wk)}[:, None] & {self._inside('column', p.dv, p.wv)}[None, :]"
        )
        where = f"(lane * tl.full((), {p.dk * p.dv}, tl.int64) + channel[:, None] * {p.dv} + column[None, :])"
        for name in ("begun", "last"):
            self.pointers[name] = KernelArgument(name, "*fp32")
        self.add(f"state = tl.load(begun + {where}, mask=inside, other=0.0)")
        self._addresses()
        if form.gate == "constant":
            self.pointers["gate"] = KernelArgument("gate", "*fp32")
            self.add("keep = tl.exp(tl.load(gate + lane % heads))")
        with self.lines.block("for token in range(0, tokens):"):
            if form.resets:
                self.pointers["resets"] = KernelArgument("resets", "*i32")
                fresh = "tl.load(resets + (lane // heads) * tl.full((), 1, tl.int64) * tokens + token)"
                self.add(f"state = tl.where({fresh} != 0, 0.0, state)")
            if form.before:
                self._read()
            for i in range(form.micro):
                self._micro(i)
            if not form.before:
                self._read()
        self.add(f"tl.store(last + {where}, state, mask=inside)")

    def _inside(self, column: str, real: int, width: int) -> str:
        """Return the mask of the columns that exist."""
        return f"({column} < {real if real < width else width})"

    def _addresses(self) -> None:
        form = self.problem.form
        rows = ["v", *form.inputs, "out"]
        rows += ["gate_rows"] * (form.gate == "rows") + ["gate_columns"] * form.columns
        steps = ["gate"] * (form.gate == "scalar") + ["beta"] * form.is_delta
        for name in rows:
            unit = self._declared(name)
            lane = f"(lane // heads) * {name}_batch + (lane % heads) * {name}_head"
            self.add(f"{name}_at = {name} + ({lane}) * {unit}")
        for name in steps:
            self._declared(name)
            self.add(f"{name}_at = {name} + (lane // heads) * {name}_0 + (lane % heads) * {name}_1")

    def _row(self, name: str, step: str) -> str:
        """Return the text that loads a row of a token or a step, in fp32."""
        column = "column" if name in OF_COLUMNS else "channel"
        unit = self._declared(name)
        mask = self._inside(column, *self._widths(name))
        stride = f"({name}_token * {unit}) * {step}.to(tl.int64)"
        return f"tl.load({name}_at + {stride} + {column}, mask={mask}, other=0.0).to(tl.float32)"

    def _read(self) -> None:
        p = self.problem
        self.add("asked = token + 0")
        self.add(f"q_row = {self._row('q', 'asked')}", "found = tl.sum(q_row[:, None] * state, 0)")
        at = f"out_at + (out_token * {self._declared('out')}) * asked.to(tl.int64) + column"
        self.add(f"tl.store({at}, {p.rounded('found')}, mask={self._inside('column', p.dv, p.wv)})")

    def _micro(self, number: int) -> None:
        """Emit one micro-step of a token."""
        form = self.problem.form
        self.add(f"step = token * {form.micro} + {number}")
        self.add(f"k_row, v_row = {self._row('k', 'step')}, {self._row('v', 'step')}")
        if form.correction == "old":
            self._correct()
        self._decay()
        if form.is_corrected and form.correction != "old":
            self._correct()
        if form.is_delta:
            self.add("v_row = tl.load(beta_at + step * beta_2) * (v_row - corrected)")
        elif form.is_rank_one:
            self.add(f"state += {self._row('left', 'step')}[:, None] * corrected[None, :]")
        self.add("state += k_row[:, None] * v_row[None, :]")

    def _correct(self) -> None:
        """Emit the correction's read of the state."""
        form = self.problem.form
        row = "k_row" if form.readers[1] == "k" else self._row(form.readers[1], "step")
        self.add(f"corrected = tl.sum({row}[:, None] * state, 0)")

    def _decay(self) -> None:
        form = self.problem.form
        if form.gate == "constant":
            self.add("state = state * keep")
        elif form.gate == "scalar":
            self.add("state = state * tl.exp(tl.load(gate_at + step * gate_2))")
        elif form.gate == "rows":
            self.add(f"state = state * tl.exp({self._row('gate_rows', 'step')})[:, None]")
        if form.columns:
            self.add(f"state = state * tl.exp({self._row('gate_columns', 'step')})[None, :]")
