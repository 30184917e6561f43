"""Handle indentation and brackets in a pass over the tokens, between the lexer and the parser.

The state lives in the call, so that one parser serves all threads.
"""

from __future__ import annotations

from collections.abc import Iterator

from lark import Token
from lark.lark import PostLex

from attnc.spec.reading.fault import Fault
from attnc.spec.reading.limits import check_blocks, check_brackets, check_count, check_token
from attnc.spec.reading.phrases import RESERVED

_PAIRS = {"LPAR": ("RPAR", "(", ")"), "LSQB": ("RSQB", "[", "]")}
_CLOSING = {"RPAR": ")", "RSQB": "]"}
_OPENING = {"RPAR": "(", "RSQB": "["}


class LayoutFilter(PostLex):
    """Adds `_INDENT` and `_DEDENT` tokens, drops line ends inside brackets, and checks each token."""

    always_accept = ("_NL",)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """Yield the tokens that the grammar expects."""
        levels = [0]
        open_brackets: list[Token] = []
        is_first, count = True, 0
        for token in stream:
            if is_first:
                _check_first(token)
                is_first = False
            if token.type == "_NL":
                if not open_brackets:
                    yield from _line_end(token, levels)
                continue
            count += 1
            check_count(token, count)
            check_token(token)
            _match_brackets(token, open_brackets)
            yield _with_reserved_words(token)
        if open_brackets:
            raise unclosed(open_brackets[-1].start_pos or 0, open_brackets[-1])
        for _ in levels[1:]:
            yield Token("_DEDENT", "")


def unclosed(start: int, bracket: str, also: tuple[int, int, str] | None = None) -> Fault:
    """Return the fault of a bracket that is never closed."""
    closing = ")" if bracket == "(" else "]"
    message = f"this `{bracket}` is never closed"
    return Fault("A103", message, start, start + 1, also=also, help=f"add the matching `{closing}`")


def _with_reserved_words(token: Token) -> Token:
    """Restore the type of a reserved word that the contextual lexer took for a name."""
    if token.type == "NAME" and token in RESERVED:
        return token.update(type="TRUTH" if token in ("true", "false") else token.upper())
    return token


def _check_first(token: Token) -> None:
    if token.type != "_NL" and token.column != 1:
        raise Fault("A105", "the first line is indented", 0, token.start_pos or 0, help="start it in the first column")


def _match_brackets(token: Token, open_brackets: list[Token]) -> None:
    if token.type in _PAIRS:
        open_brackets.append(token)
        check_brackets(token, len(open_brackets))
    elif token.type in _CLOSING:
        _close(token, open_brackets)


def _close(token: Token, open_brackets: list[Token]) -> None:
    start = token.start_pos or 0
    if not open_brackets:
        raise Fault(
            "A104", f"this `{token}` closes nothing", start, start + 1, help="remove it, or add the opening bracket"
        )
    opening = open_brackets.pop()
    closing, shown, expected = _PAIRS[opening.type]
    if closing != token.type:
        opening_start = opening.start_pos or 0
        raise Fault(
            "A104",
            f"`{token}` cannot close `{shown}`",
            start,
            start + 1,
            label=f"expected `{expected}`",
            also=(opening_start, opening_start + 1, "opened here"),
            help=f"write `{expected}` instead, or open a `{_OPENING[token.type]}` before it",
        )


def _line_end(token: Token, levels: list[int]) -> Iterator[Token]:
    """Yield the line end, then the tokens for the change of indentation after it."""
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
