"""The serial kernels of calls that are not differentiated: outputs too, so that no state between chunks is stored.

What is stored is the state at the edges of segments (lanes, segments + 1, wk, wv): the first is given, those between
are the joining kernel's, and the walk stores the last. For a token of heads of 128 in 16 bits and chunks of 64 that
spares the 2 KiB that states before chunks are written and read with.
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
    """From prepared rows: the walk of `StateWalk`, and in it what `Outputs` does."""

    stage = "walk"
    makes = "Outputs and the last state"

    def start(self) -> None:
        """The state before the segment."""
        self._edge()
        self.add(f"state = tl.load({self.states('states', 'channel', 'column')})")

    def keep(self, name: str, value: str, column: str) -> None:
        """Nothing: what is solved for is read here."""

    def keep_state(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Store the state after the last segment; after others it is there already."""
        self.add("at = (lane + 1) * tl.full((), 1, tl.int64) * segments - 1")
        self.add(f"tl.store({self.states('states', 'channel', 'column', 1)}, state, mask=stop == chunks)")

    def _edge(self) -> None:
        self.add("at = lane * tl.full((), 1, tl.int64) * segments + segment")

    def read(self) -> None:
        """The chunk's outputs, of the state before it and of values within it."""
        p, form = self.problem, self.problem.form
        self.add(
            f"q_rows = tl.load({self.kept('q_in', 'channel', p.wk)})",
            f"found = {p.dot('q_rows', p.rounded('state'))}",
        )
        for w, value in enumerate(form.values):
            self.add(f"{value}_pairs = tl.load({self.matrix(form.pair_name(0, w))})")
            self.add(f"found = {p.dot(f'{value}_pairs', f'{value}_values', 'found')}")
        if form.bonus:
            if "v" not in form.values:
                self.values()
            self.add(f"found += tl.load({self.vector('bonus_weights')})[:, None] * v_values")
        self.put_out()

    def put_out(self) -> None:
        """Store the chunk's outputs."""
        self.given("out")
        self.put("out", "column", self.problem.rounded("found"))


class FusedWalk(OneWalk):
    """From rows as the call has them, of one gate for all of a state's rows, or none.

    Factors of decays are put to outputs and values, which are in registers or narrow, and not to readers and writers.
    Weights of pairs that differ from chunk to chunk are loaded, see `PairWeightWalk`; others are made before the loop.
    """

    stage = "fused"
    makes = "Outputs and the last state, from rows as they are given"

    def start(self) -> None:
        """The state before the segment, and the weights that all chunks have."""
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
        """One chunk."""
        p, form = self.problem, self.problem.form
        self.place()
        edges, weights = self._loaded() if form.has_weights else self._made()
        for name in ("q", "k"):
            self.given(name)
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
        left = "v_values"
        if edges.out_of:
            left = "v_left"
            self.add(f"v_left = {p.rounded(f'(v_values * {edges.out_of})')}", f"state = state * {edges.total}")
        self.add(f"state = {p.dot('tl.trans(k_rows)', left, 'state')}")

    def _loaded(self) -> tuple[Edges, str]:
        for name, kept in (("enter", "entering"), ("leave", "leaving")):
            self.add(f"{name} = tl.load({self.vector(kept)})")
        total = self.load_total("channel")
        self.add(f"weights = tl.load({self.matrix('pair_weights')})")
        return Edges({self.problem.form.exclusive[0]: "enter[:, None]"}, "leave[:, None]", total), "weights"

    def _made(self) -> tuple[Edges, str]:
        if self.problem.form.gate == "constant":
            self.add(f"count = tl.minimum(steps - first.to(tl.int32), {self.problem.used})")
        return vector_edges(self), "weights_0"


class PairWeightWalk(RecurrenceFrame):
    """The weights of a chunk's pairs, and its factors at the edges; a program does a chunk.

    To make them for all chunks at once takes 1/4 of what a token of heads of 128 in 16 bits and chunks of 64 moves
    otherwise. In the walk they are half of all instructions, and what stands in the way of one chunk after another.
    """

    stage = "weights"
    makes = "Weights of pairs within chunks, and factors at their edges"

    def write(self) -> None:
        """All lines."""
        p = self.problem
        self.of_chunk()
        load_segments(self)
        load_vector_gate(self)
        edges = vector_edges(self)
        self.pointers["total"] = KernelArgument("total", "*fp32")
        self.add(f"tl.store(total + at, {edges.total})")
        for name, found in (("entering", edges.into[p.form.exclusive[0]]), ("leaving", edges.out_of)):
            self.add(f"tl.store({self.vector(name)}, {found.removesuffix('[:, None]')})")
        pair_spans(self)
        self.add(f"tl.store({self.matrix('pair_weights')}, {p.rounded(pair_weights(self, 0))})")
