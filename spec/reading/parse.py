"""Parse a `SourceFile` to a `syntax.ModuleSyntax`."""

from __future__ import annotations

from typing import Any

from lark import Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedToken

from attnc.spec import syntax
from attnc.spec.errors import SpecError
from attnc.spec.reading.build import build
from attnc.spec.reading.complaints import complain
from attnc.spec.reading.fault import Fault
from attnc.spec.reading.limits import check_stack, check_token, check_tree
from attnc.spec.reading.parse_stop import ParseStop
from attnc.spec.reading.parser_tables import parser
from attnc.spec.source import SourceFile

_LAYOUT = frozenset({"_NL", "_INDENT", "_DEDENT"})


def parse(source: SourceFile) -> syntax.ModuleSyntax:
    """Return the syntax tree of a text that `source_text.decode` checked. Raises `SpecError` for the first fault."""
    try:
        tree = _parse_tree(source.text + "\n")
        check_tree(tree)
        return build(tree, source)
    except Fault as fault:
        raise SpecError((fault.in_source(source),)) from None


def _parse_tree(text: str) -> Tree[Token]:
    steps: Any = parser().parse_interactive(text)
    last: Token | None = None
    try:
        for token in steps.lexer_thread.lex(steps.parser_state):
            steps.feed_token(token)
            check_stack(token, len(steps.parser_state.state_stack))
            last = token if token.type not in _LAYOUT else last
        tree = steps.feed_eof(last)
    except UnexpectedToken as error:
        check_token(error.token)
        raise complain(_stop(text, error.token, last, steps)) from None
    except UnexpectedCharacters as error:
        start = error.pos_in_stream
        assert start is not None
        raise complain(_stop(text, Token("", text[start], start), last, steps)) from None
    assert isinstance(tree, Tree)
    return tree


def _stop(text: str, token: Token, last: Token | None, steps: Any) -> ParseStop:
    start = len(text) if token.type == "$END" or token.start_pos is None else token.start_pos
    last_end = 0 if last is None else (last.start_pos or 0) + len(last)
    return ParseStop(text, token.type, str(token), start, last_end, str(last or ""), frozenset(steps.accepts()))
