"""The kernel text of decays within a chunk. All exponents are sums ≤ 0: −inf is legal, and nothing is subtracted.

With one gate for all rows, sums over ranges of steps are vectors, and one matrix for pairs. With a gate for each row
(or column), each level has blocks of 1, 2, 4, … steps (`executors.recurrent.levels`); a pair's exponent is split
between its reader, from the start of its odd block, and its writer, to the end of its even block. A reset empties the
state before its step: pairs of rows with different counts of resets have weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame


@dataclass(frozen=True, slots=True)
class Edges:
    """The decay factors at a chunk's edges, as names of vectors or tiles, or empty.

    `into`: from the chunk's start to a reader, by whether the reader is exclusive; `out_of`: from a writer to the
    chunk's end; `total`: over the whole chunk.
    """

    into: dict[bool, str]
    out_of: str
    total: str


def scaled(x: str, factor: str) -> str:
    """Return the text of a tile times a factor for each row, if there is one."""
    return f"{x} * {factor}" if factor else x


def bracketed(x: str) -> str:
    """Return a product in parentheses, and a name unchanged."""
    return f"({x})" if " " in x else x


def load_segments(frame: RecurrenceFrame) -> None:
    """Emit the documents of rows: `from_start` and `to_end` of each row, `same` of pairs, `whole` of the chunk."""
    if not frame.problem.form.resets:
        return
    micro = frame.problem.form.micro
    frame.pointers["resets"] = KernelArgument("resets", "*i32")
    token = "step" if micro == 1 else f"step // {micro}"
    first = "there" if micro == 1 else f"there & (row % {micro} == 0)"
    frame.add(
        "fresh_at = resets + (lane // heads) * tl.full((), 1, tl.int64) * tokens",
        f"fresh = tl.load(fresh_at + {token}, mask={first}, other=0)",
        "counts = tl.sum(tl.where(row[None, :] <= row[:, None], fresh[None, :], 0), 1)",
        "counts_across = tl.sum(tl.where(row[:, None] <= row[None, :], fresh[:, None], 0), 0)",
        "last_count = tl.sum(fresh, 0)",
        "from_start, to_end, whole = counts == 0, counts == last_count, last_count == 0",
        "same = counts[:, None] == counts_across[None, :]",
    )


def load_vector_gate(frame: RecurrenceFrame) -> None:
    """Emit the load of each step's gate, or of the head's gate and the number of steps of the chunk."""
    form, p = frame.problem.form, frame.problem
    if form.gate == "constant":
        frame.pointers["gate"] = KernelArgument("gate", "*fp32")
        frame.add("rate = tl.load(gate + lane % heads)", f"count = tl.minimum(steps - first.to(tl.int32), {p.used})")
    elif form.gate == "scalar":
        frame.load_steps("gates", "gate")


def vector_edges(frame: RecurrenceFrame) -> Edges:
    """Emit the edge factors of one gate for all rows; return them as vectors over the chunk's rows, (length, 1)."""
    form = frame.problem.form
    into = {exclusive: _vector_into(frame, exclusive) for exclusive in dict.fromkeys(form.exclusive)}
    out_of = total = ""
    if form.gate == "constant":
        frame.add("after = tl.maximum(count - 1 - row, 0)")
        frame.add("leave = tl.exp(tl.where(after > 0, rate * after, 0.0))", "keep = tl.exp(rate * count)")
        out_of, total = "leave", "keep"
    elif form.gate == "scalar":
        frame.add("leave = tl.exp(tl.sum(tl.where(row[None, :] > row[:, None], gates[None, :], 0.0), 1))")
        frame.add("keep = tl.exp(tl.sum(gates, 0))")
        out_of, total = "leave", "keep"
    if form.resets:
        frame.add(f"leave = tl.where(to_end, {out_of or '1.0'}, 0.0)")
        frame.add(f"keep = tl.where(whole, {total or '1.0'}, 0.0)")
        out_of, total = "leave", "keep"
    columns = {exclusive: f"{name}[:, None]" if name else "" for exclusive, name in into.items()}
    return Edges(columns, f"{out_of}[:, None]" if out_of else "", total)


