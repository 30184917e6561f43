"""`attnc same`: decide whether two patterns are equal, or have the same visible pairs."""

from __future__ import annotations

import argparse

from attnc.runtime.commands import console
from attnc.runtime.commands.patterns import analysed
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.runtime.verifying.verdicts import Sameness, decide

EPILOG = """\
exit status: 0 if the patterns are proved equal, 1 if they differ, 2 if this is undecided or the usage is bad
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `same`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    names = "a library pattern, a path to an .attn file, file.attn:name, or source text"
    parser.add_argument("first", metavar="A", help=names)
    parser.add_argument("second", metavar="B", help=names)
    for option, which in (("-p", "first"), ("-q", "second")):
        text = f"a parameter of the {which} pattern; may be repeated"
        console.add_repeated(parser, option, f"params_of_{which}", "NAME=VALUE", text)
    parser.add_argument(
        "--relation", action="store_true", help="compare only the visible pairs, not the scores, weights and values"
    )
    parser.add_argument(
        "--heads",
        metavar="N",
        type=int,
        help="heads of both patterns (default: what the parameters say, else 8 where it matters)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the verdict; return 0 if the patterns are equal, 1 if they differ, 2 if this is undecided."""
    console.check_at_least(1, ("--heads", args.heads))
    patterns = [
        analysed(argparse.Namespace(spec=args.first, params=args.params_of_first, preset=None)),
        analysed(argparse.Namespace(spec=args.second, params=args.params_of_second, preset=None)),
    ]
    verdict = decide(*patterns, relation_only=args.relation, heads=args.heads)
    console.print_answer(args, _as_json(verdict), _in_words(patterns, verdict))
    if verdict.equal is None:
        return console.USAGE
    return console.FINE if verdict.equal else console.FOUND


# --- words -----------------------------------------------------------------------------------------------------------


def _in_words(patterns: list[PatternAnalysis], verdict: Sameness) -> str:
    names = [pattern.name for pattern in patterns]
    if names[0] == names[1]:
        names = [f"the {which} {names[0]}" for which in ("first", "second")]
    both = f"{names[0]} and {names[1]}"
    if verdict.witness is not None:
        return f"{both} differ: {_pair_difference(names, verdict)}"
    if verdict.row is not None:
        pairs = f"have the same visible pairs {verdict.how}; they " if verdict.how else ""
        return f"{both} {pairs}differ in {_listed(verdict.differs_in)}: {_row_difference(verdict)}"
    if verdict.equal is None:
        return f"undecided whether {both} are the same: {_undecided(verdict)}"
    if verdict.compared == ("relation",):
        return f"{both} have the same visible pairs {verdict.how}"
    return f"{both} are equal {verdict.how}"


def _pair_difference(names: list[str], verdict: Sameness) -> str:
    assert verdict.witness is not None
    pair = verdict.witness.pair
    border = "" if verdict.border is None else f", with a border of documents before token {verdict.border}"
    where = _place_text(verdict, pair.length, verdict.witness.head, verdict.witness.group)
    sees, misses = names if pair.first else reversed(names)
    return f"{where}{border}, query {pair.q} sees key {pair.k} in {sees} and not in {misses}"


def _row_difference(verdict: Sameness) -> str:
    row = verdict.row
    assert row is not None
    key = "" if row.k is None else f", mostly because of key {row.k}"
    where = _place_text(verdict, row.length, row.head, row.group)
    return f"{where}, query {row.q} gets different results for random vectors and inputs{key}"


def _place_text(verdict: Sameness, length: int, head: int, group: int) -> str:
    heads = "" if verdict.heads == 1 else f" and {verdict.heads} heads"
    shared = f" with {group} heads per kv head" if group > 1 else ""
    return f"among {length:,} tokens{heads}, in head {head}{shared}"


def _undecided(verdict: Sameness) -> str:
    same_pairs = f"they have the same visible pairs {verdict.how}" if verdict.how else ""
    if not verdict.undecided:
        return same_pairs
    normal_forms = f"the normal forms of their {_listed(verdict.differs_in)} differ" if verdict.differs_in else ""
    return "; ".join(part for part in (same_pairs, normal_forms, verdict.undecided) if part)


def _listed(parts: tuple[str, ...]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


# --- JSON ------------------------------------------------------------------------------------------------------------


def _as_json(verdict: Sameness) -> dict[str, object]:
    result: dict[str, object] = {
        "equal": verdict.equal,
        "relation_equal": verdict.relation_equal,
        "compared": list(verdict.compared),
        "heads": verdict.heads,
    }
    if verdict.how:
        result["how"] = verdict.how
    if verdict.equal is None:
        if verdict.undecided:
            result["undecided"] = verdict.undecided
        result["equal_up_to"] = verdict.up_to
    if verdict.differs_in:
        result["differs_in"] = list(verdict.differs_in)
    return result | _witness_json(verdict)


def _witness_json(verdict: Sameness) -> dict[str, object]:
    if verdict.witness is not None:
        pair, head, group = verdict.witness.pair, verdict.witness.head, verdict.witness.group
        border = {} if verdict.border is None else {"border": verdict.border}
        return {"length": pair.length, "group": group, "witness": {"q": pair.q, "k": pair.k, "head": head}, **border}
    if verdict.row is not None:
        row = verdict.row
        return {"length": row.length, "group": row.group, "witness": {"q": row.q, "k": row.k, "head": row.head}}
    return {}
