"""The one form of a text: indentation, spaces, blank lines; comments and the breaks inside brackets stay.

Nothing but blanks is changed: the words are the same before and after, and so is what they mean. Line breaks inside
brackets are the writer's; what follows one stands under the bracket's content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from attnc.spec.reading.parse import parse
from attnc.spec.reading.words import RESERVED
from attnc.spec.source import SourceFile

INDENT = 4
WORDS = 8
"""Columns that the first word of a clause or declaration takes with the blanks after it."""

_UNPADDED = frozenset({"let", "def", "use", "pattern", "recurrence", "branch", "select", "return", "step", "state"})
"""Words with one blank after them, as what follows is a name that is given a meaning."""

_TOKEN = re.compile(
    r'(?P<blank> +)|(?P<newline>\n)|(?P<comment>#[^\n]*)|(?P<text>"""[\s\S]*?"""|"[^"\n]*")'
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)|(?P<sign>\.\.|<=|>=|==|!=|//|\*\*|[-+*/%@<>=()\[\],.:])"
)
_BINDING = frozenset({"*", "/", "//", "%", "**", "@"})
_OPENING, _CLOSING = frozenset("(["), frozenset(")]")


def formatted(source: SourceFile) -> str:
    """The text in its one form. Raises `SpecError` where it is no text of the language."""
    parse(source)
    result = "".join(f"{line}\n" if line else "\n" for line in _lines(_statements(source.text)))
    assert _words(result) == _words(source.text), f"formatting {source.name} would change its words"
    return result


def _words(text: str) -> list[str]:
    """Return what formatting must keep: all tokens, comments and docstring lines, stripped."""
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
    """A line of the text, or what is left of one: tokens, then perhaps a comment."""

    tokens: list[_Token] = field(default_factory=list)
    comment: str | None = None


@dataclass(slots=True)
class _Statement:
    """A statement with all of its rows, or comments that have lines of their own; `blank`: a blank line before it."""

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
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        assert found is not None and found.lastgroup is not None, text[at : at + 20]
        yield _Token(found.lastgroup, found.group(), at - (text.rfind("\n", 0, at) + 1))
        at = found.end()


def _statements(text: str) -> list[_Statement]:
    """The statements in order, with their levels."""
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
    """Levels by indentation; a comment belongs to the block before it as long as it stands as far to the right."""
    columns = [0]
    for statement in statements:
        if statement.is_comment:
            continue
        while statement.column < columns[-1]:
            columns.pop()
        if statement.column > columns[-1]:
            columns.append(statement.column)
        statement.level = len(columns) - 1
    after = 0
    for statement in reversed(statements):
        if statement.is_comment:
            statement.level = after
        after = statement.level
    before: _Statement | None = None
    for statement in statements:
        if not statement.is_comment:
            before = statement
        elif before is not None and before.level > statement.level and statement.column >= before.column:
            statement.level = before.level
    return statements


def _place_blanks(statements: list[_Statement]) -> None:
    """One blank line before and after a pattern or a function with a body, none where a body begins."""
    for i, statement in enumerate(statements):
        before = statements[i - 1] if i else None
        if before is None or before.level < statement.level:
            statement.blank = False
        elif statement.level == 0 and before.level > 0:
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
    """The rows of a statement; a row after the first stands under the content of the bracket that it is in."""
    base = INDENT * statement.level
    brackets: list[tuple[int, int]] = []  # columns of the content, and of what closes it
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
    """Where `/` stands between two numbers that belong to it alone: a fraction, written as one number."""
    found = set()
    for i in range(1, len(tokens) - 1):
        if tokens[i].text == "/" and tokens[i - 1].kind == tokens[i + 1].kind == "number":
            around = {tokens[j].text for j in (i - 2, i + 2) if 0 <= j < len(tokens)}
            if not around & _BINDING:
                found.add(i)
    return found


def _gap(before: list[_Token], token: _Token, word: str, *, first: bool, in_brackets: bool) -> str:
    """The blanks between the last of `before` and a token; `word` opens the statement, `first`: it stands before."""
    last = before[-1]
    if first and last.kind == "name" and token.text not in (".", ":") and last.text == word:
        return " " if last.text in _UNPADDED else " " * max(WORDS - len(last.text), 1)
    if token.text in (",", ")", "]", ":", ".") or last.text in ("(", "[", "."):
        return ""
    if _is_sign(last) and not (len(before) > 1 and _ends_value(before[-2])):
        return ""  # a sign of a number, not between two
    if token.text in _OPENING and _ends_value(last):
        return " " if word == "use" and not in_brackets else ""
    return " "


def _is_sign(token: _Token) -> bool:
    return token.text in ("+", "-")


def _ends_value(token: _Token) -> bool:
    if token.kind == "name":
        return token.text not in RESERVED or token.text in ("true", "false")
    return token.kind in ("number", "text") or token.text in _CLOSING


def _reindented(token: _Token, indent: int) -> str:
    """A docstring with its further lines as far to the right of its first as they were."""
    first, *rest = (line.rstrip(" ") for line in token.text.split("\n"))
    moved = []
    for line in rest:
        own = len(line) - len(line.lstrip(" "))
        moved.append(" " * max(own - token.column + indent, 0) + line.lstrip(" ") if line else "")
    return "\n".join([first, *moved])
