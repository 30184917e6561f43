"""Indentation and brackets: what the parser's lexer leaves to a pass over the tokens.

Errors have places, and the state lives in one call, so that one parser serves all threads.
"""

from __future__ import annotations

from collections.abc import Iterator

from lark import Token
from lark.lark import PostLex

from attnc.spec.reading.fault import Fault
from attnc.spec.reading.limits import check_blocks, check_brackets, check_count, check_token
from attnc.spec.reading.words import RESERVED

_PAIRS = {"LPAR": ("RPAR", "(", ")"), "LSQB": ("RSQB", "[", "]")}
_CLOSING = {"RPAR": ")", "RSQB": "]"}
_OPENING = {"RPAR": "(", "RSQB": "["}


class LayoutFilter(PostLex):
    """Adds `_INDENT` and `_DEDENT`, drops line ends inside brackets, and checks each token by itself."""

    always_accept = ("_NL",)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """The tokens the grammar speaks of."""
        levels = [0]
        opened: list[Token] = []
        fresh, words = True, 0
        for token in stream:
            if fresh:
                _check_first(token)
                fresh = False
            if token.type == "_NL":
                if not opened:
                    yield from _line_end(token, levels)
                continue
            words += 1
            check_count(token, words)
            check_token(token)
            _match_brackets(token, opened)
            yield _with_reserved_words(token)
        if opened:
            raise unclosed(opened[-1].start_pos or 0, opened[-1])
        for _ in levels[1:]:
            yield Token("_DEDENT", "")


def unclosed(start: int, bracket: str, also: tuple[int, int, str] | None = None) -> Fault:
    """The fault of a bracket that nothing closes."""
    closing = ")" if bracket == "(" else "]"
    message = f"this `{bracket}` is never closed"
    return Fault("A103", message, start, start + 1, also=also, help=f"write the `{closing}` that belongs to it")


def _with_reserved_words(token: Token) -> Token:
    """Where only a name can stand, the lexer takes a reserved word for one; say what it is."""
    if token.type == "NAME" and token in RESERVED:
        return token.update(type="TRUTH" if token in ("true", "false") else token.upper())
    return token


def _check_first(token: Token) -> None:
    if token.type != "_NL" and token.column != 1:
        raise Fault("A105", "the first line is indented", 0, token.start_pos or 0, help="start it in the first column")


def _match_brackets(token: Token, opened: list[Token]) -> None:
    if token.type in _PAIRS:
        opened.append(token)
        check_brackets(token, len(opened))
    elif token.type in _CLOSING:
        _close(token, opened)


def _close(token: Token, opened: list[Token]) -> None:
    start = token.start_pos or 0
    if not opened:
        raise Fault("A104", f"this `{token}` closes nothing", start, start + 1, help="remove it, or open it before")
    opening = opened.pop()
    closing, shown, wanted = _PAIRS[opening.type]
    if closing != token.type:
        place = opening.start_pos or 0
        raise Fault(
            "A104",
            f"`{token}` cannot close `{shown}`",
            start,
            start + 1,
            label=f"expected `{wanted}`",
            also=(place, place + 1, "opened here"),
            help=f"write `{wanted}` for it, or open a `{_OPENING[token.type]}` before",
        )


def _line_end(token: Token, levels: list[int]) -> Iterator[Token]:
    """The line end itself, then the change of indentation after it."""
    yield token
    indent = len(token) - token.rindex("\n") - 1
    end = token.end_pos or 0
    if indent > levels[-1]:
        check_blocks(end, end + 1, len(levels))
        levels.append(indent)
        yield _mark("_INDENT", end)
        return
    before = tuple(levels)
    while indent < levels[-1]:
        levels.pop()
        yield _mark("_DEDENT", end)
    if indent != levels[-1]:
        raise _uneven(end, indent, before)


def _mark(kind: str, offset: int) -> Token:
    return Token(kind, "", start_pos=offset, end_pos=offset)


def _uneven(end: int, indent: int, levels: tuple[int, ...]) -> Fault:
    columns = " or ".join(str(level + 1) for level in levels)
    return Fault(
        "A105",
        "the indentation of this line matches no line above",
        end - indent,
        end,
        label="1 space" if indent == 1 else f"{indent} spaces",
        help=f"start the line in column {columns}, like the statements before it",
    )
