"""From a `SourceFile` to `syntax.Module`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedToken

from attnc.spec import syntax
from attnc.spec.errors import SpecError
from attnc.spec.reading.build import build
from attnc.spec.reading.complaints import complain
from attnc.spec.reading.fault import Fault
from attnc.spec.reading.found import Found
from attnc.spec.reading.layout import Layout
from attnc.spec.reading.limits import check_stack, check_token, check_tree
from attnc.spec.source import SourceFile

_LAYOUT = frozenset({"_NL", "_INDENT", "_DEDENT"})


def parse(source: SourceFile) -> syntax.Module:
    """The syntax tree of a text that `text.decode` has passed. Raises `SpecError` with the first fault's place."""
    try:
        tree = _parse_tree(source.text + "\n")
        check_tree(tree)
        return build(tree, source)
    except Fault as fault:
        raise SpecError((fault.in_source(source),)) from None


def _parse_tree(text: str) -> Tree[Token]:
    parser: Any = _parser().parse_interactive(text)
    last: Token | None = None
    try:
        for token in parser.lexer_thread.lex(parser.parser_state):
            parser.feed_token(token)
            check_stack(token, len(parser.parser_state.state_stack))
            last = token if token.type not in _LAYOUT else last
        tree = parser.feed_eof(last)
    except UnexpectedToken as error:
        check_token(error.token)
        raise complain(_found(text, error.token, last, parser)) from None
    except UnexpectedCharacters as error:
        start = error.pos_in_stream
        assert start is not None
        raise complain(_found(text, Token("", text[start], start), last, parser)) from None
    assert isinstance(tree, Tree)
    return tree


def _found(text: str, token: Token, last: Token | None, parser: Any) -> Found:
    start = len(text) if token.type == "$END" or token.start_pos is None else token.start_pos
    last_end = 0 if last is None else (last.start_pos or 0) + len(last)
    return Found(text, token.type, str(token), start, last_end, str(last or ""), frozenset(parser.accepts()))


@cache
def _parser() -> Lark:
    """The parser, built when first needed (tens of milliseconds)."""
    grammar = files("attnc.spec").joinpath("attn.lark").read_text(encoding="utf-8")
    return build_parser(grammar)


def build_parser(grammar: str, *, strict: bool = False) -> Lark:
    """A parser for the grammar's text. `strict` also proves that no two terminals collide; it needs interegular."""
    return Lark(
        grammar,
        parser="lalr",
        lexer="contextual",
        postlex=Layout(),
        propagate_positions=True,
        maybe_placeholders=True,
        strict=strict,
    )
