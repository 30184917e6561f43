"""The kernel that computes all decays: readers and writers decayed to the chunk's edges, and their pairs."""

from __future__ import annotations

from functools import partial

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.decay_text import (
    AT_LEVEL,
    DecaySweep,
    Edges,
    bracketed,
    load_segments,
    load_vector_gate,
    pair_spans,
    pair_weights,
    scaled,
    seen_pairs,
    vector_edges,
)
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame


class Prepare(RecurrenceFrame):
    """Decayed readers, writers and pairs: a program computes a chunk, one block of channels after another."""

    stage = "prepare"
    makes = "Readers and writers at the edges of chunks, and their pairs within"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p, form = self.problem, self.problem.form
        self.emit_chunk()
        load_segments(self)
        if form.gate != "rows":
            load_vector_gate(self)
        for name in (*form.inputs, *(["gate_rows"] if form.gate == "rows" else [])):
            self.emit_address(name)
        edges = vector_edges(self) if form.gate != "rows" else None
        for i, w in form.pairs:
            self.add(f"{form.pair_name(i, w)}_sum = tl.zeros(({p.length}, {p.length}), tl.float32)")
        for writer in form.writers if form.gate == "rows" and not form.before else ():
            self.add(f"own_{writer} = tl.zeros(({p.length},), tl.float32)")
        if edges is not None and edges.total:
            self.pointers["total"] = KernelArgument("total", "*fp32")
            self.add(f"tl.store(total + at, {edges.total})")
        self.over_channels(partial(self._block, edges))
        self._store_pairs()

    def _block(self, edges: Edges | None) -> None:
        p, form = self.problem, self.problem.form
        for name in form.inputs:
            self.load(f"{name}_rows", name, "channel")
        if edges is None:
            edges = self._levels()
            self.pointers["total"] = KernelArgument("total", "*fp32")
            self.add(f"tl.store(total + at * {p.wk} + channel, {edges.total})")
        else:
            for i, w in form.pairs:
                product = p.dot(f"{form.readers[i]}_rows", f"tl.trans({form.writers[w]}_rows)")
                self.add(f"{form.pair_name(i, w)}_sum += {product}")
        for reader, exclusive in zip(form.readers, form.exclusive, strict=True):
            value = p.rounded(bracketed(scaled(f"{reader}_rows", edges.into[exclusive])))
            self.add(f"tl.store({self.scratch_tile(f'{reader}_in', 'channel', p.wk)}, {value})")
        for writer in form.writers:
            value = p.rounded(bracketed(scaled(f"{writer}_rows", edges.out_of)))
            self.add(f"tl.store({self.scratch_tile(f'{writer}_out', 'channel', p.wk)}, {value})")

    def _levels(self) -> Edges:
        p, form = self.problem, self.problem.form
        self.load("gates", "gate_rows", "channel")
        if not form.before:
            for writer in form.writers:
                self.add(f"own_{writer} += tl.sum(q_rows.to(tl.float32) * {writer}_rows.to(tl.float32), 1)")
        sweep = DecaySweep(self, "gates", self.rows, False in form.exclusive, True in form.exclusive)
        with sweep.levels():
            rises, fall = sweep.factors()
            for reader, exclusive in zip(form.readers, form.exclusive, strict=True):
                self.add(f"{reader}_up = {p.rounded(f'({reader}_rows * {rises[exclusive]})')}")
            for writer in form.writers:
                self.add(f"{writer}_down = {p.rounded(f'({writer}_rows * {fall})')}")
            for i, w in form.pairs:
                product = p.dot(f"{form.readers[i]}_up", f"tl.trans({form.writers[w]}_down)")
                self.add(f"{form.pair_name(i, w)}_sum += tl.where({AT_LEVEL}, {product}, 0.0)")
        return sweep.edges(form.exclusive)

    def _store_pairs(self) -> None:
        p, form, weights = self.problem, self.problem.form, ""
        if form.gate != "rows":
            pair_spans(self)
        for i, w in form.pairs:
            name = form.pair_name(i, w)
            value = f"{name}_sum"
            if form.gate != "rows":
                weights = pair_weights(self, i) if w == 0 else weights
                value = f"{value} * {weights}"
            else:
                if i == 0 and not form.before:
                    self.add(f"{value} += tl.where(row[:, None] == row[None, :], own_{form.writers[w]}[:, None], 0.0)")
                if form.resets:
                    value = f"tl.where({seen_pairs(self, i)}, {value}, 0.0)"
            exact = form.is_corrected and name == form.triangle
            address = self.matrix(name, "fp32" if exact else "")
            self.add(f"tl.store({address}, {value if exact else p.rounded(f'({value})')})")
