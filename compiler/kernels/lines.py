"""Text of Python, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Lines:
    """Lines, indented as the blocks that are open."""

    lines: list[str] = field(default_factory=list)
    depth: int = 0

    def add(self, *lines: str) -> None:
        """Lines at the current depth; an empty one stays empty."""
        self.lines += [("    " * self.depth + line).rstrip() for line in lines]

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """What is added inside stands below `head`."""
        self.add(head)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"
