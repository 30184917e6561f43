"""The catalogue: an index of the library, and a page for each family with pictures, texts, ladders and growth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from headlines import HEADLINES, Headline
from torch import Tensor

from attnc import ArgumentError, AttncError, compile_attention
from attnc.compiler.simulation.machine import MachineError
from attnc.compiler.simulation.print_simulation import times
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation
from attnc.compiler.simulation.simulation import RungName, Simulation
from attnc.runtime.attention import Attention
from attnc.runtime.commands.list_patterns import FAMILIES, LibraryEntry, entries
from attnc.runtime.commands.simulate_cases import LENGTH
from attnc.runtime.example_inputs import example_inputs, head_count
from attnc.runtime.lengths import natural_length
from attnc.runtime.library import library_files, library_names
from attnc.runtime.pictures.draw import MOST_CHOSEN
from attnc.runtime.pictures.tile_map import make_tile_map
from attnc.runtime.pictures.tile_svg import tile_map_svg

DEVICE = "h100"
"""The machine of all ladders: one that is described, so that the pages are the same wherever they are made."""

LONGEST = 24
"""Lines of a derivation that are shown."""

INDEX = """# The catalogue

Every pattern of the library by name: `compile_attention("sliding_window", window=512)`. `attnc list` prints them, and
`attnc list video` those that have the word in name, text or source.

