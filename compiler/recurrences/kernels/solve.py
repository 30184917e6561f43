"""The kernel that solves a chunk's triangle: its inverse, and what the correction makes of the state and of v."""

from __future__ import annotations

from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame
from attnc.compiler.recurrences.kernels.recurrence_problem import LEAST


class SolveKernel(RecurrenceFrame):
    """A program does a chunk. Blocks of 16 by substitution, then pairs of blocks are merged, all in fp32.

    p = U + W S: W = -T (β r_in) and U = T (β v) of a delta rule, W = T r_in and U = T (A_r,k v) of any of rank one.
    """

    stage = "solve"
    makes = "Triangles solved"

    def write(self) -> None:
        """All lines."""
        p, form = self.problem, self.problem.form
        self.of_chunk()
        if form.is_delta:
            self.given("beta")
        self._invert()
        self.add(f"inverse_pairs = {p.rounded('found')}", f"tl.store({self.matrix('inverse')}, inverse_pairs)")
        if form.is_delta:
            self.add("beta_across = tl.load(beta_at + row * beta_2, mask=there, other=0.0)")
            self.add(f"solver = {p.rounded('(found * beta_across[None, :])')}")
        else:
            self.add("solver = inverse_pairs", f"written = tl.load({self.matrix(form.pair_name(1, 0))})")
        self.given("v")
        self._each("channel", p.wk, self.rows, self._read)
        self._each("column", p.wv, self.columns, self._value)

    def _below(self, block: int) -> str:
        """An expression that loads the lower triangle's blocks on the diagonal, or below it between pairs of them."""
        p, form = self.problem, self.problem.form
        count, down = (p.length // LEAST, 0) if block == 0 else (p.length // (2 * block), block)
        width = block or LEAST
        apart = width + down
        self.add(
            f"corner = tl.arange(0, {count})[:, None, None] * {apart}",
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

    def _each(self, name: str, width: int, block: int, body: object) -> None:
        assert callable(body)
        if block < width:
            with self.lines.block(self.blocks(name, width, block)):
                self.block_columns(name, width, block)
                body()
        else:
            self.block_columns(name, width, block)
            body()

    def _read(self) -> None:
        p, form = self.problem, self.problem.form
        sign = "-" if form.is_delta else ""
        self.add(f"reads = tl.load({self.kept(f'{form.readers[1]}_in', 'channel', p.wk)})")
        value = p.rounded(f"({sign}{p.dot('solver', 'reads')})")
        self.add(f"tl.store({self.kept('solved_reads', 'channel', p.wk)}, {value})")

    def _value(self) -> None:
        p = self.problem
        self.load("values", "v", "column")
        if p.form.is_rank_one:
            self.add(f"values = {p.rounded(p.dot('written', 'values'))}")
        value = p.rounded(p.dot("solver", "values"))
        self.add(f"tl.store({self.kept('solved_values', 'column', p.wv)}, {value})")
