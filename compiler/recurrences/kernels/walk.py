"""The serial kernels of calls without gradients: they compute outputs too and store no state between chunks.

Only the states at the edges of segments are stored (heads, segments + 1, wk, wv): the first is the call's, the joining
kernel stores those between, and the walk stores the last. For heads of 128 in 16 bits and chunks of 64 this saves
2 KiB per token, which writing and reading the states before chunks would take.
"""

from __future__ import annotations

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.decay_text import (
    Edges,
    load_segments,
    load_vector_gate,
    pair_spans,
    pair_weights,
    vector_edges,
)
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame
from attnc.compiler.recurrences.kernels.state_walk import StateWalk


class OneWalk(StateWalk):
    """The walk of `StateWalk` from prepared rows, which also computes the outputs as `Outputs` does."""

    stage = "walk"
    makes = "Outputs and the last state"

    def start(self) -> None:
        """Emit the load of the state before the segment."""
        self._edge()
        self.add(f"state = tl.load({self.states('states', 'channel', 'column')})")

    def keep(self, name: str, value: str, column: str) -> None:
        """Store nothing, as this kernel itself reads the solved values."""

    def keep_state(self) -> None:
        """Store no state."""

    def end(self) -> None:
        """Emit the store of the state after the last segment; the others are stored already."""
        self.add("at = (lane + 1) * tl.full((), 1, tl.int64) * segments - 1")
        self.add(f"tl.store({self.states('states', 'channel', 'column', 1)}, state, mask=stop == chunks)")

    def _edge(self) -> None:
        self.add("at = lane * tl.full((), 1, tl.int64) * segments + segment")

    def read(self) -> None:
        """Emit the chunk's outputs, from the state before it and the values within it."""
        p, form = self.problem, self.problem.form
        self.add(
            f"q_rows = tl.load({self.scratch_tile('q_in', 'channel', p.wk)})",
            f"found = {p.dot('q_rows', p.rounded('state'))}",
        )
        for w, value in enumerate(form.values):
            self.add(f"{value}_pairs = tl.load({self.matrix(form.pair_name(0, w))})")
            self.add(f"found = {p.dot(f'{value}_pairs', f'{value}_values', 'found')}")
        self.put_out()

    def put_out(self) -> None:
        """Emit the store of the chunk's outputs."""
        self.emit_address("out")
        self.put("out", "column", self.problem.rounded("found"))


class FusedWalk(OneWalk):
    """The walk from the call's own rows, for one gate for all rows of the state, or none.

    Decay factors are multiplied into outputs and values, which are in registers or narrow, and not into readers and
    writers. Weights of pairs that differ between chunks are loaded (`PairWeightWalk`); others are computed before the
    loop.
    """

    stage = "fused"
    makes = "Outputs and the last state, from rows as they are given"

    def start(self) -> None:
        """Emit the load of the state before the segment, and the weights if they are equal in all chunks."""
        super().start()
        form = self.problem.form
        if form.has_weights:
            return
        if form.gate == "constant":
            self.pointers["gate"] = KernelArgument("gate", "*fp32")
            self.add("rate = tl.load(gate + lane % heads)")
        pair_spans(self)
        pair_weights(self, 0)

    def turn(self) -> None:
        """Emit the work on one chunk."""
        p, form = self.problem, self.problem.form
        self.emit_steps()
        edges, weights = self._loaded_weights() if form.has_weights else self._common_weights()
        for name in ("q", "k"):
            self.emit_address(name)
            self.load(f"{name}_rows", name, "channel")
        self.values()
        into, products = edges.into[form.exclusive[0]], p.dot("q_rows", "tl.trans(k_rows)")
        self.add(
            f"pairs = {p.rounded(f'({products} * {weights})')}",
            f"found = {p.dot('q_rows', p.rounded('state'))}",
            *([f"found = found * {into}"] if into else []),
            f"found = {p.dot('pairs', 'v_values', 'found')}",
        )
        self.put_out()
        leaving_values = "v_values"
        if edges.out_of:
            leaving_values = "v_left"
            self.add(f"v_left = {p.rounded(f'(v_values * {edges.out_of})')}", f"state = state * {edges.total}")
        self.add(f"state = {p.dot('tl.trans(k_rows)', leaving_values, 'state')}")

    def _loaded_weights(self) -> tuple[Edges, str]:
        """Emit loads of a chunk's edge factors and pair weights; return their names."""
        for name, kept in (("enter", "entering"), ("leave", "leaving")):
            self.add(f"{name} = tl.load({self.vector(kept)})")
        total = self.load_total("channel")
        self.add(f"weights = tl.load({self.matrix('pair_weights')})")
        return Edges({self.problem.form.exclusive[0]: "enter[:, None]"}, "leave[:, None]", total), "weights"

    def _common_weights(self) -> tuple[Edges, str]:
        """Emit the edge factors of a chunk; return their names and that of the common pair weights."""
        if self.problem.form.gate == "constant":
            self.add(f"count = tl.minimum(steps - first.to(tl.int32), {self.problem.used})")
        return vector_edges(self), "weights_0"


class PairWeightWalk(RecurrenceFrame):
    """The weights of a chunk's pairs, and its factors at the edges: a program computes a chunk.

    Computing them for all chunks at once moves 1/4 of the memory that a token of heads of 128 in 16 bits and chunks of
    64 moves otherwise. Within the walk they would be half of all instructions, and delay the next chunk.
    """

    stage = "weights"
    makes = "Weights of pairs within chunks, and factors at their edges"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p = self.problem
        self.emit_chunk()
        load_segments(self)
        load_vector_gate(self)
        edges = vector_edges(self)
        self.pointers["total"] = KernelArgument("total", "*fp32")
        self.add(f"tl.store(total + at, {edges.total})")
        for name, factor in (("entering", edges.into[p.form.exclusive[0]]), ("leaving", edges.out_of)):
            self.add(f"tl.store({self.vector(name)}, {factor.removesuffix('[:, None]')})")
        pair_spans(self)
        self.add(f"tl.store({self.matrix('pair_weights')}, {p.rounded(pair_weights(self, 0))})")
