"""Format a text: indentation, spaces and blank lines; comments and line breaks inside brackets stay.

Only white space changes, so the meaning stays. A line break inside brackets is kept; the next line is aligned with the
content of the bracket.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from attnc.spec.reading.parse import parse
from attnc.spec.reading.phrases import RESERVED
from attnc.spec.source import SourceFile

INDENT = 4
WORDS = 8
"""Columns of the first word of a clause or declaration, including the spaces after it."""

_UNPADDED = frozenset({"let", "def", "use", "pattern", "recurrence", "branch", "select", "return", "step", "state"})
"""Words that are followed by one space, because a declared name follows."""

_TOKEN = re.compile(
    r'(?P<blank> +)|(?P<newline>\n)|(?P<comment>#[^\n]*)|(?P<text>"""[\s\S]*?"""|"[^"\n]*")'
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)|(?P<sign>\.\.|<=|>=|==|!=|//|\*\*|[-+*/%@<>=()\[\],.:])"
)
_BINDING = frozenset({"*", "/", "//", "%", "**", "@"})
_OPENING, _CLOSING = frozenset("(["), frozenset(")]")


def formatted(source: SourceFile) -> str:
    """Return the formatted text. Raises `SpecError` for a text that does not parse."""
    parse(source)
    result = "".join(f"{line}\n" if line else "\n" for line in _lines(_statements(source.text)))
    assert _words(result) == _words(source.text), f"formatting {source.name} would change its words"
    return result


def _words(text: str) -> list[str]:
    """Return the tokens, comments and docstring lines that formatting must keep, stripped."""
    return [
        "\n".join(line.strip() for line in token.text.split("\n")) if token.kind == "text" else token.text.strip("# ")
        for token in _tokens(text)
        if token.kind not in ("blank", "newline")
    ]


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    column: int


@dataclass(slots=True)
class _Row:
    """The tokens and the comment of one line of the text."""

    tokens: list[_Token] = field(default_factory=list)
    comment: str | None = None


@dataclass(slots=True)
class _Statement:
    """A statement with all its lines, or a comment on its own line; `blank`: a blank line precedes it."""

    rows: list[_Row]
    column: int
    blank: bool
    level: int = 0

    @property
    def is_comment(self) -> bool:
        return not self.rows[0].tokens

    @property
    def word(self) -> str:
        return self.rows[0].tokens[0].text if self.rows[0].tokens else ""


def _tokens(text: str) -> Iterator[_Token]:
    offset = 0
    while offset < len(text):
        match = _TOKEN.match(text, offset)
        assert match is not None and match.lastgroup is not None, text[offset : offset + 20]
        yield _Token(match.lastgroup, match.group(), offset - (text.rfind("\n", 0, offset) + 1))
        offset = match.end()


def _statements(text: str) -> list[_Statement]:
    """Return the statements in order, with their levels of indentation."""
    statements = _leveled(list(_grouped(text)))
    _place_blanks(statements)
    return statements


def _grouped(text: str) -> Iterator[_Statement]:
    rows, row, depth, blanks = [], _Row(), 0, 0
    column = 0
    for token in [*_tokens(text), _Token("newline", "\n", 0)]:
        match token.kind:
            case "blank":
                continue
            case "newline" if depth:
                rows.append(row)
                row = _Row()
            case "newline" if not row.tokens and row.comment is None:
                blanks += 1
            case "newline":
                yield _Statement([*rows, row], column, blanks > 0)
                rows, row, blanks = [], _Row(), 0
            case "comment":
                column = column if row.tokens or rows else token.column
                row.comment = token.text
            case _:
                column = column if row.tokens or rows else token.column
                row.tokens.append(token)
                depth += (token.text in _OPENING) - (token.text in _CLOSING)


def _leveled(statements: list[_Statement]) -> list[_Statement]:
    """Set the levels by indentation; a comment belongs to the block above if it is indented as far as the block."""
    columns = [0]
    for statement in statements:
        if statement.is_comment:
            continue
        while statement.column < columns[-1]:
            columns.pop()
        if statement.column > columns[-1]:
            columns.append(statement.column)
        statement.level = len(columns) - 1
    next_level = 0
    for statement in reversed(statements):
        if statement.is_comment:
            statement.level = next_level
        next_level = statement.level
    previous: _Statement | None = None
    for statement in statements:
        if not statement.is_comment:
            previous = statement
        elif previous is not None and previous.level > statement.level and statement.column >= previous.column:
            statement.level = previous.level
    return statements


def _place_blanks(statements: list[_Statement]) -> None:
    """Set one blank line before and after a pattern or a function with a body, and none at the start of a body."""
    for i, statement in enumerate(statements):
        previous = statements[i - 1] if i else None
        if previous is None or previous.level < statement.level:
            statement.blank = False
        elif statement.level == 0 and previous.level > 0:
            statement.blank = True
    for i, statement in enumerate(statements):
        opens = i + 1 < len(statements) and statements[i + 1].level > statement.level
        if statement.level == 0 and opens and not statement.is_comment:
            first = i
            while first and statements[first - 1].is_comment and not statements[first].blank:
                first -= 1
            statements[first].blank = first > 0


# --- writing ---------------------------------------------------------------------------------------------------------


def _lines(statements: list[_Statement]) -> Iterator[str]:
    for statement in statements:
        if statement.blank:
            yield ""
        yield from _written(statement)


def _written(statement: _Statement) -> Iterator[str]:
    """Yield the lines of a statement; lines after the first are aligned with the content of their bracket."""
    base = INDENT * statement.level
    brackets: list[tuple[int, int]] = []  # (column of the content, column of the closing bracket)
    before: list[_Token] = []
    for number, row in enumerate(statement.rows):
        indent = base
        if brackets:
            closes = bool(row.tokens) and row.tokens[0].text in _CLOSING
            indent = brackets[-1][1] if closes else brackets[-1][0]
        fractions = _fractions(row.tokens)
        line = " " * indent if row.tokens or row.comment is not None else ""
        for i, token in enumerate(row.tokens):
            if i:
                first = number == 0 and i == 1
                gap = _gap(before, token, statement.word, first=first, in_brackets=bool(brackets))
                line += "" if {i, i - 1} & fractions else gap
            before = [*before[-1:], token]
            opened = len(line)
            line += _reindented(token, indent) if token.kind == "text" else token.text
            if token.text in _OPENING:
                hangs = i + 1 == len(row.tokens)
                brackets.append((indent + INDENT, indent) if hangs else (opened + 1, opened))
            elif token.text in _CLOSING:
                brackets.pop()
        if row.comment is not None:
            text = row.comment[1:].strip()
            line += ("  " if row.tokens else "") + (f"# {text}" if text else "#")
        yield line.rstrip(" ")


def _fractions(tokens: list[_Token]) -> set[int]:
    """Return the indices of each `/` between two numbers that no other operator binds: a fraction without spaces."""
    slashes = set()
    for i in range(1, len(tokens) - 1):
        if tokens[i].text == "/" and tokens[i - 1].kind == tokens[i + 1].kind == "number":
            neighbours = {tokens[j].text for j in (i - 2, i + 2) if 0 <= j < len(tokens)}
            if not neighbours & _BINDING:
                slashes.add(i)
    return slashes


def _gap(before: list[_Token], token: _Token, word: str, *, first: bool, in_brackets: bool) -> str:
    """Return the spaces between the last token of `before` and `token`.

    `word` is the first word of the statement; `first`: the token directly follows it.
    """
    last = before[-1]
    if first and last.kind == "name" and token.text not in (".", ":") and last.text == word:
        return " " if last.text in _UNPADDED else " " * max(WORDS - len(last.text), 1)
    if token.text in (",", ")", "]", ":", ".") or last.text in ("(", "[", "."):
        return ""
    if last.text in ("+", "-") and not (len(before) > 1 and _ends_value(before[-2])):
        return ""  # a sign, not a binary operator
    if token.text in _OPENING and _ends_value(last):
        return " " if word == "use" and not in_brackets else ""
    return " "


def _ends_value(token: _Token) -> bool:
    if token.kind == "name":
        return token.text not in RESERVED or token.text in ("true", "false")
    return token.kind in ("number", "text") or token.text in _CLOSING


def _reindented(token: _Token, indent: int) -> str:
    """Return a docstring at a new indentation; its lines keep their offsets from the first line."""
    first, *further_lines = (line.rstrip(" ") for line in token.text.split("\n"))
    moved = []
    for line in further_lines:
        margin = len(line) - len(line.lstrip(" "))
        moved.append(" " * max(margin - token.column + indent, 0) + line.lstrip(" ") if line else "")
    return "\n".join([first, *moved])