def _vector_into(frame: RecurrenceFrame, exclusive: bool) -> str:
    form = frame.problem.form
    name = "enter_before" if exclusive else "enter"
    if form.gate == "constant":
        value = "tl.where(row > 0, rate * row, 0.0)" if exclusive else "rate * (row + 1)"
        frame.add(f"{name} = tl.exp({value})")
    elif form.gate == "scalar":
        relation = "<" if exclusive else "<="
        frame.add(f"{name} = tl.exp(tl.sum(tl.where(row[None, :] {relation} row[:, None], gates[None, :], 0.0), 1))")
    elif not form.resets:
        return ""
    if form.resets:
        frame.add(f"{name} = tl.where(from_start, {name if form.gate != 'none' else '1.0'}, 0.0)")
    return name


def pair_spans(frame: RecurrenceFrame) -> None:
    """Emit the sums of gates between pairs of rows, for one gate for all rows."""
    form = frame.problem.form
    frame.add("distance = row[:, None] - row[None, :]")
    for exclusive in dict.fromkeys(form.exclusive):
        shift = 1 if exclusive else 0
        name = f"span_{shift}"
        if form.gate == "constant":
            away = f"(distance - {shift})" if shift else "distance"
            frame.add(f"{name} = tl.where({away} > 0, rate * {away}, 0.0)")
        elif form.gate == "scalar":
            gates = "gates"
            if exclusive:
                gates = "gates_before"
                frame.add(
                    "gates_before = tl.load(gate_at + (row - 1) * gate_2, mask=there & (row > 0), other=0.0)",
                )
            away = f"distance > {shift}"
            frame.add(f"{name} = tl.cumsum(tl.where({away}, {gates}[:, None], 0.0), 0)")


def pair_weights(frame: RecurrenceFrame, reader: int) -> str:
    """Emit a reader's pair weights, for one gate for all rows or none, after `pair_spans`; return their name."""
    form = frame.problem.form
    seen = seen_pairs(frame, reader)
    value = f"tl.exp(span_{int(form.exclusive[reader])})" if form.gate != "none" else "1.0"
    frame.add(f"weights_{reader} = tl.where({seen}, {value}, 0.0)")
    return f"weights_{reader}"


def seen_pairs(frame: RecurrenceFrame, reader: int) -> str:
    """Return the mask of a reader's pairs; the first reader reads its own step's write, unless it is exclusive."""
    form = frame.problem.form
    sees_own = reader == 0 and not form.exclusive[0]
    mask = f"(row[:, None] {'>=' if sees_own else '>'} row[None, :])"
    return f"{mask} & same" if form.resets else mask


