"""Python text, written line by line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

SHIFT = 52
"""Bits of the inverse that replaces a division: turn t belongs to head t · (2⁵² / c + 1) / 2⁵², where each head has c
turns. This is exact for t · c below 2⁵²."""


@dataclass
class Lines:
    """Lines of text, indented by the open blocks.

    `guarded`: each loop is enclosed in a branch that skips it if it is empty. Kernels wait behind a loop for the
    products in flight, also on the path past an empty loop: there ptxas sees sums set to zero while products are in
    flight, and then waits for each product separately (C7515). The branch ends before the paths meet. `turns`: a loop
    runs once for every head of a group, and these lines follow the number of the head. Loops nested in a loop over
    heads would cost registers.
    """

    lines: list[str] = field(default_factory=list)
    depth: int = 0
    guarded: bool = False
    turns: tuple[str, ...] = ()

    def add(self, *lines: str) -> None:
        """Add lines at the current depth; an empty line stays empty."""
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
        """Open a loop from `begin` to before `end`; `specialised`: its warps have separate tasks."""
        range_text = f"range({begin}, {end})"
        head = f"for {name} in {f'tl.{range_text[:-1]}, warp_specialize=True)' if specialised else range_text}:"
        head_lines: tuple[str, ...] = ()
        if self.turns:
            self.add(f"count = {end} - {begin}" if begin != "0" else f"count = {end}")
            unit = f"tl.full((), {1 << SHIFT}, tl.int64)"
            self.add(f"inverse = {unit} // tl.maximum(count, 1) + 1  # turn // count = turn * inverse >> {SHIFT}")
            head = "for turn in range(0, group * count):"
            first = "" if begin == "0" else f"{begin} + "
            head_lines = (
                f"member = (turn * inverse >> {SHIFT}).to(tl.int32)",
                f"{name} = {first}turn - member * count",
            )
        test = "0 < count" if self.turns else f"{begin} < {end}"
        with self.block(f"if {test}:") if self.guarded else nullcontext(), self.block(head):
            self.add(*head_lines, *self.turns)
            yield

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"
