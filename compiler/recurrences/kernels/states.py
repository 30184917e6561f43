"""The serial kernels: states from chunk to chunk, and their adjoints from the last chunk to the first."""

from __future__ import annotations

from attnc.compiler.kernels.source import Argument
from attnc.compiler.recurrences.kernels.frame import Frame


class States(Frame):
    """A program does all chunks of a lane, for a block of the state's columns."""

    stage = "states"
    makes = "States before chunks"

    def write(self) -> None:
        """All lines."""
        p, form = self.problem, self.problem.form
        self.add("lane = tl.program_id(0)", "chunk = 0")
        self.numbered()
        self.block_columns("channel", p.wk, p.wk)
        self.block_columns("column", p.wv, self.columns, "tl.program_id(1)")
        self.add("at = lane * tl.full((), 1, tl.int64) * chunks")
        self.add(f"state = tl.load({self.states('states', 'channel', 'column')})")
        with self.lines.block("for chunk in range(0, chunks):"):
            self.place()
            if not form.is_corrected:
                self._values()
            else:
                self._solve()
            for writer, value in zip(form.writers, form.values, strict=True):
                self.add(f"{writer}_rows = tl.load({self.kept(f'{writer}_out', 'channel', p.wk)})")
                if form.is_rank_one and value == "v":
                    self._values()
            self._advance()
            self.add(f"tl.store({self.states('states', 'channel', 'column', 1)}, state)")

    def _values(self) -> None:
        if self.problem.form.columns:
            self.add(f"v_values = tl.load({self.kept('v_out', 'column', self.problem.wv)})")
        else:
            self.given("v")
            self.load("v_values", "v", "column")

    def _solve(self) -> None:
        p = self.problem
        self.add(
            f"reads = tl.load({self.kept('solved_reads', 'channel', p.wk)})",
            f"solved = tl.load({self.kept('solved_values', 'column', p.wv)}).to(tl.float32)",
            f"p_values = {p.rounded('(' + p.dot('reads', p.rounded('state'), 'solved') + ')')}",
            f"tl.store({self.kept('p', 'column', p.wv)}, p_values)",
        )

    def _advance(self) -> None:
        p, form = self.problem, self.problem.form
        total = self.load_total("channel")
        if total:
            self.add(f"state = state * {total}")
        if form.columns:
            self.pointers["total_columns"] = Argument("total_columns", "*fp32")
            self.add(f"state = state * tl.load(total_columns + at * {p.wv} + column)[None, :]")
        for writer, value in zip(form.writers, form.values, strict=True):
            self.add(f"state = {p.dot(f'tl.trans({writer}_rows)', f'{value}_values', 'state')}")


class Adjoints(Frame):
    """The same backward: the adjoint of the state before each chunk, and of what was solved in it.

    ∂p = A_q,writerᵀ ∂o + writer_out ∂S′        ∂S = total ⊙ ∂S′ + q_inᵀ ∂o + Wᵀ ∂p
    """

    stage = "adjoints"
    makes = "Adjoints of the states before chunks"

    def write(self) -> None:
        """All lines."""
        p, form = self.problem, self.problem.form
        self.add("lane = tl.program_id(0)", "chunk = chunks - 1")
        self.numbered()
        self.block_columns("channel", p.wk, p.wk)
        self.block_columns("column", p.wv, self.columns, "tl.program_id(1)")
        self.add("at = (lane * tl.full((), 1, tl.int64) + 1) * chunks - 1")
        self.add(f"state = tl.load({self.states('ends', 'channel', 'column', 1)})")
        with self.lines.block("for turn in range(0, chunks):"):
            self.add("chunk = chunks - 1 - turn")
            self.place()
            if form.columns:
                self.add(f"douts = tl.load({self.kept('dout_in', 'column', p.wv)})")
            else:
                self.given("dout")
                self.load("douts", "dout", "column")
            if form.is_corrected:
                self._solve()
            self.add(f"q_rows = tl.load({self.kept('q_in', 'channel', p.wk)})")
            self._retreat()
            self.add(f"tl.store({self.states('ends', 'channel', 'column')}, state)")

    def _solve(self) -> None:
        p, form = self.problem, self.problem.form
        writer = form.writers[-1]
        self.add(
            f"{writer}_rows = tl.load({self.kept(f'{writer}_out', 'channel', p.wk)})",
            f"pairs = tl.load({self.matrix(form.pair_name(0, len(form.writers) - 1))})",
            f"solved = {p.dot('tl.trans(pairs)', 'douts')}",
            f"dp_values = {p.rounded('(' + p.dot(f'{writer}_rows', p.rounded('state'), 'solved') + ')')}",
            f"tl.store({self.kept('dp', 'column', p.wv)}, dp_values)",
            f"reads = tl.load({self.kept('solved_reads', 'channel', p.wk)})",
        )

    def _retreat(self) -> None:
        p, form = self.problem, self.problem.form
        total = self.load_total("channel")
        if total:
            self.add(f"state = state * {total}")
        if form.columns:
            self.pointers["total_columns"] = Argument("total_columns", "*fp32")
            self.add(f"state = state * tl.load(total_columns + at * {p.wv} + column)[None, :]")
        self.add(f"state = {p.dot('tl.trans(q_rows)', 'douts', 'state')}")
        if form.is_corrected:
            self.add(f"state = {p.dot('tl.trans(reads)', 'dp_values', 'state')}")
