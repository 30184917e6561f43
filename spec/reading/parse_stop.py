"""The position at which the parser stopped, with its context in the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from attnc.spec.reading.fault import Fault

_WORD = re.compile(r" *([A-Za-z_]\w*)")
_OPERANDS = frozenset({"NAME", "NUMBER", "LPAR"})
_OPERATORS = frozenset({"COMPARE", "TIMES", "POWER", "AND", "OR", "IN", "IF"})


@dataclass(frozen=True)
class ParseStop:
    """The token at which the parser stopped: its kind (empty for a stray character), its text, its offset.

    `last` is the token before it, which ends at `last_end`; `expected` holds the kinds of tokens that could follow.
    """

    text: str
    kind: str
    token: str
    start: int
    last_end: int
    last: str
    expected: frozenset[str]

    @property
    def end(self) -> int:
        """Return the offset at which the token ends."""
        return self.start + len(self.token)

    @cached_property
    def line_start(self) -> int:
        """The offset at which the token's line starts. A line end belongs to the line that it ends."""
        return self.text.rfind("\n", 0, self.start) + 1

    @cached_property
    def before(self) -> str:
        """The line up to the token."""
        return self.text[self.line_start : self.start]

    @cached_property
    def rest(self) -> str:
        """The line after the token, without a comment."""
        line = self.text[self.end :].partition("\n")[0] if not self.at_line_end else ""
        return line.partition("#")[0].strip()

    @property
    def line(self) -> str:
        """Return the line from the token on, without a comment."""
        return self.text[self.start :].partition("\n")[0].partition("#")[0].rstrip()

    @cached_property
    def head(self) -> str:
        """The first word of the line."""
        match = _WORD.match(self.text, self.line_start)
        return match.group(1) if match else ""

    @property
    def at_line_end(self) -> bool:
        """Whether the line ended where more was expected."""
        return self.kind in ("_NL", "$END")

    @property
    def wants_operand(self) -> bool:
        """Whether an expression must start here."""
        return self.expected >= _OPERANDS

    @property
    def wants_left(self) -> bool:
        """Whether the token joins two values."""
        return self.kind in _OPERATORS

    @property
    def wants_operator(self) -> bool:
        """Whether an expression could continue or end here."""
        return "COMPARE" in self.expected

    @property
    def wants_statement(self) -> bool:
        """Whether a line of a body could start here."""
        return "CLAUSE" in self.expected

    @property
    def wants_item(self) -> bool:
        """Whether a line of the file could start here."""
        return "PATTERN" in self.expected

    def fault(self, code: str, message: str, *, label: str = "", help: str = "") -> Fault:
        """Return a fault at the token; at the end of a line, right after the last word."""
        if self.at_line_end:
            return Fault(code, message, self.last_end, self.last_end + 1, label=label, help=help)
        return Fault(code, message, self.start, max(self.end, self.start + 1), label=label, help=help)
