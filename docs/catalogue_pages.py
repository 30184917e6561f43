"""The catalogue: an index of the library, and a page for each family with pictures, texts, ladders and growth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any

from headlines import HEADLINES, Headline
from torch import Tensor

from attnc import ArgumentError, AttncError, compile_attention
from attnc.compiler.simulation.machine import MachineError
from attnc.compiler.simulation.print_simulation import times
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation
from attnc.compiler.simulation.simulation import RungName, Simulation
from attnc.runtime.api.attention import Attention
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.call.lengths import natural_length
from attnc.runtime.commands.list_patterns import FAMILIES, LibraryEntry, entries
from attnc.runtime.commands.simulate_cases import LENGTH
from attnc.runtime.pictures.draw import MOST_CHOSEN
from attnc.runtime.pictures.tile_map import make_tile_map
from attnc.runtime.pictures.tile_svg import tile_map_svg
from attnc.runtime.texts.library import library_files, library_names

DEVICE = "h100"
"""The machine of all ladders: a described one, so that the pages do not depend on the machine that makes them."""

LONGEST = 24
"""Maximum number of lines of a derivation."""

INDEX = """# The catalogue

Every pattern of the library by name: `compile_attention("sliding_window", window=512)`. `attnc list` prints them, and
`attnc list video` prints those with the word in their name, text or source.

