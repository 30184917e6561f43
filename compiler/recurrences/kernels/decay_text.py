"""The text of decays within a chunk. All exponents are ≤ 0 and sums: −inf is legal, and nothing is subtracted.

One gate for all rows: sums over ranges of steps, as vectors, and as one matrix for pairs. A gate for each row (or
column): at each level the blocks of 1, 2, 4, … steps, see `attnc.runtime.recurrent.levels`; a pair's exponent is split
between its reader, from the start of its odd block on, and its writer, to the end of its even block. A reset empties
the state before all that its step does: pairs of different counts of resets see nothing of one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame


@dataclass(frozen=True, slots=True)
class Edges:
    """Factors of readers that see the state before a chunk, of writers that the state after it sees, and of the
    state itself: names of vectors, of tiles, or empty. `into` by whether a reader is exclusive.
    """

    into: dict[bool, str]
    out_of: str
    total: str


def scaled(x: str, factor: str) -> str:
    """A tile times a factor for each row."""
    return f"{x} * {factor}" if factor else x


def bracketed(x: str) -> str:
    """A product in brackets, a name as it is."""
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
    """The gate of each step, or the one of the head, and how many steps the chunk has."""
    form, p = frame.problem.form, frame.problem
    if form.gate == "constant":
        frame.pointers["gate"] = KernelArgument("gate", "*fp32")
        frame.add("rate = tl.load(gate + lane % heads)", f"count = tl.minimum(steps - first.to(tl.int32), {p.used})")
    elif form.gate == "scalar":
        frame.load_steps("gates", "gate")


def vector_edges(frame: RecurrenceFrame) -> Edges:
    """The factors of one gate for all rows, vectors over the chunk's rows, as (length, 1)."""
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
    shown = {exclusive: f"{name}[:, None]" if name else "" for exclusive, name in into.items()}
    return Edges(shown, f"{out_of}[:, None]" if out_of else "", total)


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
    """Emit sums of gates between pairs, for one gate of all rows: with the writer's, and with the reader's too."""
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
    """Return the weights of a reader's pairs after `pair_spans`, for one gate of all rows or none."""
    form = frame.problem.form
    seen = seen_pairs(frame, reader)
    value = f"tl.exp(span_{int(form.exclusive[reader])})" if form.gate != "none" else "1.0"
    frame.add(f"weights_{reader} = tl.where({seen}, {value}, 0.0)")
    return f"weights_{reader}"


def seen_pairs(frame: RecurrenceFrame, reader: int) -> str:
    """The mask of the pairs that a reader sees: the first sees its own step's write, unless it is exclusive."""
    form = frame.problem.form
    own = reader == 0 and not form.exclusive[0]
    seen = f"(row[:, None] {'>=' if own else '>'} row[None, :])"
    return f"{seen} & same" if form.resets else seen


@dataclass
class DecaySweep:
    """A sweep over the levels of gates for each of `width` columns of a tile, small blocks first.

    `name`: of the tile of gates; `inclusive`, `exclusive`: whether sums up to a row are wanted with its own gate, and
    without. The tiles are `before_NAME`, `earlier_NAME` (without) and `after_NAME`.
    """

    frame: RecurrenceFrame
    name: str
    width: int
    inclusive: bool
    exclusive: bool

    @contextmanager
    def levels(self) -> Iterator[None]:
        """The loop over levels: inside, the sums are those over the level's blocks.

        It is no unrolled loop: then masks of all levels are kept, and registers spilled.
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
        """At a level: of readers, by whether they are exclusive, and of writers; right where their blocks are."""
        name = self.name
        rising = [("before", False)] * self.inclusive + [("earlier", True)] * self.exclusive
        first, exclusive = rising[0]
        self.frame.add(f"factor_{name} = tl.exp(tl.where(odd, {first}_{name}, after_{name}))")
        found = {exclusive: f"factor_{name}"}
        for tile, other in rising[1:]:
            self.frame.add(f"{tile}_factor_{name} = tl.exp({tile}_{name})")
            found[other] = f"{tile}_factor_{name}"
        return found, f"factor_{name}"

    def edges(self, kinds: Sequence[bool]) -> Edges:
        """After all levels; the total is a vector over columns."""
        name, resets = self.name, self.frame.problem.form.resets
        into = {}
        for exclusive in dict.fromkeys(kinds):
            tile = f"{'earlier' if exclusive else 'before'}_{name}"
            into[exclusive] = f"{'enter_before' if exclusive else 'enter'}_{name}"
            self.frame.add(f"{into[exclusive]} = {_kept(f'tl.exp({tile})', 'from_start[:, None]', resets)}")
        self.frame.add(f"leave_{name} = {_kept(f'tl.exp(after_{name})', 'to_end[:, None]', resets)}")
        self.frame.add(f"keep_{name} = {_kept(f'tl.exp(tl.max(sums_{name}, 0))', 'whole', resets)}")
        return Edges(into, f"leave_{name}", f"keep_{name}")


def _kept(value: str, seen: str, resets: bool) -> str:
    return f"tl.where({seen}, {value}, 0.0)" if resets else value


AT_LEVEL = "(sibling_before[:, None] == block[None, :])"
"""In a loop over levels, the mask of the level's pairs."""


def crossed(exclusive: bool) -> str:
    """0 and 1 by (step, row): whether a reader's exponent from the chunk's start has the step's gate."""
    return f"(row[None, :] {'>' if exclusive else '>='} row[:, None]).to(tl.float32)"


CROSSED_AFTER = "(row[None, :] < row[:, None]).to(tl.float32)"
"""The pairs whose gates count in a writer's exponent to the chunk's end."""


def crossed_at_level(frame: RecurrenceFrame, exclusive: bool) -> str:
    """Return a level's exponents: a reader's in an odd block, and a writer's in an even one.

    The steps whose gates a row's exponent has are adjacent: from `low` to `high`.
    """
    frame.add(
        "low = tl.where(block & 1 == 1, block << level, row + 1)",
        f"high = tl.where(block & 1 == 1, {'row - 1' if exclusive else 'row'}, ((block + 1) << level) - 1)",
    )
    return "((low[None, :] <= row[:, None]) & (row[:, None] <= high[None, :])).to(tl.float32)"
