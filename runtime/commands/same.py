"""`attnc same`: whether two patterns show the same pairs."""

from __future__ import annotations

import argparse

from attnc.compiler.counted_isl import UndecidedError
from attnc.compiler.ir import DataRead, Index, Lookup
from attnc.compiler.lowering.lower import lower
from attnc.compiler.lowering.specialise import other_sizes, reads_head
from attnc.compiler.rewrite import walk
from attnc.runtime.attention import Attention
from attnc.runtime.commands import console
from attnc.runtime.commands.patterns import compiled
from attnc.runtime.comparing import Answer, Question, compare, reads_counts, reads_groups
from attnc.runtime.example_inputs import head_count
from attnc.runtime.lengths import natural_length

HEADS = 8


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `same`."""
    names = "a library pattern, a path to an .attn file, file.attn:name, or source text"
    parser.add_argument("first", metavar="A", help=names)
    parser.add_argument("second", metavar="B", help=names)
    for option, which in (("-p", "first"), ("-q", "second")):
        parser.add_argument(
            option,
            dest=f"params_of_{which}",
            metavar="NAME=VALUE",
            action="append",
            default=[],
            help=f"a parameter of the {which} pattern; may be repeated",
        )


def run(args: argparse.Namespace) -> int:
    """0 equal, 1 different, 2 where it cannot be decided."""
    patterns = [
        compiled(argparse.Namespace(spec=args.first, params=args.params_of_first, preset=None)),
        compiled(argparse.Namespace(spec=args.second, params=args.params_of_second, preset=None)),
    ]
    answer = _compared(*patterns)
    if args.json:
        console.print_json(_as_json(answer))
    else:
        print(_in_words(patterns, answer))
    return console.FINE if answer.witness is None else console.FOUND


def _compared(one: Attention, other: Attention) -> Answer:
    """Raises UsageError where the relations depend on what is not known."""
    question = _question(one, other)
    grids = {n for n in (natural_length(p.bound) for p in (one, other)) if n is not None}
    if len(grids) > 1 and question.relations[0] is not question.relations[1]:
        raise console.UsageError(f"the patterns are of {' and '.join(map(str, sorted(grids)))} tokens")
    try:
        return compare(question, next(iter(grids), None))
    except UndecidedError as error:
        raise console.UsageError(str(error)) from error


def _question(one: Attention, other: Attention) -> Question:
    relations = _relation(one), _relation(other)
    heads = _heads(one, other, relations)
    shared = next((g for g in range(2, heads + 1) if heads % g == 0), 1)
    groups = (1, shared) if shared > 1 and any(map(reads_groups, relations)) else (1,)
    required = [condition for pattern in (one, other) for condition, _ in lower(pattern.bound).requirements]
    conditions = tuple(condition for condition in required if not other_sizes(condition))
    return Question(relations, conditions, heads, groups)


def _relation(pattern: Attention) -> Index:
    lowered = lower(pattern.bound)
    nodes = lowered.nodes
    if pattern.is_recurrence:
        raise console.UsageError(f"`{pattern.name}` is a recurrence, which has no pairs: not compared")
    if len(nodes) != 1 or nodes[0].keys is not None or lowered.documents is not None:
        raise console.UsageError(f"`{pattern.name}` has branches, documents or keys that are no tokens: not compared")
    reads = [b for b in walk(nodes[0].visible) if isinstance(b, Lookup | DataRead)]
    if reads:
        raise console.UsageError(f"`{pattern.name}` reads inputs: whether it equals another depends on them")
    sizes = other_sizes(nodes[0].visible)
    if sizes:
        raise console.UsageError(f"`{pattern.name}` reads the size `{sizes[0]}`, which a call decides: not compared")
    return nodes[0].visible


def _heads(one: Attention, other: Attention, relations: tuple[Index, Index]) -> int:
    counts = {n for n in (head_count(p.bound) for p in (one, other)) if n is not None}
    if len(counts) > 1:
        raise console.UsageError(f"the patterns have lists for {' and '.join(map(str, sorted(counts)))} heads")
    read = any(reads_head(relation) or reads_counts(relation) for relation in relations)
    return counts.pop() if counts else HEADS if read else 1


def _in_words(patterns: list[Attention], answer: Answer) -> str:
    names = [pattern.name for pattern in patterns]
    if names[0] == names[1]:
        names = [f"the {which} {names[0]}" for which in ("first", "second")]
    if answer.witness is None:
        return f"{names[0]} and {names[1]} are equal {answer.how}"
    found, where = answer.witness.pair, f"in head {answer.witness.head}"
    if answer.witness.group > 1:
        where += f" with {answer.witness.group} heads to a kv head"
    sees, misses = names if found.first else reversed(names)
    return (
        f"{names[0]} and {names[1]} differ: among {found.length:,} tokens, {where}, query {found.q} sees key "
        f"{found.k} in {sees} and not in {misses}"
    )


def _as_json(answer: Answer) -> dict[str, object]:
    if answer.witness is None:
        return {"equal": True, "how": answer.how}
    found = answer.witness.pair
    witness = {"q": found.q, "k": found.k, "head": answer.witness.head}
    return {"equal": False, "length": found.length, "group": answer.witness.group, "witness": witness}
