"""`attnc receptive`: show which tokens a token depends on after each layer."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnc.compiler.ir import Extent
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.lowering.lower import lower
from attnc.compiler.lowering.specialise import reads_head
from attnc.compiler.receptive.fields import Layer, ReceptiveField, find_path, find_reach
from attnc.compiler.receptive.laws import Law, find_law
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.commands import console
from attnc.runtime.commands.patterns import analysed, given_inputs, length_of, value_json, whole_number
from attnc.runtime.patterns.layers import inputs_of_layer, layer_of, states_of
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.runtime.pictures.drawing import percent
from attnc.spec.meaning.parameter_values import shown

LENGTH = 16384
LAYERS = 8
HEADS = 8
"""The number of heads where a relation differs by head and nothing else fixes it."""

MOST_LINES = 40
"""A longer table shows only its first and last lines."""

OFTEN = 0.2
"""Seconds between two progress reports."""

EXAMPLES = """\
examples:
  attnc receptive sliding_window -p window=512 --len 16384 --layers 32
  attnc receptive sliding_window -p window=512 --times 5 --then causal --layers 36
  attnc receptive power --len 1048576 --path 0
"""


# --- arguments -------------------------------------------------------------------------------------------------------


class _OfPattern(argparse.Action):
    """An argument of the preceding pattern; SPEC and `--then` start a new pattern."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        entries = vars(namespace).setdefault("entries", [_entry()])
        if option == "--then":
            entries.append(_entry())
        last = entries[-1] if option else entries[0]
        name = "spec" if option == "--then" else self.dest
        if name in ("params", "inputs"):
            getattr(last, name).append(values)
        else:
            setattr(last, name, values)


def _entry() -> argparse.Namespace:
    return argparse.Namespace(spec=None, params=[], preset=None, grid=None, inputs=[], times=1)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `receptive`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES

    def of_pattern(option: str, metavar: str, text: str, **more: Any) -> None:
        parser.add_argument(option, metavar=metavar, help=text, action=_OfPattern, default=argparse.SUPPRESS, **more)

    names = "a library pattern, a path to an .attn file, file.attn:name, or source text"
    of_pattern("spec", "SPEC", f"the pattern of the first layer: {names}")
    text = "the pattern of the next layer; may be repeated; after the last pattern the first follows again"
    of_pattern("--then", "SPEC", text)
    of_pattern("--times", "N", "the number of consecutive layers with the preceding pattern (default 1)", type=int)
    of_pattern("-p", "NAME=VALUE", "a parameter of the preceding pattern; may be repeated", dest="params")
    of_pattern("--preset", "NAME", "a preset of the preceding pattern")
    of_pattern("--grid", "T,Y,X", "the extents of the token grid of the preceding pattern")
    text = "an input of the preceding pattern as a JSON list, or one number for every entry; inputs not given get "
    of_pattern("--input", "NAME=VALUE", f"{text}example values", dest="inputs")
    parser.add_argument("--layers", metavar="L", type=int, default=LAYERS, help=f"layers to list (default {LAYERS})")
    parser.add_argument(
        "--len", dest="n", metavar="N", type=whole_number, help=f"tokens (default {LENGTH}, or the patterns' length)"
    )
    parser.add_argument(
        "--query", metavar="Q", type=whole_number, help="the token whose receptive field is shown (default: the last)"
    )
    parser.add_argument(
        "--heads",
        metavar="H",
        type=int,
        help=f"heads (default: what the parameters say, else {HEADS} if the heads differ)",
    )
    text = "also show a path from token K to the query, token by token; may be repeated"
    console.add_repeated(parser, "--path", "paths", "K", text, type=int)


def _check(args: argparse.Namespace) -> None:
    options = [("--layers", args.layers), ("--len", args.n), ("--heads", args.heads)]
    console.check_at_least(1, *options, *(("--times", entry.times) for entry in args.entries))


# --- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stack:
    """The layers of a model: their patterns, each repeated `times`, in turn."""

    patterns: list[PatternAnalysis]
    times: list[int]
    n: int
    heads: int

    @property
    def order(self) -> list[int]:
        """The index of the pattern of each layer in one turn."""
        return [number for number, times in enumerate(self.times) for _ in range(times)]


@dataclass(frozen=True)
class _Way:
    """A path of a token to the query: the token that carries it in the input and after each layer.

    `tokens` is None where the query does not depend on `token`.
    """

    token: int
    tokens: tuple[int, ...] | None


