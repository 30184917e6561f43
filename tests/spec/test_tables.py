"""The parser's tables beside the grammar: current, equal to the built parser's, and never another grammar's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import lark
import pytest
from lark import Lark, Token, Tree

from attnc.spec.errors import SpecError
from attnc.spec.reading import parse
from attnc.spec.reading.parser_tables import build_parser, grammar, parser_of, tables_of
from attnc.spec.reading.source_text import decode

DRAFTS = sorted((Path(__file__).parent / "drafts").glob("*.attn"))


@pytest.fixture(scope="module")
def built() -> Lark:
    return build_parser(grammar())


@pytest.fixture(scope="module")
def loaded() -> Lark:
    return parser_of(grammar(), kept())


def kept() -> str:
    return files("attnc.spec").joinpath("attn.tables.json").read_text(encoding="utf-8")


def places(tree: Tree[Token]) -> Iterator[tuple[object, ...]]:
    """Yield every node and token of the tree that the syntax tree is made of, with its position."""
    yield (tree.data, tree.meta.empty or (tree.meta.start_pos, tree.meta.end_pos))
    for child in tree.children:
        if isinstance(child, Tree):
            yield from places(child)
        else:
            yield (child, child and (child.type, child.start_pos, child.end_pos))


def message(text: str, parser: Lark, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the message for a text that does not parse."""
    monkeypatch.setattr(parse, "parser", lambda: parser)
    try:
        parse.parse(decode(text, "cut.attn"))
    except SpecError as error:
        return str(error)
    return ""


def test_tables_are_current() -> None:
    assert kept() == tables_of(grammar()), "the grammar or lark has changed: make tables"


@pytest.mark.parametrize("path", DRAFTS, ids=lambda path: path.stem)
def test_trees_equal_the_built_parsers(path: Path, loaded: Lark, built: Lark) -> None:
    text = decode(path.read_bytes(), path.name).text + "\n"
    assert list(places(loaded.parse(text))) == list(places(built.parse(text)))


def test_messages_equal_the_built_parsers(loaded: Lark, built: Lark, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "pattern p(w: int)\n    visible abs(q - k) < w if (q in [1, 2]) else true\n    score s * [a for b in 0 .. 3]\n"
    )
    cuts = [text[:i] + wrong for i in range(len(text)) for wrong in ("", " then", "$", " = ")]
    said = [message(cut, loaded, monkeypatch) for cut in cuts]
    assert said == [message(cut, built, monkeypatch) for cut in cuts]
    assert sum(map(bool, said)) > 300


def test_tables_of_another_lark_version_are_rejected() -> None:
    other = json.dumps({"made_of": json.loads(kept())["made_of"] | {"lark": "0.0.0"}})
    assert parser_of(grammar(), other).parse("let a = 1\n").data == "start"


def test_tables_of_another_grammar_are_rejected() -> None:
    changed = grammar().replace("USE.3: /use\\b/", "USE.3: /take\\b/")
    parser = parser_of(changed, kept())
    assert parser.parse("take a(b)\n").data == "start"
    with pytest.raises(lark.UnexpectedInput):
        parser.parse("use a(b)\n")