<!-- Written by `python docs/generate.py` from stdlib_patterns/*/*.attn; do not edit. -->

Each has a page with its text, its picture in elements and tiles, the tiles at its headline size, the ladder of bounds
there, and how it grows. The headline is the first preset, as far as it is known the setting of its paper's main result,
at its grid, its paper's length or 16,384 tokens; a few are shorter, where what has to be counted is long. Bounds are
[those of `attnc simulate`](simulate.md) for the forward pass on an H100: a model of published figures, **nothing here
was measured**. `element` counts visible pairs alone, `tile` whole tiles, `predicted` all that the model knows. The
rival is dense causal attention for recurrences and for patterns that show no key behind its query, else full attention.

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
    "routing": "What a query sees depends on what the vectors hold: a `select` ranks places by a score and keeps some "
    "([routing](../routing.md)), or the caller chose before. The pictures are of random vectors.",
    "recurrences": "Tokens update a state one after another ([recurrences](../recurrences.md)). In place of a picture "
    "stands what is derived from the text: the passes that are computed chunk by chunk, or why it runs token by token; "
    "in place of tiles the chunks with their operations for a token.",
    "modules": "Definitions for other patterns, brought in by `use`.",
}
OTHERWISE = "Pictures are drawn by `attnc show NAME -o FILE.svg`, of tiles with `--tiles`; inputs are examples."
MODULES = "modules"


@dataclass(frozen=True)
class Shown:
    """A pattern of the library at its headline."""

    entry: LibraryEntry
    drawn: bool
    headline: Headline

    @property
    def name(self) -> str:
        """Its name."""
        return self.entry.program.name

    @cached_property
    def preset(self) -> str | None:
        """The preset of the headline: its first where nothing else is said."""
        presets = self.entry.program.presets
        return self.headline.preset or (presets[0].name if presets else None)

    @cached_property
    def attention(self) -> Attention:
        """It, with the headline's parameters."""
        return compile_attention(self.name, preset=self.preset, **self.headline.params)

    @cached_property
    def heads(self) -> int:
        """Query heads."""
        return head_count(self.attention.bound) or self.headline.heads

    @cached_property
    def n_q(self) -> int:
        """Queries."""
        return self.headline.length or natural_length(self.attention.bound, LENGTH) or LENGTH

    @property
    def n_k(self) -> int:
        """Keys."""
        return self.headline.keys or self.n_q

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The headline's inputs, and examples of the others that the relation reads."""
        given = dict(self.headline.inputs(self.n_q))
        if self.attention.is_recurrence:
            return given
        wanted = self.attention.relation_inputs
        sizes = {"heads": self.heads, "kv_head": self.headline.kv_heads or self.heads, "dk": 128, "dv": 128}
        made = example_inputs(
            self.attention.bound, self.n_q, self.n_k, given, heads=self.heads, sizes=sizes, names=wanted
        )
        return given | {name: example.tensor for name, example in made.items()}

    @cached_property
    def simulation(self) -> Simulation | str:
        """The ladder, or why there is none."""
        call = self.headline
        sizes = {"heads": self.heads, "kv_heads": call.kv_heads, "head_dim": call.head_dim}
        try:
            return self.attention.simulate(self.n_q, self.n_k, device=DEVICE, **sizes, **self.inputs)
        except (AttncError, MachineError) as error:
            return str(error).splitlines()[0]

    @cached_property
    def growth(self) -> str:
        """The law, with its formula where there is one."""
        if isinstance(self.simulation, RecurrenceSimulation):
            return self.simulation.growth
        try:
            found = self.attention.growth(heads=None if head_count(self.attention.bound) else self.heads)
        except AttncError as error:
            return f"no law: {str(error).splitlines()[0]}"
        whose = "" if found.heads == 1 else f" of {found.heads} heads"
        return found.law + ("" if found.pairs is None else f"; visible pairs{whose}: {found.pairs}")

    @property
    def law(self) -> str:
        """The law alone."""
        law = self.growth.partition(";")[0]
        return "–" if law.startswith("no law") else law

    @property
    def size(self) -> str:
        """The headline in a few words."""
        tokens = f"{self.n_q:,}" if self.n_q == self.n_k else f"{self.n_q:,} on {self.n_k:,}"
        changed = "".join(f"{name} = {value}, " for name, value in self.headline.params.items())
        return f"{f'`{self.preset}`, ' if self.preset else ''}{changed}{tokens}"

    def bound(self, *names: RungName) -> str:
        """The first of these rungs that the ladder has."""
        if isinstance(self.simulation, str):
            return "–"
        rungs = {rung.name: rung.speedup for rung in self.simulation.rungs}
        return next((times(rungs[name]) for name in names if name in rungs), "–")

    def tile_map(self) -> str | None:
        """The SVG of its tiles at the headline, or at the longest that is drawn; None where it has no tiles."""
        pattern = self.attention.pattern
        stateful = self.attention.is_recurrence or self.entry.program.stateful
        if not self.drawn or stateful or pattern.selections or any(node.keys is not None for node in pattern.nodes):
            return None
        several = len(pattern.nodes) > 1 or pattern.nodes[0].family is not None
        n_q, n_k = self.n_q, self.n_k
        if several and n_q * n_k > MOST_CHOSEN:
            return None
        try:
            return tile_map_svg(make_tile_map(self.attention, n_q, n_k, self._inputs_of_a_head()))
        except ArgumentError:  # an input of which there is no example, as the ladder says then
            return None

    def _inputs_of_a_head(self) -> dict[str, Any]:
        """The inputs, of one head alone: the first."""
        dims = {item.name: item.type.dims for item in self.entry.program.inputs}
        return {name: _of_a_head(tensor, dims[name]) for name, tensor in self.inputs.items()}


def _of_a_head(tensor: Tensor, dims: Sequence[object]) -> Tensor:
    """A tensor with the first of its heads alone."""
    for axis, dim in enumerate(dims):
        if dim in ("head", "kv_head"):
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


@dataclass(frozen=True)
class Catalogue:
    """All patterns; `drawn`: those of which there is a picture in `pictures/`."""

    drawn: frozenset[str]

    @cached_property
    def shown(self) -> list[Shown]:
        """By family and name."""
        return [
            Shown(entry, entry.program.name in self.drawn, HEADLINES.get(entry.program.name, Headline()))
            for entry in entries()
        ]

    @cached_property
    def tile_maps(self) -> dict[str, str]:
        """The maps of tiles by path below docs/."""
        maps = {f"pictures/tiles/{shown.name}.svg": shown.tile_map() for shown in self.shown}
        return {path: svg for path, svg in maps.items() if svg is not None}

    def pages(self) -> dict[str, str]:
        """The index and the page of each family by path below docs/."""
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
        for shown in self._of(family):
            link = f"[`{shown.name}`](catalogue/{family}.md#{shown.name})"
            bounds = (shown.bound("element", "memory"), shown.bound("tile", "units"), shown.bound("predicted"))
            rows.append([link, _cell(shown.entry.summary), _cell(shown.law), shown.size, *bounds])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"## {family.capitalize()}\n\n[{_sentence(about)}](catalogue/{family}.md)\n\n{lines}"

    def _of(self, family: str) -> list[Shown]:
        return [shown for shown in self.shown if shown.entry.family == family]

    def _family(self, family: str) -> str:
        shown = self._of(family)
        return FAMILY.format(
            title=family.capitalize(),
            about=FAMILIES.get(family, ""),
            family=family,
            words=WORDS.get(family, OTHERWISE),
            contents=_contents([one.name for one in shown]),
            sections="\n\n".join("\n".join(self._section(one)) for one in shown),
        )

    def _section(self, shown: Shown) -> Iterator[str]:
        name = shown.name
        yield f"## {name}\n\n```attn\n{shown.entry.file.read_text(encoding='utf-8')}```\n"
        if shown.drawn:
            yield f"![{name}: who sees whom, in elements and in tiles](../pictures/{name}.svg)\n"
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
    """The first lines of a long derivation: that of many branches which are alike."""
    lines = derivation.splitlines()
    if len(lines) <= LONGEST:
        return derivation
    return "\n".join([*lines[: LONGEST // 2], f"… and {len(lines) - LONGEST // 2} lines more"])


def _ladder(found: Simulation) -> str:
    """The lines of a simulation that are no matter of other schedules."""
    left_out = ("time ", "loop ", "memory  ", "next best", "else ")
    lines = [line for line in str(found).splitlines() if not line.startswith(left_out)]
    return "\n".join(lines)


def _states(shown: Shown) -> str:
    """Return the state that is kept from token to token, and its size at the headline's heads."""
    pattern = shown.attention.pattern
    recurs = pattern.stateful if pattern.recur is None else (pattern.recur,)
    states = [state for recur in recurs for state in recur.states]
    names = ", ".join(dict.fromkeys(f"`{x.name}` [{', '.join(map(str, x.dims))}]" for x in states))
    kept = f"State of a head: {names}"
    sizes: dict[object, int] = {"dk": shown.headline.head_dim, "dv": shown.headline.head_dim}
    known = all(isinstance(dim, int) or dim in sizes for state in states for dim in state.dims)
    if not known:
        return f"{kept}."
    count = sum(prod(dim if isinstance(dim, int) else sizes[dim] for dim in state.dims) for state in states)
    several = f" in {len(states)} of them" if len(states) > 1 else ""
    return f"{kept}; {count:,} numbers{several} at heads of {shown.headline.head_dim}."


def _command(shown: Shown) -> str:
    """The command that prints the ladder, up to inputs that the catalogue makes."""
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
