"""`attnc same`: whether two patterns show the same pairs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import product

from attnc.compiler import fold
from attnc.compiler.equality import MOST, Difference, deciding_length, first_difference, reads_length
from attnc.compiler.ir import DataRead, Extent, HeadIndex, Index, Lookup, Whole
from attnc.compiler.lowering.lower import lower
from attnc.compiler.lowering.specialise import alone, other_sizes, reads_head
from attnc.compiler.rewrite import walk
from attnc.runtime.attention import Attention
from attnc.runtime.commands import console
from attnc.runtime.commands.patterns import compiled, natural_length
from attnc.runtime.example_inputs import head_count

LENGTHS = 160
"""Where nothing is proved, all lengths up to this are tried."""

SHORT = 2048
"""And this one, where the relations do not depend on it."""

HEADS = 8


@dataclass(frozen=True)
class Answer:
    """`witness`, if the patterns differ; else `how` far they are equal."""

    witness: Witness | None
    how: str


@dataclass(frozen=True)
class Witness:
    """A pair that one pattern alone shows, in a head, `group` of which share a kv head."""

    pair: Difference
    head: int
    group: int


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
    relations = [_relation(pattern) for pattern in (one, other)]
    heads = _heads(one, other, relations)
    shared = next((g for g in range(2, heads + 1) if heads % g == 0), 1)
    groups = [1, shared] if shared > 1 and any(map(_reads_groups, relations)) else [1]
    grids = {n for n in (natural_length(p.bound) for p in (one, other)) if n is not None}
    if len(grids) > 1:
        raise console.UsageError(f"the patterns are of {' and '.join(map(str, sorted(grids)))} tokens")
    allowed = partial(_is_allowed, (one, other), heads)
    whose = "" if heads == 1 else f", for {heads} heads" + (f", 1 or {shared} to a kv head" if len(groups) > 1 else "")
    if relations[0] is relations[1]:
        return Answer(None, f"for every length: both have one normal form{whose}")
    if grids:
        (n,) = grids
        found = _differing(relations, heads, groups, [n])
        return Answer(found, f"for {n:,} tokens, all pairs looked at{whose}")
    if any(map(reads_length, relations)) or any(isinstance(b, Whole) for r in relations for b in walk(r)):
        lengths = [n for n in range(1, LENGTHS + 1) if allowed(n)]
        if not lengths:
            raise console.UsageError(f"`require` refuses all lengths up to {LENGTHS}")
        found = _differing(relations, heads, groups, lengths)
        of_all = "all lengths" if len(lengths) == LENGTHS else f"the {len(lengths)} lengths that `require` allows"
        return Answer(found, f"for {of_all} up to {LENGTHS}; longer ones are not proved{whose}")
    decides = [deciding_length(alone(r, 1, h, heads, g) for r in relations) for g in groups for h in range(heads)]
    longest = max((n or MOST + 1 for n in decides), default=1)
    if longest > MOST:
        found = _differing(relations, heads, groups, [SHORT])
        return Answer(found, f"for all lengths up to {SHORT:,}; longer ones are not proved{whose}")
    found = _differing(relations, heads, groups, [longest])
    return Answer(found, f"for every length: the pairs of {longest:,} tokens decide{whose}")


def _relation(pattern: Attention) -> Index:
    lowered = lower(pattern.bound)
    nodes = lowered.nodes
    if len(nodes) != 1 or nodes[0].keys is not None or lowered.documents is not None:
        raise console.UsageError(f"`{pattern.name}` has branches, documents or keys that are no tokens: not compared")
    reads = [b for b in walk(nodes[0].visible) if isinstance(b, Lookup | DataRead)]
    if reads:
        raise console.UsageError(f"`{pattern.name}` reads inputs: whether it equals another depends on them")
    sizes = other_sizes(nodes[0].visible)
    if sizes:
        raise console.UsageError(f"`{pattern.name}` reads the size `{sizes[0]}`, which a call decides: not compared")
    return nodes[0].visible


def _heads(one: Attention, other: Attention, relations: list[Index]) -> int:
    counts = {n for n in (head_count(p.bound) for p in (one, other)) if n is not None}
    if len(counts) > 1:
        raise console.UsageError(f"the patterns have lists for {' and '.join(map(str, sorted(counts)))} heads")
    read = any(reads_head(relation) or _reads_counts(relation) for relation in relations)
    return counts.pop() if counts else HEADS if read else 1


def _reads_counts(relation: Index) -> bool:
    """Whether a relation depends on how many heads there are."""
    return any(isinstance(node, Extent) and node.name in ("heads", "kv_heads", "group") for node in walk(relation))


def _reads_groups(relation: Index) -> bool:
    """Whether it depends on how many heads share a kv head."""
    return _reads_counts(relation) or any(
        isinstance(node, HeadIndex) and node.name == "kv_head" for node in walk(relation)
    )


def _is_allowed(patterns: tuple[Attention, ...], heads: int, n: int) -> bool:
    """Whether all that the patterns require of a call holds for so many tokens."""
    conditions = [condition for pattern in patterns for condition, _ in lower(pattern.bound).requirements]
    return all(alone(condition, n, 0, heads) is fold.truth(True) for condition in conditions)


def _differing(relations: list[Index], heads: int, groups: list[int], lengths: list[int]) -> Witness | None:
    for n, group, head in product(lengths, groups, range(heads)):
        one, other = (alone(relation, n, head, heads, group) for relation in relations)
        found = first_difference(one, other, n)
        if found is not None:
            return Witness(found, head, group)
    return None


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
