"""Text of Python, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

SHIFT = 52
"""Turn t of c for each head belongs to head t · (2⁵² / c + 1) / 2⁵²: exact for t · c below 2⁵²."""


@dataclass
class Lines:
    """Lines, indented as the blocks that are open.

    `guarded`: loops stand in branches of their own. What a loop has in flight is waited for behind it, on the way past
    an empty loop too: there ptxas sees sums set to zero while products are under way, and then waits for each product
    by itself (C7515). A branch ends before the ways meet. `turns`: loops are gone through once for every head of a
    group, and these lines follow the number of the head: loops in a loop over heads would cost registers.
    """

    lines: list[str] = field(default_factory=list)
    depth: int = 0
    guarded: bool = False
    turns: tuple[str, ...] = ()

    def add(self, *lines: str) -> None:
        """Lines at the current depth; an empty one stays empty."""
        self.lines += [("    " * self.depth + line).rstrip() for line in lines]

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Indent the lines that are added inside, below `head`."""
        self.add(head)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    @contextmanager
    def loop(self, name: str, begin: str, end: str, *, specialised: bool = False) -> Iterator[None]:
        """Open a loop from `begin` to before `end`; `specialised`: by warps with a task each."""
        ends = f"range({begin}, {end})"
        head = f"for {name} in {f'tl.{ends[:-1]}, warp_specialize=True)' if specialised else ends}:"
        own: tuple[str, ...] = ()
        if self.turns:
            self.add(f"count = {end} - {begin}" if begin != "0" else f"count = {end}")
            whole = f"tl.full((), {1 << SHIFT}, tl.int64)"
            self.add(f"inverse = {whole} // tl.maximum(count, 1) + 1  # turn // count = turn * inverse >> {SHIFT}")
            head = "for turn in range(0, group * count):"
            first = "" if begin == "0" else f"{begin} + "
            own = (f"member = (turn * inverse >> {SHIFT}).to(tl.int32)", f"{name} = {first}turn - member * count")
        test = "0 < count" if self.turns else f"{begin} < {end}"
        with self.block(f"if {test}:") if self.guarded else nullcontext(), self.block(head):
            self.add(*own, *self.turns)
            yield

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"