def run(args: argparse.Namespace) -> int:
    """Compute the receptive field of the query, print it, and return the exit status."""
    _check(args)
    patterns = [analysed(entry) for entry in args.entries]
    stack = _Stack(patterns, [e.times for e in args.entries], _length(patterns, args.n), _heads(patterns, args.heads))
    query = stack.n - 1 if args.query is None else args.query
    for option, token in (("--query", query), *(("--path", path) for path in args.paths)):
        if not 0 <= token < stack.n:
            raise console.UsageError(f"{option} {token}: the tokens are 0 to {stack.n - 1}")
    layers, notes = _layers(stack, [entry.inputs for entry in args.entries])
    with console.progress("receptive", stack.n) as step:
        reach = find_reach(layers, stack.order, query, args.layers, args.paths, _progress_reports(step))
    ways = [
        _Way(token, None if layer is None else find_path(layers, stack.order, query, token, layer))
        for token, layer in zip(args.paths, reach.known, strict=True)
    ]
    facts = stack, reach, args.layers, ways, notes
    console.print_answer(args, _as_json(*facts), "\n".join(_in_words(*facts)))
    return console.FINE


def _progress_reports(step: console.ProgressStep) -> Callable[[int, int], None]:
    last = time.monotonic()

    def tell(layers: int, tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last > OFTEN:
            last = time.monotonic()
            step(f"{console.counted(layers, 'layer')}, {tokens:,} tokens", tokens)

    return tell


def _length(patterns: Sequence[PatternAnalysis], requested: int | None) -> int:
    lengths = {length_of(pattern.bound, requested, LENGTH) for pattern in patterns if pattern.bound.program.segments}
    if len(lengths) > 1:
        raise console.UsageError(
            f"the patterns have different lengths: {' and '.join(map(str, sorted(lengths)))} tokens"
        )
    return lengths.pop() if lengths else requested or LENGTH


def _heads(patterns: Sequence[PatternAnalysis], requested: int | None) -> int:
    counts = {n for n in (head_count(pattern.bound) for pattern in patterns) if n is not None}
    if requested is not None:
        return requested
    if len(counts) > 1:
        raise console.UsageError(
            f"the patterns' parameters are lists for {' and '.join(map(str, sorted(counts)))} heads; use one number"
        )
    return counts.pop() if counts else HEADS if any(map(_differs_by_head, patterns)) else 1


def _differs_by_head(pattern: PatternAnalysis) -> bool:
    lowered = lower(pattern.bound)
    scans = [root for recur in states_of(lowered) for root in (recur.order, recur.reset) if root is not None]
    relations = [*(node.visible for node in lowered.nodes), *scans]
    read = inputs_of_layer(pattern)
    by_input = any("head" in i.type.dims for i in pattern.bound.program.inputs if i.name in read)
    sizes = {node.name for relation in relations for node in walk(relation) if isinstance(node, Extent)}
    return by_input or any(map(reads_head, relations)) or bool(sizes & {"heads", "kv_heads", "group"})


def _layers(stack: _Stack, texts: Sequence[Sequence[str]]) -> tuple[list[Layer], list[str]]:
    layers, notes = [], []
    for pattern, input_texts in zip(stack.patterns, texts, strict=True):
        bound = pattern.bound
        inputs = given_inputs(bound, input_texts, stack.n, stack.n)
        examples = example_inputs(bound, stack.n, stack.n, inputs, heads=stack.heads, names=inputs_of_layer(pattern))
        inputs |= pattern._arrays_of(examples)
        layers.append(layer_of(pattern, stack.n, stack.heads, inputs))
        notes += [f"{name}, an example: {example.words}" for name, example in examples.items()]
    notes += [
        f"{pattern.name} selects by content: a token counts as seeing every key that may be selected"
        for pattern in stack.patterns
        if pattern.pattern.selections
    ]
    notes += [note for pattern in stack.patterns for note in _state_notes(pattern)]
    if stack.heads > 1:
        notes.append(f"{stack.heads} heads: a token counts as seeing what any head sees")
    return layers, list(dict.fromkeys(notes))


def _state_notes(pattern: PatternAnalysis) -> Iterable[str]:
    """Yield a note for each state about how far back it is assumed to reach."""
    lowered = lower(pattern.bound)
    documents = "" if lowered.documents is None else " of its document"
    for recur in states_of(lowered):
        since = "" if recur.reset is None else " since the last reset"
        order = "" if recur.order is None else ", in the order of its scan"
        name = pattern.name if recur.name == pattern.name else f"{pattern.name}: {recur.name}"
        reach = f"all tokens before it{documents}{since}{order}"
        yield f"{name} is a state: a token depends on {reach}, as far as the state holds them"


# --- words -----------------------------------------------------------------------------------------------------------


def _growth_laws(reach: ReceptiveField) -> dict[str, Law | None]:
    """Return the laws by which the receptive field grows from layer 1 to the last layer that adds tokens, exclusive."""
    layers = reach.after[1 : reach.final]
    return {
        "tokens": find_law([item.tokens for item in layers]),
        "all within": find_law([item.within for item in layers]),
    }


def _in_words(
    stack: _Stack, reach: ReceptiveField, layers: int, ways: Sequence[_Way], notes: Sequence[str]
) -> Iterable[str]:
    turn = [
        f"{f'{times} × ' if times > 1 else ''}{_call(pattern)}"
        for pattern, times in zip(stack.patterns, stack.times, strict=True)
    ]
    yield turn[0] if len(turn) == 1 else f"layers in turn: {', '.join(turn)}"
    should = "k <= q" if reach.looks_back else "all tokens"
    yield f"{reach.n:,} tokens, query {reach.query:,}; it should see {should}: {reach.wanted:,}"
    yield ""
    yield from _table(reach, layers)
    yield ""
    by_law: dict[Law, list[str]] = {}
    for name, law in _growth_laws(reach).items():
        if law is not None:
            by_law.setdefault(law, []).append(name)
    for law, names in by_law.items():
        yield f"growth    {' and '.join(names)}, {law} (layers 1 – {law.count:,})"
    yield f"result    {_result(reach, layers)}"
    for way in ways:
        yield f"path      {_path_text(way, reach)}"
    for note in notes:
        yield f"note      {note}"


def _call(pattern: PatternAnalysis) -> str:
    values = ", ".join(f"{name} = {shown(value)}" for name, value in pattern.bound.values.items())
    return f"{pattern.name}({values})" if values else pattern.name


def _table(reach: ReceptiveField, layers: int) -> Iterable[str]:
    width = max(len(f"{reach.n:,}"), len("all within"))
    yield f"layer {'tokens':>{width}} {'share':>9} {'furthest':>{width}} {'all within':>{width}}"
    last = layers if reach.final is None else min(layers, reach.final)
    lines = [
        f"{item.layer:>5} {item.tokens:>{width},} {percent(item.tokens / reach.wanted):>9} "
        f"{item.furthest:>{width},} {item.within:>{width},}"
        for item in reach.after[: last + 1]
    ]
    half = MOST_LINES // 2
    yield from lines if len(lines) <= MOST_LINES else [*lines[:half], "    …", *lines[-half:]]
    if last < layers:
        yield f"{last + 1:>5} – {layers}: the same" if last + 1 < layers else f"{layers:>5}: the same"


def _result(reach: ReceptiveField, layers: int) -> str:
    if reach.complete is not None:
        before = "" if reach.complete <= layers else f"not within {console.counted(layers, 'layer')}; "
        return f"{before}it sees everything that it should from layer {reach.complete:,} on"
    if reach.final is not None:
        reached = f"{reach.after[-1].tokens:,} of {reach.wanted:,} tokens"
        return f"it never sees everything that it should: {reached} from layer {reach.final:,} on"
    return f"not within {len(reach.after) - 1:,} layers"


def _path_text(way: _Way, reach: ReceptiveField) -> str:
    if way.tokens is None:
        return f"{way.token:,}: {'never reached' if reach.final is not None else _result(reach, 0)}"
    path = [f"{token:,}" for token in way.tokens]
    if len(path) > 12:
        path = [*path[:6], "…", *path[-5:]]
    layers = console.counted(len(way.tokens) - 1, "layer")
    return f"{way.token:,}: reaches the query after {layers}, for example by {' → '.join(path)}"


# --- JSON ------------------------------------------------------------------------------------------------------------


def _as_json(
    stack: _Stack, reach: ReceptiveField, layers: int, ways: Sequence[_Way], notes: Sequence[str]
) -> dict[str, object]:
    fields = list(reach.after[: layers + 1])
    fields += fields[-1:] * (layers + 1 - len(fields))  # the field after its last layer stays as it is
    return {
        "patterns": [
            {
                "pattern": pattern.name,
                "params": {name: value_json(value) for name, value in pattern.bound.values.items()},
                "times": times,
            }
            for pattern, times in zip(stack.patterns, stack.times, strict=True)
        ],
        "tokens": reach.n,
        "query": reach.query,
        "heads": stack.heads,
        "should_see": "k <= q" if reach.looks_back else "all",
        "wanted": reach.wanted,
        "layers": [
            {
                "layer": layer,
                "tokens": item.tokens,
                "share": item.tokens / reach.wanted,
                "furthest": item.furthest,
                "all_within": item.within,
            }
            for layer, item in enumerate(fields)
        ],
        "complete_from": reach.complete,
        "final_from": reach.final,
        "followed": len(reach.after) - 1,
        "growth": {name.replace(" ", "_"): _law_json(law) for name, law in _growth_laws(reach).items()},
        "paths": [{"token": way.token, "tokens": None if way.tokens is None else list(way.tokens)} for way in ways],
        "notes": list(notes),
    }


def _law_json(law: Law | None) -> dict[str, object] | None:
    return None if law is None else {"kind": law.kind, "step": law.step, "degree": law.degree, "layers": law.count}
