"""Nearly right texts: files of the library with changed words, and sentences drawn from the grammar."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from lark.grammar import NonTerminal, Rule, Symbol, Terminal

from attnc.spec.reading.parser_tables import parser

ROOT = Path(__file__).parents[2]
FOLDERS = ROOT / "stdlib_patterns", ROOT / "examples", ROOT / "tests" / "spec" / "drafts"
FILES = sorted(path for folder in FOLDERS for path in folder.rglob("*.attn"))
WORDS = re.compile(r'"""[\s\S]*?"""|#[^\n]*|[A-Za-z_]\w*|[0-9.]+|\n *| +|[^\w\s]')

VOCABULARY = re.findall(
    r"\S+",
    """
    pattern p def f let use input learned tokens pad over per select branch round align documents require preset visible
    score weights value covers from keep always combine approximate recurrence state step scan reset read return if else
    for in and or not true false q k v head batch kv_head queries keys heads dk dv scale softmax sum mean max min any
    all count dot abs normalised exp log lse weight merge solve outer eye part bitlen isqrt power_of_two order
    ( ) [ ] , : . .. = == != <= >= < > + - * / // % ** @ # 0 1 2 7 64 1e9 0.5 99999999999999999999
    real int bool unit windows near shifted extra x y i "
    """,
)
STRANGE = [
    "\t",
    "\r",
    "\x00",
    "é",
    "\u202e",
    "\ufeff",
    "\ud800",
    "'",
    "`",
    "$",
    "\\",
    "&&",
    "||",
    "!",
    "?",
    ";",
    "{",
    "}",
]


# --- mutation --------------------------------------------------------------------------------------------------------


def _delete(words: list[str], made: random.Random) -> None:
    del words[made.randrange(len(words))]


def _duplicate(words: list[str], made: random.Random) -> None:
    i = made.randrange(len(words))
    words.insert(i, words[i])


def _swap(words: list[str], made: random.Random) -> None:
    i, j = (made.randrange(len(words)) for _ in range(2))
    words[i], words[j] = words[j], words[i]


def _replace(words: list[str], made: random.Random) -> None:
    words[made.randrange(len(words))] = made.choice(VOCABULARY)


def _insert(words: list[str], made: random.Random) -> None:
    words.insert(made.randrange(len(words) + 1), f" {made.choice(VOCABULARY)} ")


def _confuse(words: list[str], made: random.Random) -> None:
    words.insert(made.randrange(len(words) + 1), made.choice(STRANGE))


def _repeat_stretch(words: list[str], made: random.Random) -> None:
    i, j = sorted(made.randrange(len(words) + 1) for _ in range(2))
    words[j:j] = words[i:j] * made.choice([1, 1, 2, 30])


def _cut(words: list[str], made: random.Random) -> None:
    i, j = sorted(made.randrange(len(words) + 1) for _ in range(2))
    del words[i:j]


def _nest(words: list[str], made: random.Random) -> None:
    opening, closing = made.choice([("(", ")"), ("[", "]"), ("(", ""), ("abs(", ")"), ("-", ""), ("not ", "")])
    i = made.randrange(len(words))
    depth = made.choice([1, 3, 40, 400])
    words[i] = opening * depth + words[i] + closing * depth


SIGNS = re.compile(r"[-+*/%<>=]+|and|or|if|min|max|sum|any|all|mean|q|k|head|keys|queries")


def _mistake(words: list[str], made: random.Random) -> None:
    """Replace a name, number or sign by another one of the text: mistakes that still parse."""
    for kind in made.sample([r"[A-Za-z_]\w*", r"[0-9]+", SIGNS.pattern], 3):
        places = [i for i, word in enumerate(words) if re.fullmatch(kind, word)]
        if len(places) > 1:
            words[made.choice(places)] = words[made.choice(places)]
            return


MUTATIONS: Sequence[Callable[[list[str], random.Random], None]] = (
    _delete, _delete, _duplicate, _swap, _replace, _replace, _insert, _insert, _confuse, _repeat_stretch, _cut, _nest,
    _mistake, _mistake, _mistake, _mistake, _mistake, _mistake, _mistake, _mistake,
)  # fmt: skip


@cache
def _words_of(path: Path) -> tuple[str, ...]:
    return tuple(WORDS.findall(path.read_text(encoding="utf-8")))


def mutant(made: random.Random) -> str:
    """Return a file with one to four changes."""
    words = list(_words_of(made.choice(FILES)))
    for _ in range(made.choice([1, 1, 1, 2, 4])):
        if words:
            made.choice(MUTATIONS)(words, made)
    return "".join(words)


# --- generation ------------------------------------------------------------------------------------------------------

KEYWORDS = "round state let step tokens pad use def if else for in and or not"
SIGN_NAMES, SIGNS_OF_NAMES = "POWER DOTS LPAR RPAR LSQB RSQB COMMA COLON EQUAL DOT", "** .. ( ) [ ] , : = ."
SAMPLES = {
    "NAME": "q k v head near far window x y i j b table gate score scale queries keys heads dk softmax sum dot abs",
    "NUMBER": "0 1 2 7 64 0.5 1e3",
    "COMPARE": "< <= == != > >=",
    "PLUS": "+ -",
    "TIMES": "* / // % @",
    "TRUTH": "true false",
    "BLOCK": "branch select",
    "DECLARE": "input learned",
    "RANGING": "over per",
    "CLAUSE": "align documents require preset visible score weights value combine approximate",
    "TEXT": '"""text"""',
    "PATTERN": "pattern",
    **dict(zip(SIGN_NAMES.split(), SIGNS_OF_NAMES.split(), strict=True)),
    **{word.upper(): word for word in KEYWORDS.split()},
}
"""Words for each terminal."""
TERMINALS = {name: words.split() for name, words in SAMPLES.items()}


@cache
def _grammar() -> tuple[dict[str, list[Rule]], dict[str, Rule]]:
    """Return the expansions of every rule, and the expansion that ends soonest."""
    rules: dict[str, list[Rule]] = {}
    for rule in parser().rules:
        rules.setdefault(str(rule.origin.name), []).append(rule)
    depth: dict[str, int] = {}
    while len(depth) < len(rules):
        for name, expansions in rules.items():
            depths = [_depth(rule, depth) for rule in expansions]
            finite = [d for d in depths if d is not None]
            if finite and name not in depth:
                depth[name] = 1 + min(finite)
    shortest = {name: min(finite, key=lambda rule: _depth(rule, depth) or 0) for name, finite in rules.items()}
    return rules, shortest


def _depth(rule: Rule, depth: dict[str, int]) -> int | None:
    inner = [symbol.name for symbol in rule.expansion if isinstance(symbol, NonTerminal)]
    return max((depth[n] for n in inner), default=0) if all(n in depth for n in inner) else None


def sentence(made: random.Random, limit: int = 200) -> str:
    """Draw a text of the grammar rule by rule; after `most` symbols the shortest expansions are taken."""
    rules, shortest = _grammar()
    pending: list[Symbol] = [NonTerminal("start")]
    words: list[str] = []
    level, symbols = 0, 0
    while pending:
        symbol = pending.pop()
        symbols += 1
        if isinstance(symbol, Terminal):
            level += (symbol.name == "_INDENT") - (symbol.name == "_DEDENT")
            if symbol.name in ("_INDENT", "_DEDENT"):
                words.append("\n" + "    " * level)
            else:
                words.append(
                    "\n" + "    " * level if symbol.name == "_NL" else f"{made.choice(TERMINALS[symbol.name])} "
                )
            continue
        name = str(symbol.name)
        chosen = shortest[name] if symbols > limit else made.choice(rules[name])
        pending.extend(reversed(chosen.expansion))
    return re.sub(r"\n[\n ]*\n", "\n", "".join(words).lstrip()) + "\n"


def text(seed: int) -> str:
    """Return the text of case number `seed`."""
    made = random.Random(seed)
    if made.random() < 0.9:
        return mutant(made)
    return next((words for _ in range(20) if len(words := sentence(made)) > 40), "")
