"""The kernel of a chunk's gradients along the state's columns: of v, β, and of the pairs of readers and writers.

    uncorrected:  ∂v = A_q,kᵀ ∂o + k_out ∂S′
    delta rule:   x = Tᵀ ∂p,   ∂v = β x,   y = -β x,   ∂β = x · (v - r_in S - A_r,k p)
    rank one:     y = Tᵀ ∂p,   ∂v = A_q,kᵀ ∂o + k_out ∂S′ + A_r,kᵀ y
    pairs:        ∂A_q,w = ∂o valuesᵀ,   ∂A_r,w = y valuesᵀ

The gradient of a gate that all rows share sums the pairs across its step; no difference of sums is taken.
"""

from __future__ import annotations

from attnc.compiler.recurrences.kernels.decay_text import (
    crossed,
    load_segments,
    load_vector_gate,
    pair_spans,
    pair_weights,
)
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame


class ColumnGradients(RecurrenceFrame):
    """Gradients along columns: a program computes a chunk, one block of columns after another."""

    stage = "values"
    makes = "Gradients along the state's columns"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p, form = self.problem, self.problem.form
        self.emit_chunk()
        load_segments(self)
        for name in ("v", "dout", "dv"):
            self.emit_address(name)
        if form.is_delta:
            self.load_steps("beta_rows", "beta")
            self.emit_address("dbeta")
            self.add(f"dbeta_sum = tl.zeros(({p.length},), tl.float32)")
        if not form.is_rank_one:
            self.begin_pairs()
        self.over_columns(self._block)
        if form.is_delta:
            self.add("tl.store(dbeta_at + row * dbeta_2, dbeta_sum, mask=there)")
        if not form.is_rank_one:
            self.store_pairs()

    def begin_pairs(self) -> None:
        """Emit zeros for the sums of pairs."""
        p, form = self.problem, self.problem.form
        for i, w in form.pairs:
            self.add(f"{form.pair_name(i, w)}_sum = tl.zeros(({p.length}, {p.length}), tl.float32)")

    def _block(self) -> None:
        self.load("douts", "dout", "column")
        self.load("v_values", "v", "column")
        if self.problem.form.is_delta:
            self._delta()
        else:
            self._plain()
        self.put("dv", "column", self.problem.rounded("dvs"))

    def _plain(self) -> None:
        p, form = self.problem, self.problem.form
        if form.is_rank_one:
            self._solved()
        self.add(f"pairs = tl.load({self.matrix(form.pair_name(0, 0))})", f"dvs = {p.dot('tl.trans(pairs)', 'douts')}")
        self.add_products([("dvs", f"{form.writers[0]}_out", "ends", 1)])
        if form.is_rank_one:
            self.add(f"dvs = {p.dot('tl.trans(written)', 'dreads', 'dvs')}")
        else:
            self.add_pairs()

    def add_pairs(self) -> None:
        """Emit the addition of a block of columns to the sums of pairs."""
        p, form = self.problem, self.problem.form
        for i, w in form.pairs:
            name, left = f"{form.pair_name(i, w)}_sum", "dreads" if i else "douts"
            self.add(f"{name} = {p.dot(left, f'tl.trans({form.values[w]}_values)', name)}")

    def _solved(self) -> None:
        """Emit the rows that a correction of rank one solves for, and the adjoint of its reads."""
        p, form = self.problem, self.problem.form
        self.add(
            f"inverse_pairs = tl.load({self.matrix('inverse')})",
            f"written = tl.load({self.matrix(form.pair_name(1, 0))})",
            f"reads = {p.dot('written', 'v_values')}",
        )
        self.add_products([("reads", "read_in", "states", 0)])
        self.add(f"p_values = {p.rounded(p.dot('inverse_pairs', p.rounded('reads')))}")
        self._adjoint_of_reads(p.dot("tl.trans(inverse_pairs)", "dps"))

    def _adjoint_of_reads(self, value: str) -> None:
        p = self.problem
        self.add(f"dps = tl.load({self.scratch_tile('dp', 'column', p.wv)})")
        self.add(f"solved = {value}")
        self.add(f"dreads = {p.rounded('(-beta_rows[:, None] * solved)' if p.form.is_delta else 'solved')}")
        for scratch, name in (("p", "p_values"), ("read_adjoints", "dreads")):
            self.add(f"tl.store({self.scratch_tile(scratch, 'column', p.wv)}, {name})")

    def _delta(self) -> None:
        p, form = self.problem, self.problem.form
        self.add(
            f"inverse_pairs = tl.load({self.matrix('inverse')})",
            f"missing = tl.zeros(({p.length}, {self.columns}), tl.float32)",
        )
        self.add_products([("missing", f"{form.readers[1]}_in", "states", 0)])
        self.add(
            "missing = v_values - missing",
            f"p_values = {p.rounded(p.dot('inverse_pairs', p.rounded('(beta_rows[:, None] * missing)')))}",
        )
        self._adjoint_of_reads(p.dot("tl.trans(inverse_pairs)", "dps"))
        triangle = p.rounded(f"tl.load({self.matrix(form.triangle, 'fp32')})")
        self.add(
            "dvs = beta_rows[:, None] * solved",
            f"missing -= {p.dot(triangle, 'p_values')}",
            "dbeta_sum += tl.sum(solved * missing, 1)",
        )
        self.add_pairs()

    def add_products(self, products: list[tuple[str, str, str, int]]) -> None:
        """Emit the addition, to each sum, of scratch rows times a tile of states: (sum, rows, states, chunks ahead)."""
        p = self.problem

        def body() -> None:
            for total, rows, states, ahead in products:
                self.add(
                    f"edge = tl.load({self.scratch_tile(rows, 'channel', p.wk)})",
                    f"state = tl.load({self.states(states, 'channel', 'column', ahead)})",
                    f"{total} = {p.dot('edge', p.rounded('state'), total)}",
                )
            self.add_of_channels()

        self.over_channels(body)

    def add_of_channels(self) -> None:
        """Emit further work on a block of channels."""

    # --- stores

    def store_pairs(self) -> None:
        """Emit the stores of the gradients of pairs, and the gradient of a gate that all rows share."""
        p, form = self.problem, self.problem.form
        if form.gate == "rows":
            for i, w in form.pairs:
                name = form.pair_name(i, w)
                value = f"tl.where(same, {name}_sum, 0.0)" if form.resets else f"{name}_sum"
                self.add(f"tl.store({self.matrix(f'd_{name}')}, {p.rounded(value)})")
            return
        load_vector_gate(self)
        pair_spans(self)
        if form.has_vector_gate:
            self.add(f"dgates = tl.zeros(({p.length},), tl.float32)")
        for i in range(len(form.readers)):
            self._store_pairs_of(i)
        if form.has_vector_gate:
            self.add(f"tl.store({self.vector('dgate_pairs')}, dgates)")

    def _store_pairs_of(self, reader: int) -> None:
        """Emit the stores of a reader's pairs, and their contribution to the gate."""
        p, form = self.problem, self.problem.form
        weights = pair_weights(self, reader)
        for w in range(len(form.writers)):
            name = form.pair_name(reader, w)
            if form.has_vector_gate:
                exact = "fp32" if form.is_corrected and name == form.triangle else ""
                self.add(f"terms {'+=' if w else '='} {name}_sum * tl.load({self.matrix(name, exact)})")
            self.add(f"tl.store({self.matrix(f'd_{name}')}, {p.rounded(f'({name}_sum * {weights})')})")
        if form.has_vector_gate:
            self.add(
                f"crossing = tl.dot({crossed(form.exclusive[reader])}, terms{p.sum_precision})",
                "dgates += tl.sum(tl.where(row[None, :] < row[:, None], crossing, 0.0), 1)",
            )


class PairGradients(ColumnGradients):
    """Gradients of pairs with a correction of rank one, for which `ColumnGradients` has no registers left."""

    stage = "pairs"
    makes = "Gradients of pairs"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        self.emit_chunk()
        load_segments(self)
        for name in ("v", "dout"):
            self.emit_address(name)
        self.begin_pairs()
        self.over_columns(self._load)
        self.store_pairs()

    def _load(self) -> None:
        p = self.problem
        self.load("douts", "dout", "column")
        self.load("v_values", "v", "column")
        for scratch, name in (("p", "p_values"), ("read_adjoints", "dreads")):
            self.add(f"{name} = tl.load({self.scratch_tile(scratch, 'column', p.wv)})")
        self.add_pairs()