@dataclass
class DecaySweep:
    """A sweep over the levels of a tile of gates with `width` columns, from small blocks to large ones.

    `name`: the tile of gates. `inclusive`, `exclusive`: whether to compute sums up to a row with and without its own
    gate. The tiles of sums are `before_NAME` (with), `earlier_NAME` (without) and `after_NAME`.
    """

    frame: RecurrenceFrame
    name: str
    width: int
    inclusive: bool
    exclusive: bool

    @contextmanager
    def levels(self) -> Iterator[None]:
        """Emit a loop over levels; within the context, the sums are those over the level's blocks.

        The loop is not unrolled, because the masks of all levels would be kept, and registers spilled.
        """
        name, p = self.name, self.frame.problem
        self.frame.add(f"sums_{name} = {name}")
        if self.inclusive:
            self.frame.add(f"before_{name} = {name}")
        if self.exclusive:
            self.frame.add(f"earlier_{name} = tl.zeros_like({name})")
        self.frame.add(f"after_{name} = tl.zeros_like({name})")
        with self.frame.lines.block(f"for level in range(0, {p.length.bit_length() - 1}):"):
            self.frame.add(
                "# Pairs in sibling blocks of 1, 2, 4, … rows.",
                "block = row >> level",
                "sibling_before = tl.where(block & 1 == 1, block - 1, -1)",
                "odd = (block & 1 == 1)[:, None]",
            )
            yield
            self.frame.add(
                "sibling = row ^ (tl.full((), 1, tl.int32) << level)",
                f"sibling = tl.broadcast_to(sibling[:, None], ({p.length}, {self.width}))",
                f"other = tl.gather(sums_{name}, sibling, 0)",
                f"sums_{name} += other",
            )
            for tile in self._rising():
                self.frame.add(f"{tile}_{name} += tl.where(odd, other, 0.0)")
            self.frame.add(f"after_{name} += tl.where(odd, 0.0, other)")

    def _rising(self) -> list[str]:
        return ["before"] * self.inclusive + ["earlier"] * self.exclusive

    def factors(self) -> tuple[dict[bool, str], str]:
        """Emit a level's factors; return those of readers, by whether they are exclusive, and of writers.

        A reader's factor is valid only in odd blocks, a writer's only in even blocks.
        """
        name = self.name
        rising = [("before", False)] * self.inclusive + [("earlier", True)] * self.exclusive
        first, exclusive = rising[0]
        self.frame.add(f"factor_{name} = tl.exp(tl.where(odd, {first}_{name}, after_{name}))")
        reader_factors = {exclusive: f"factor_{name}"}
        for tile, other_exclusive in rising[1:]:
            self.frame.add(f"{tile}_factor_{name} = tl.exp({tile}_{name})")
            reader_factors[other_exclusive] = f"{tile}_factor_{name}"
        return reader_factors, f"factor_{name}"

    def edges(self, kinds: Sequence[bool]) -> Edges:
        """Emit the edge factors after all levels; the total is a vector over columns."""
        name, resets = self.name, self.frame.problem.form.resets
        into = {}
        for exclusive in dict.fromkeys(kinds):
            tile = f"{'earlier' if exclusive else 'before'}_{name}"
            into[exclusive] = f"{'enter_before' if exclusive else 'enter'}_{name}"
            self.frame.add(f"{into[exclusive]} = {_where_seen(f'tl.exp({tile})', 'from_start[:, None]', resets)}")
        self.frame.add(f"leave_{name} = {_where_seen(f'tl.exp(after_{name})', 'to_end[:, None]', resets)}")
        self.frame.add(f"keep_{name} = {_where_seen(f'tl.exp(tl.max(sums_{name}, 0))', 'whole', resets)}")
        return Edges(into, f"leave_{name}", f"keep_{name}")


def _where_seen(value: str, seen: str, resets: bool) -> str:
    """Return a factor, set to 0 across resets."""
    return f"tl.where({seen}, {value}, 0.0)" if resets else value


AT_LEVEL = "(sibling_before[:, None] == block[None, :])"
"""The mask of a level's pairs, within the loop over levels."""


def crossed(exclusive: bool) -> str:
    """Return a matrix (step, row): 1 where a reader's exponent from the chunk's start has the step's gate, else 0."""
    return f"(row[None, :] {'>' if exclusive else '>='} row[:, None]).to(tl.float32)"


CROSSED_AFTER = "(row[None, :] < row[:, None]).to(tl.float32)"
"""A matrix (step, row): 1 where a writer's exponent to the chunk's end contains the step's gate, else 0."""


def crossed_at_level(frame: RecurrenceFrame, exclusive: bool) -> str:
    """Return a matrix (step, row): 1 where a row's exponent at a level contains the step's gate, else 0.

    A row in an odd block is a reader, in an even block a writer. Its exponent contains the steps from `low` to `high`.
    """
    frame.add(
        "low = tl.where(block & 1 == 1, block << level, row + 1)",
        f"high = tl.where(block & 1 == 1, {'row - 1' if exclusive else 'row'}, ((block + 1) << level) - 1)",
    )
    return "((low[None, :] <= row[:, None]) & (row[:, None] <= high[None, :])).to(tl.float32)"
