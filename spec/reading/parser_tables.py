"""Load the parser from precomputed tables, which are stored as JSON beside the grammar `attn.lark`.

`python -m attnc.spec.reading.parser_tables` writes the tables. They are data, and nothing in them is executed; they
are used only if the grammar and the version of lark are unchanged since they were written.
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
    """Return the parser of the language, created at the first call."""
    return parser_of(grammar(), files("attnc.spec").joinpath(_FILE).read_text(encoding="utf-8"))


def grammar() -> str:
    """Return the text of the grammar."""
    return files("attnc.spec").joinpath("attn.lark").read_text(encoding="utf-8")


def build_parser(grammar: str, *, strict: bool = False) -> Lark:
    """Build a parser for a grammar. `strict` also proves that no two terminals collide; it needs interegular."""
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
    """Return the parser that tables describe; build it from the grammar if the tables are out of date."""
    stored = json.loads(tables)
    return _loaded(stored["parser"]) if stored["made_of"] == _made_of(grammar) else build_parser(grammar)


def tables_of(grammar: str) -> str:
    """Return the tables of the grammar's parser as JSON, the same text in every process."""
    data, memo = build_parser(grammar).memo_serialize([TerminalDef, Rule])
    del data["options"]["postlex"]
    data["parser"]["parser"] = _numbered(data["parser"]["parser"])
    stored = {"made_by": _MADE_BY, "made_of": _made_of(grammar), "parser": {"data": data, "memo": memo}}
    return json.dumps(stored, separators=(",", ":")) + "\n"


def _made_of(grammar: str) -> dict[str, str]:
    return {"grammar": sha256(grammar.encode()).hexdigest(), "lark": lark.__version__}


def _loaded(parser: dict[str, Any]) -> Lark:
    """Load a parser from its JSON data; restores integer keys and the layout filter, which JSON cannot hold."""
    table = parser["data"]["parser"]["parser"]
    table["tokens"] = _with_numbers(table["tokens"])
    table["states"] = {int(state): _with_numbers(actions) for state, actions in table["states"].items()}
    parser["data"]["options"]["postlex"] = LayoutFilter()
    parser["memo"] = _with_numbers(parser["memo"])
    return Lark.load(parser)


def _with_numbers(entries: dict[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in entries.items()}


def _numbered(table: dict[str, Any]) -> dict[str, Any]:
    """Return a parse table renumbered deterministically; lark numbers states in the order of sets."""
    names = sorted(table["tokens"].values())
    token = {old: names.index(name) for old, name in table["tokens"].items()}
    rows = {state: sorted((token[old], to) for old, to in row.items()) for state, row in table["states"].items()}
    number = {state: i for i, state in enumerate(_in_walk_order(rows, [*table["start_states"].values()]))}
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
"""Lark's code for a reduction; 0 is a shift, followed by the next state."""


def _in_walk_order(rows: dict[int, list[tuple[int, tuple[int, Any]]]], starts: list[int]) -> list[int]:
    """Return all states in the order of a walk from the start states."""
    visited = dict.fromkeys(starts)
    pending = [*starts]
    for state in pending:
        new_states = [to for _, (kind, to) in rows[state] if kind != _REDUCE and to not in visited]
        visited |= dict.fromkeys(new_states)
        pending += new_states
    return [*visited]


if __name__ == "__main__":
    Path(str(files("attnc.spec").joinpath(_FILE))).write_text(tables_of(grammar()), encoding="utf-8")
