"""The kernel of a chunk's gradients along the state's rows: of q, k, corrections' reads and left sides, and gates.

The adjoints of readers that enter from the state before the chunk, and of writers that leave to the state after it:

    ∂q_in = ∂o Sᵀ       ∂r_in = y Sᵀ       ∂writer_out = values ∂S′ᵀ       ∂total = Σ_columns S ⊙ ∂S′

A gate's gradient is the sum of a factor times its adjoint over the factors that have the gate in their exponents.
"""

from __future__ import annotations

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.decay_text import (
    AT_LEVEL,
    CROSSED_AFTER,
    DecaySweep,
    Edges,
    crossed,
    crossed_at_level,
    load_segments,
    load_vector_gate,
    scaled,
    vector_edges,
)
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame


class RowGradients(RecurrenceFrame):
    """Row gradients: a program computes a chunk and a block of channels, summing the gradient of `k` in `d_k`.

    With a gate for each row and a correction of rank one, each reader has a separate kernel, this one and
    `ReadGradients`, because the sums of both readers do not fit into registers.
    """

    stage = "keys"

    def in_words(self) -> str:
        """The results of the kernel, in words."""
        gates = ", and of gates" if self.problem.form.gate != "none" else ""
        return f"Gradients of {', '.join(self._inputs())}{gates}"

    def readers(self) -> tuple[int, ...]:
        """Return the indices of the readers whose gradients the kernel computes."""
        form = self.problem.form
        return (0,) if form.is_split else tuple(range(len(form.readers)))

    def writers(self) -> tuple[int, ...]:
        """Return the indices of the writers whose sums start here, with the adjoint from the state after the chunk."""
        return tuple(range(len(self.problem.form.writers)))

    def _inputs(self) -> list[str]:
        form = self.problem.form
        return list(dict.fromkeys([*(form.readers[i] for i in self.readers()), *form.writers]))

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p, form = self.problem, self.problem.form
        self.emit_chunk()
        load_segments(self)
        self.block_columns("channel", p.wk, self.rows, "tl.program_id(1)")
        size = f"({p.length}, {self.rows})"
        for name in self._sums():
            self.add(f"{name} = tl.zeros({size}, tl.float32)")
        if self._has_total_gradient():
            self.add(f"kept_sum = tl.zeros(({self.rows},), tl.float32)")
        for name in self._column_inputs():
            self.emit_address(name)
        self.over_columns(self._block)
        for name in self._inputs():
            self.emit_address(name)
            self.load(f"{name}_rows", name, "channel")
        if form.gate == "rows":
            self._row_gates()
        else:
            self._vector_gates()

    def _has_total_gradient(self) -> bool:
        """Check whether this kernel computes the gradient of the decay over the whole chunk."""
        return self.problem.form.gate != "none" and bool(self.writers())

    def _sums(self) -> list[str]:
        form = self.problem.form
        entered = [f"enter_{form.readers[i]}" for i in self.readers()]
        return entered + [f"leave_{form.writers[w]}" for w in self.writers()]

    def _column_inputs(self) -> list[str]:
        form = self.problem.form
        if form.columns:
            return []
        return ["dout"] * (0 in self.readers()) + ["v"] * ("v" in form.values and bool(self.writers()))

    def _block(self) -> None:
        p, form = self.problem, self.problem.form
        self._load_columns()
        self.add(f"state = tl.load({self.states('states', 'channel', 'column')})")
        if self.writers():
            self.add(f"end = tl.load({self.states('ends', 'channel', 'column', 1)})")
        if self._has_total_gradient():
            self._kept_sum()
        self.add(f"state_across = tl.trans({p.rounded('state')})")
        for i in self.readers():
            name = f"enter_{form.readers[i]}"
            self.add(f"{name} = {p.dot('dreads' if i else 'douts', 'state_across', name)}")
        if self.writers():
            self.add(f"end_across = tl.trans({p.rounded('end')})")
        for w in self.writers():
            name = f"leave_{form.writers[w]}"
            self.add(f"{name} = {p.dot(f'{form.values[w]}_values', 'end_across', name)}")

    def _load_columns(self) -> None:
        p, form = self.problem, self.problem.form
        if form.columns:
            self.add(
                f"douts = tl.load({self.scratch_tile('dout_in', 'column', p.wv)})",
                f"v_values = tl.load({self.scratch_tile('v_out', 'column', p.wv)})",
            )
        for name in self._column_inputs():
            self.load({"dout": "douts", "v": "v_values"}[name], name, "column")
        if form.is_corrected and self.writers():
            self.add(f"p_values = tl.load({self.scratch_tile('p', 'column', p.wv)})")
        if 1 in self.readers():
            self.add(f"dreads = tl.load({self.scratch_tile('read_adjoints', 'column', p.wv)})")

    def _kept_sum(self) -> None:
        p = self.problem
        product = "state * end"
        if p.form.columns:
            self.pointers["total_columns"] = KernelArgument("total_columns", "*fp32")
            product += f" * tl.load(total_columns + at * {p.wv} + column)[None, :]"
        self.add(f"kept_sum += tl.sum({product}, 1)")

    # --- one gate for all rows

    def _vector_gates(self) -> None:
        p, form = self.problem, self.problem.form
        load_vector_gate(self)
        edges = vector_edges(self)
        if form.has_vector_gate:
            self._edge_gate_gradients(edges)
        for reader, exclusive in zip(form.readers, form.exclusive, strict=True):
            self.add(f"enter_{reader} = {scaled(f'enter_{reader}', edges.into[exclusive])}")
        for writer in form.writers:
            self.add(f"leave_{writer} = {scaled(f'leave_{writer}', edges.out_of)}")
        self._join()
        for i, w in form.pairs:
            reader, writer, name = form.readers[i], form.writers[w], form.pair_name(i, w)
            self.add(
                f"pairs = tl.load({self.matrix(f'd_{name}')})",
                f"d_{reader} = {p.dot('pairs', f'{writer}_rows', f'd_{reader}')}",
                f"d_{writer} = {p.dot('tl.trans(pairs)', f'{reader}_rows', f'd_{writer}')}",
            )
        for name in form.inputs:
            self._store(name)

    def _join(self) -> None:
        """Emit one gradient sum per input, from its sums as a reader and as a writer."""
        sums_by_input = {name: [] for name in self._inputs()}  # type: dict[str, list[str]]
        for name in self._sums():
            sums_by_input[name.partition("_")[2]].append(name)
        for name, sums in sums_by_input.items():
            zeros = f"tl.zeros(({self.problem.length}, {self.rows}), tl.float32)"
            self.add(f"d_{name} = {' + '.join(sums) or zeros}")

    def _edge_gate_gradients(self, edges: Edges) -> None:
        form, p = self.problem.form, self.problem
        total = f"tl.sum(kept_sum, 0) * {edges.total}"
        self.add(f"dgates = tl.zeros(({p.length},), tl.float32) + {total}")
        for reader, exclusive in zip(form.readers, form.exclusive, strict=True):
            self.add(f"terms = tl.sum({reader}_rows * {edges.into[exclusive]} * enter_{reader}, 1)")
            self._add_vector(">" if exclusive else ">=")
        for writer in form.writers:
            self.add(f"terms = tl.sum({writer}_rows * {edges.out_of} * leave_{writer}, 1)")
            self._add_vector("<")
        # The sum over this program's channels; the host adds the sums of the other programs.
        self.scratch("dgate_edges", 1, "fp32")
        past = f"tl.program_id(1) * tl.full((), {p.length}, tl.int64) * tl.num_programs(0)"
        self.add(f"tl.store({self.vector('dgate_edges')} + {past}, dgates)")

    def _add_vector(self, relation: str) -> None:
        """Emit the addition, to each step's gate, of the terms of rows in a relation to it; transposes the terms."""
        length = self.problem.length
        self.add(
            f"terms = tl.broadcast_to(terms[:, None], ({length}, {length}))",
            f"dgates += tl.sum(tl.where(row[None, :] {relation} row[:, None], tl.trans(terms), 0.0), 1)",
        )

    # --- a gate for each row

    def _row_gates(self) -> None:
        """Emit the edges first, then the levels for one reader after another, to keep few registers alive."""
        p, form = self.problem, self.problem.form
        self.emit_address("gate_rows")
        self.load("gates", "gate_rows", "channel")
        self.add(f"dgates = tl.zeros(({p.length}, {self.rows}), tl.float32)")
        kinds = [form.exclusive[i] for i in self.readers()]
        sweep = DecaySweep(self, "gates", self.rows, False in kinds, True in kinds)
        with sweep.levels():
            pass
        self._edges(sweep.edges(kinds))
        self._join()
        for i in self.readers():
            reader, exclusive = form.readers[i], form.exclusive[i]
            self.add("", f"# Pairs of {reader}.")
            for w, writer in enumerate(form.writers):
                self.add(f"{writer}_pairs = tl.load({self.matrix(f'd_{form.pair_name(i, w)}')})")
                if i == 0 and not exclusive:
                    self._add_own_pair(writer)
            sweep = DecaySweep(self, "gates", self.rows, not exclusive, exclusive)
            with sweep.levels():
                self._at_level(sweep, reader, exclusive)
            if reader not in form.writers:
                self._store(reader)
        for writer in form.writers:
            self._store(writer)
        self.emit_address("dgate_rows")
        if not self.writers():
            self.load("others", "dgate_rows", "channel")
        self.put("dgate_rows", "channel", "dgates" if self.writers() else "dgates + others")

    def _add_own_pair(self, writer: str) -> None:
        """Emit a step's read of its own write, which does not decay."""
        diagonal = f"tl.sum(tl.where(row[:, None] == row[None, :], {writer}_pairs.to(tl.float32), 0.0), 1)"
        self.add(
            f"own_weight = {diagonal}[:, None]",
            f"d_q += own_weight * {writer}_rows",
            f"d_{writer} += own_weight * q_rows",
        )

    def _at_level(self, sweep: DecaySweep, reader: str, exclusive: bool) -> None:
        p, form = self.problem, self.problem.form
        rises, fall = sweep.factors()
        self.add(f"up = {p.rounded(f'({reader}_rows * {rises[exclusive]})')}")
        for w, writer in enumerate(form.writers):
            self.add(
                f"down = {p.rounded(f'({writer}_rows * {fall})')}",
                f"near = tl.where({AT_LEVEL}, {writer}_pairs, 0.0).to({writer}_pairs.dtype)",
                f"risen = {p.dot('near', 'down', 'risen' if w else '')}",
                f"fallen = {p.dot('tl.trans(near)', 'up')}",
                f"d_{writer} += fallen * {fall}",
                f"terms {'+=' if w else '='} fallen * down",
            )
        self.add(f"d_{reader} += risen * {rises[exclusive]}", "terms += risen * up")
        self.add(f"dgates += tl.dot({crossed_at_level(self, exclusive)}, terms{p.sum_precision})")

    def _edges(self, edges: Edges) -> None:
        p, form = self.problem, self.problem.form
        for i in self.readers():
            reader, exclusive = form.readers[i], form.exclusive[i]
            self.add(
                f"enter_{reader} = enter_{reader} * {edges.into[exclusive]}",
                f"dgates += tl.dot({crossed(exclusive)}, {reader}_rows * enter_{reader}{p.sum_precision})",
            )
        for w in self.writers():
            writer = form.writers[w]
            self.add(
                f"leave_{writer} = leave_{writer} * {edges.out_of}",
                f"dgates += tl.dot({CROSSED_AFTER}, {writer}_rows * leave_{writer}{p.sum_precision})",
            )
        if self.writers():
            self.add(f"dgates += (kept_sum * {edges.total})[None, :]")

    # --- stores

    def _store(self, name: str) -> None:
        """Emit the store of an input's gradient, or of its partial sum if another kernel adds to it."""
        p, form = self.problem, self.problem.form
        if form.is_split and name in form.writers:
            partial = self.scratch_tile(f"{name}_so_far", "channel", p.wk, "fp32")
            if self.writers():
                self.add(f"tl.store({partial}, d_{name})")
                return
            self.add(f"d_{name} += tl.load({partial})")
        self.emit_address(f"d{name}")
        self.put(f"d{name}", "channel", p.rounded(f"d_{name}"))


class ReadGradients(RowGradients):
    """Row gradients of a correction's read, added to the gradients computed so far."""

    stage = "reads"

    def readers(self) -> tuple[int, ...]:
        """Return the index of the correction's read."""
        return (1,)

    def writers(self) -> tuple[int, ...]:
        """Return no writer: their sums start in `RowGradients`."""
        return ()
