"""The parser of the grammar: its tables lie beside `attn.lark` as JSON, so that no process computes them again.

`python -m attnc.spec.reading.parser_tables` writes them. They are data: nothing in them is executed, and they are
taken only where grammar and lark are those that they were made of.
"""

from __future__ import annotations

import json
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import lark
from lark import Lark
from lark.grammar import Rule
from lark.lexer import TerminalDef

from attnc.spec.reading.indentation import LayoutFilter

_FILE = "attn.tables.json"
_MADE_BY = "python -m attnc.spec.reading.parser_tables"


@cache
def parser() -> Lark:
    """The parser of the language, made when first needed."""
    return parser_of(grammar(), files("attnc.spec").joinpath(_FILE).read_text(encoding="utf-8"))


def grammar() -> str:
    """The text of the grammar."""
    return files("attnc.spec").joinpath("attn.lark").read_text(encoding="utf-8")


def build_parser(grammar: str, *, strict: bool = False) -> Lark:
    """A parser for the grammar's text. `strict` also proves that no two terminals collide; it needs interegular."""
    return Lark(
        grammar,
        parser="lalr",
        lexer="contextual",
        postlex=LayoutFilter(),
        propagate_positions=True,
        maybe_placeholders=True,
        strict=strict,
    )


def parser_of(grammar: str, tables: str) -> Lark:
    """The parser that tables describe; built from the grammar where they are those of another, or of another lark."""
    read = json.loads(tables)
    return _loaded(read["parser"]) if read["made_of"] == _made_of(grammar) else build_parser(grammar)


def tables_of(grammar: str) -> str:
    """The tables of the grammar's parser as JSON, the same text in every process."""
    data, memo = build_parser(grammar).memo_serialize([TerminalDef, Rule])
    del data["options"]["postlex"]
    data["parser"]["parser"] = _numbered(data["parser"]["parser"])
    made = {"made_by": _MADE_BY, "made_of": _made_of(grammar), "parser": {"data": data, "memo": memo}}
    return json.dumps(made, separators=(",", ":")) + "\n"


def _made_of(grammar: str) -> dict[str, str]:
    return {"grammar": sha256(grammar.encode()).hexdigest(), "lark": lark.__version__}


def _loaded(parser: dict[str, Any]) -> Lark:
    """JSON has neither numbers as keys nor objects: both are put back."""
    table = parser["data"]["parser"]["parser"]
    table["tokens"] = _with_numbers(table["tokens"])
    table["states"] = {int(state): _with_numbers(actions) for state, actions in table["states"].items()}
    parser["data"]["options"]["postlex"] = LayoutFilter()
    parser["memo"] = _with_numbers(parser["memo"])
    return Lark.load(parser)


def _with_numbers(entries: dict[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in entries.items()}


def _numbered(table: dict[str, Any]) -> dict[str, Any]:
    """A parse table with numbers that are the same in every process: lark's own follow the order of sets."""
    names = sorted(table["tokens"].values())
    token = {old: names.index(name) for old, name in table["tokens"].items()}
    rows = {state: sorted((token[old], to) for old, to in row.items()) for state, row in table["states"].items()}
    number = {state: i for i, state in enumerate(_as_met(rows, [*table["start_states"].values()]))}
    return {
        "tokens": dict(enumerate(names)),
        "states": {
            number[state]: {name: (kind, to if kind == _REDUCE else number[to]) for name, (kind, to) in rows[state]}
            for state in number
        },
        "start_states": {name: number[state] for name, state in table["start_states"].items()},
        "end_states": {name: number[state] for name, state in table["end_states"].items()},
    }


_REDUCE = 1
"""Lark's code for a reduction; 0 is a shift, with the state that follows."""


def _as_met(rows: dict[int, list[tuple[int, tuple[int, Any]]]], starts: list[int]) -> list[int]:
    """All states in the order in which a walk from the first ones meets them."""
    met = dict.fromkeys(starts)
    pending = [*starts]
    for state in pending:
        found = [to for _, (kind, to) in rows[state] if kind != _REDUCE and to not in met]
        met |= dict.fromkeys(found)
        pending += found
    return [*met]


if __name__ == "__main__":
    Path(str(files("attnc.spec").joinpath(_FILE))).write_text(tables_of(grammar()), encoding="utf-8")
