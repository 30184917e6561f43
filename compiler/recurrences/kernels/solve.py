"""The kernel that solves a chunk's triangular system: its inverse, and the correction's W and U."""

from __future__ import annotations

from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame
from attnc.compiler.recurrences.kernels.recurrence_problem import LEAST


class SolveKernel(RecurrenceFrame):
    """Solved triangles: a program inverts a chunk's triangle in fp32, blocks of 16 by substitution, merged in pairs.

    p = U + W S. Delta rule: W = -T (β r_in), U = T (β v). General rank one: W = T r_in, U = T (A_r,k v).
    """

    stage = "solve"
    makes = "Triangles solved"

    def write(self) -> None:
        """Emit all lines of the kernel."""
        p, form = self.problem, self.problem.form
        self.emit_chunk()
        if form.is_delta:
            self.emit_address("beta")
        self._invert()
        self.add(f"inverse_pairs = {p.rounded('found')}", f"tl.store({self.matrix('inverse')}, inverse_pairs)")
        if form.is_delta:
            self.add("beta_across = tl.load(beta_at + row * beta_2, mask=there, other=0.0)")
            self.add(f"solver = {p.rounded('(found * beta_across[None, :])')}")
        else:
            self.add("solver = inverse_pairs", f"written = tl.load({self.matrix(form.pair_name(1, 0))})")
        self.emit_address("v")
        self.over_channels(self._read)
        self.over_columns(self._value)

    def _below(self, block: int) -> str:
        """Return the text that loads the triangle's diagonal blocks, or the blocks below pairs of diagonal blocks."""
        p, form = self.problem, self.problem.form
        count, down = (p.length // LEAST, 0) if block == 0 else (p.length // (2 * block), block)
        width = block or LEAST
        stride = width + down
        self.add(
            f"corner = tl.arange(0, {count})[:, None, None] * {stride}",
            f"down = corner + {down} + tl.arange(0, {width})[None, :, None]",
            f"across = corner + tl.arange(0, {width})[None, None, :]",
        )
        loaded = f"tl.load({self.scratch(form.triangle, p.length, 'fp32')} + (down * {p.length} + across))"
        if not form.is_delta:
            return f"-{loaded}"
        steps = "first.to(tl.int32) + down < steps"
        return f"{loaded} * tl.load(beta_at + down * beta_2, mask={steps}, other=0.0)"

    def _invert(self) -> None:
        length = self.problem.length
        self.helpers.append("inverse_of_blocks")
        self.add(f"blocks = {self._below(0)}", f"found = inverse_of_blocks(blocks, {length // LEAST})")
        block = LEAST
        while block < length:
            self.helpers.append("merged")
            self.add(f"blocks = {self._below(block)}")
            self.add(f'found = merged(found, blocks, {length // (2 * block)}, {block}, "{self.problem.exact}")')
            block *= 2
        self.add(f"found = tl.reshape(found, ({length}, {length}))")

    def _read(self) -> None:
        p, form = self.problem, self.problem.form
        sign = "-" if form.is_delta else ""
        self.add(f"reads = tl.load({self.scratch_tile(f'{form.readers[1]}_in', 'channel', p.wk)})")
        value = p.rounded(f"({sign}{p.dot('solver', 'reads')})")
        self.add(f"tl.store({self.scratch_tile('solved_reads', 'channel', p.wk)}, {value})")

    def _value(self) -> None:
        p = self.problem
        self.load("values", "v", "column")
        if p.form.is_rank_one:
            self.add(f"values = {p.rounded(p.dot('written', 'values'))}")
        value = p.rounded(p.dot("solver", "values"))
        self.add(f"tl.store({self.scratch_tile('solved_values', 'column', p.wv)}, {value})")