<!-- Written by `python docs/generate.py` from stdlib_patterns/*/*.attn; do not edit. -->

Each pattern's page has its text, its picture in elements and tiles, and at its headline its tiles, its ladder of bounds
and its growth. The headline is the first preset, where known the setting of the paper's main result, at its grid, its
paper's length or 16,384 tokens; a few headlines are shorter, because their counts take long. Bounds are computed by
[`attnc simulate`](simulate.md) for the forward pass on an H100: a model of published figures, **nothing here was
measured**. `element` counts visible pairs, `tile` live tiles, `predicted` every cost of the model. The rival is dense
causal attention for recurrences and for patterns without keys after their query, else full attention.

{contents}

{families}
"""

FAMILY = """# {title}: {about}

<!-- Written by `python docs/generate.py` from stdlib_patterns/{family}/*.attn; do not edit. -->

Part of [the catalogue](../catalogue.md). {words}

{contents}

{sections}
"""

WORDS = {
    "routing": "The visible keys depend on the content of the vectors: a `select` ranks blocks or tokens by a score "
    "and keeps some ([routing](../routing.md)), or the caller passes the selection. The pictures show random vectors.",
    "recurrences": "Tokens update a state one after another ([recurrences](../recurrences.md)). Instead of a picture, "
    "a page shows the form derived from the text: the passes that are computed chunk by chunk, or why the pattern runs "
    "token by token; instead of tiles, the chunks with their operations per token.",
    "modules": "Definitions for other patterns, imported by `use`.",
}
OTHERWISE = "`attnc show NAME -o FILE.svg` draws the pictures, with `--tiles` the tiles; inputs are examples."
MODULES = "modules"


@dataclass(frozen=True)
class Shown:
    """A pattern of the library at its headline."""

    entry: LibraryEntry
    headline: Headline

    @property
    def name(self) -> str:
        """The pattern's name."""
        return self.entry.program.name

    @cached_property
    def preset(self) -> str | None:
        """The preset of the headline: the headline's own, else the first one."""
        presets = self.entry.program.presets
        return self.headline.preset or (presets[0].name if presets else None)

    @cached_property
    def attention(self) -> Attention:
        """The pattern, compiled with the headline's parameters."""
        return compile_attention(self.name, preset=self.preset, **self.headline.params)

    @cached_property
    def heads(self) -> int:
        """The number of query heads."""
        return head_count(self.attention.bound) or self.headline.heads

    @cached_property
    def n_q(self) -> int:
        """The number of queries."""
        return self.headline.length or natural_length(self.attention.bound, LENGTH) or LENGTH

    @property
    def n_k(self) -> int:
        """The number of keys."""
        return self.headline.keys or self.n_q

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The headline's inputs, and examples of the others that the relation reads."""
        inputs = dict(self.headline.inputs(self.n_q))
        if self.attention.is_recurrence:
            return inputs
        wanted = self.attention.relation_inputs
        sizes = {"heads": self.heads, "kv_head": self.headline.kv_heads or self.heads, "dk": 128, "dv": 128}
        made = example_inputs(
            self.attention.bound, self.n_q, self.n_k, inputs, heads=self.heads, sizes=sizes, names=wanted
        )
        return inputs | {name: example.tensor for name, example in made.items()}

    @cached_property
    def simulation(self) -> Simulation | str:
        """The ladder, or the reason why there is none."""
        call = self.headline
        sizes = {"heads": self.heads, "kv_heads": call.kv_heads, "head_dim": call.head_dim}
        try:
            return self.attention.simulate(self.n_q, self.n_k, device=DEVICE, **sizes, **self.inputs)
        except (AttncError, MachineError) as error:
            return str(error).splitlines()[0]

    @cached_property
    def growth(self) -> str:
        """The law of growth, with its formula if there is one."""
        if isinstance(self.simulation, RecurrenceSimulation):
            return self.simulation.growth
        try:
            growth = self.attention.growth(heads=None if head_count(self.attention.bound) else self.heads)
        except AttncError as error:
            return f"no law: {str(error).splitlines()[0]}"
        whose = "" if growth.heads == 1 else f" of {growth.heads} heads"
        return growth.law + ("" if growth.pairs is None else f"; visible pairs{whose}: {growth.pairs}")

    @property
    def law(self) -> str:
        """The law of growth alone."""
        law = self.growth.partition(";")[0]
        return "–" if law.startswith("no law") else law

    @property
    def size(self) -> str:
        """A short description of the headline."""
        tokens = f"{self.n_q:,}" if self.n_q == self.n_k else f"{self.n_q:,} on {self.n_k:,}"
        changed = "".join(f"{name} = {value}, " for name, value in self.headline.params.items())
        return f"{f'`{self.preset}`, ' if self.preset else ''}{changed}{tokens}"

    def bound(self, *names: RungName) -> str:
        """Return the speedup of the first of these rungs that the ladder has."""
        if isinstance(self.simulation, str):
            return "–"
        rungs = {rung.name: rung.speedup for rung in self.simulation.rungs}
        return next((times(rungs[name]) for name in names if name in rungs), "–")

    def tile_map(self) -> str | None:
        """Return the SVG of the tiles at the headline, or at the longest length that is drawn; None without tiles."""
        pattern = self.attention.pattern
        stateful = self.attention.is_recurrence or self.entry.program.stateful
        if stateful or pattern.selections or any(node.keys is not None for node in pattern.nodes):
            return None
        several = len(pattern.nodes) > 1 or pattern.nodes[0].family is not None
        n_q, n_k = self.n_q, self.n_k
        if several and n_q * n_k > MOST_CHOSEN:
            return None
        try:
            return tile_map_svg(make_tile_map(self.attention, n_q, n_k, self._first_head_inputs()))
        except ArgumentError:  # an input without an example, as the ladder reports then
            return None

    def _first_head_inputs(self) -> dict[str, Any]:
        """Return the inputs of the first head."""
        dims = {item.name: item.type.dims for item in self.entry.program.inputs}
        return {name: _first_head(tensor, dims[name]) for name, tensor in self.inputs.items()}


def _first_head(tensor: Tensor, dims: Sequence[object]) -> Tensor:
    """Return the part of a tensor that belongs to its first head."""
    for axis, dim in enumerate(dims):
        if dim in ("head", "kv_head"):
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


@cache
def every_shown() -> tuple[Shown, ...]:
    """Return the patterns by family and name; a process simulates each of them once."""
    return tuple(Shown(entry, HEADLINES.get(entry.program.name, Headline())) for entry in entries())


@dataclass(frozen=True)
class Catalogue:
    """All patterns; `drawn`: those with a picture in `pictures/`."""

    drawn: frozenset[str]

    @property
    def shown(self) -> tuple[Shown, ...]:
        """The patterns by family and name."""
        return every_shown()

    @cached_property
    def tile_maps(self) -> dict[str, str]:
        """The tile maps by path below docs/."""
        maps = {
            f"pictures/tiles/{shown.name}.svg": shown.tile_map() for shown in self.shown if shown.name in self.drawn
        }
        return {path: svg for path, svg in maps.items() if svg is not None}

    def pages(self) -> dict[str, str]:
        """Return the index and the page of each family by path below docs/."""
        families = {shown.entry.family: "" for shown in self.shown}
        pages = {f"catalogue/{family}.md": self._family(family) for family in families}
        pages[f"catalogue/{MODULES}.md"] = _modules()
        contents = " · ".join(f"[{family.capitalize()}](catalogue/{family}.md)" for family in (*families, MODULES))
        tables = "\n\n".join(self._table(family) for family in families)
        return {"catalogue.md": INDEX.format(contents=contents, families=tables), **pages}

    def _table(self, family: str) -> str:
        about = FAMILIES.get(family, "")
        head = ["pattern", "in one line", "growth", "headline", "element", "tile", "predicted"]
        if family == "recurrences":
            head = ["pattern", "in one line", "growth", "headline", "memory", "units", "predicted"]
        rows = [head, ["---"] * len(head)]
        for shown in self._patterns_of(family):
            link = f"[`{shown.name}`](catalogue/{family}.md#{shown.name})"
            bounds = (shown.bound("element", "memory"), shown.bound("tile", "units"), shown.bound("predicted"))
            rows.append([link, _cell(shown.entry.summary), _cell(shown.law), shown.size, *bounds])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"## {family.capitalize()}\n\n[{_sentence(about)}](catalogue/{family}.md)\n\n{lines}"

    def _patterns_of(self, family: str) -> list[Shown]:
        return [shown for shown in self.shown if shown.entry.family == family]

    def _family(self, family: str) -> str:
        shown = self._patterns_of(family)
        return FAMILY.format(
            title=family.capitalize(),
            about=FAMILIES.get(family, ""),
            family=family,
            words=WORDS.get(family, OTHERWISE),
            contents=_contents([pattern.name for pattern in shown]),
            sections="\n\n".join("\n".join(self._section(pattern)) for pattern in shown),
        )

    def _section(self, shown: Shown) -> Iterator[str]:
        name = shown.name
        yield f"## {name}\n\n```attn\n{shown.entry.file.read_text(encoding='utf-8')}```\n"
        if name in self.drawn:
            yield f"![{name}: visible pairs, in elements and in tiles](../pictures/{name}.svg)\n"
        if shown.entry.program.recurrence or shown.entry.program.stateful:
            yield f"{_states(shown)}\n\n```text\n{_shortened(shown.attention.derivation())}\n```\n"
        yield f"At the headline, `{_command(shown)}`:\n"
        if f"pictures/tiles/{name}.svg" in self.tile_maps:
            yield f"![{name}: its tiles at the headline](../pictures/tiles/{name}.svg)\n"
        if isinstance(shown.simulation, str):
            yield f"No ladder: {shown.simulation}.\n"
        else:
            yield f"```text\n{_ladder(shown.simulation)}\n```\n"
        yield f"Growth: {shown.growth}."


def _shortened(derivation: str) -> str:
    """Shorten a long derivation, of similar branches, to its first lines."""
    lines = derivation.splitlines()
    if len(lines) <= LONGEST:
        return derivation
    return "\n".join([*lines[: LONGEST // 2], f"… and {len(lines) - LONGEST // 2} lines more"])


def _ladder(simulation: Simulation) -> str:
    """Return the lines of a simulation, without those about other schedules."""
    left_out = ("time ", "loop ", "memory  ", "next best", "else ")
    lines = [line for line in str(simulation).splitlines() if not line.startswith(left_out)]
    return "\n".join(lines)


def _states(shown: Shown) -> str:
    """Return the state that is kept from token to token, and its size at the headline's heads."""
    pattern = shown.attention.pattern
    recurs = pattern.stateful if pattern.recur is None else (pattern.recur,)
    states = [state for recur in recurs for state in recur.states]
    names = ", ".join(dict.fromkeys(f"`{x.name}` [{', '.join(map(str, x.dims))}]" for x in states))
    kept = f"State of a head: {names}"
    sizes: dict[object, int] = {"dk": shown.headline.head_dim, "dv": shown.headline.head_dim}
    are_known = all(isinstance(dim, int) or dim in sizes for state in states for dim in state.dims)
    if not are_known:
        return f"{kept}."
    count = sum(prod(dim if isinstance(dim, int) else sizes[dim] for dim in state.dims) for state in states)
    several = f" in {len(states)} of them" if len(states) > 1 else ""
    return f"{kept}; {count:,} numbers{several} at heads of {shown.headline.head_dim}."


def _command(shown: Shown) -> str:
    """Return the command that prints the ladder, without inputs that the catalogue draws."""
    call = shown.headline
    parts = ["attnc simulate", shown.name]
    parts += [f"--preset {shown.preset}"] if shown.preset else []
    parts += [f"-p {name}={value}" for name, value in call.params.items()]
    parts += [f"--len {shown.n_q}"]
    parts += [f"--keys {shown.n_k}"] if shown.n_k != shown.n_q else []
    parts += [f"--heads {shown.heads}"]
    parts += [f"--kv-heads {call.kv_heads}"] if call.kv_heads else []
    parts += [f"--head-dim {call.head_dim}"] if call.head_dim != Headline().head_dim else []
    return " ".join(parts)


def _modules() -> str:
    files = {name: file for name, file in library_files().items() if name not in library_names()}
    sections = [f"## {name}\n\n```attn\n{file.read_text(encoding='utf-8')}```" for name, file in files.items()]
    return FAMILY.format(
        title="Modules",
        about="definitions that patterns share",
        family=MODULES,
        words=WORDS[MODULES],
        contents=_contents(list(files)),
        sections="\n\n".join(sections),
    )


def _contents(names: Sequence[str]) -> str:
    return " · ".join(f"[`{name}`](#{name})" for name in names)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"
