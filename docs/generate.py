"""Write the parts of the documents that come from code: the pictures, the catalogue, `reference.md`, `coverage.md`.

python docs/generate.py            write them
python docs/generate.py --check    only list files that are not current; exit status 1 if there are any
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnc
from attnc import AttncError, compile_attention
from attnc.runtime.executors.registry import TABLE
from attnc.runtime.fallbacks import KINDS
from attnc.runtime.pictures.draw import make_drawing, to_svg
from attnc.runtime.process.environment import VARIABLES
from attnc.runtime.texts.library import (
    library_files,
    library_names,
    pattern_names,
    routing_names,
)

DOCS = Path(__file__).parent
for folder in (DOCS, DOCS.parent / "tests" / "stdlib_patterns"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # modules beside this file, which is run by its path, and the tests' reasons

from catalogue_pages import Catalogue  # noqa: E402

LENGTH = 64


@dataclass(frozen=True)
class Picture:
    """The options of a pattern's picture: by default 64 queries and keys, its own defaults, example inputs, head 0."""

    params: Mapping[str, Any] = field(default_factory=dict)
    queries: int = LENGTH
    keys: int | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    head: int = 0

    def svg(self, name: str) -> str:
        """Return the picture of a pattern of the library."""
        attention = compile_attention(name, **self.params)
        keys = self.queries if self.keys is None else self.keys
        return to_svg(make_drawing(attention, self.queries, keys, self.inputs, head=self.head))


def _tree(nodes: int) -> Tensor:
    """Return the ancestors in a binary tree, each node included in its own."""
    sees = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        sees[node] |= sees[(node - 1) // 2]
    return sees[None]


def _random_blocks(heads: int, blocks: int, count: int) -> Tensor:
    numbers = torch.arange(heads * blocks * count).reshape(heads, blocks, count)
    return (numbers * 7 + numbers // 5) % blocks


def _indexer(n: int) -> dict[str, Tensor]:
    """Draw the queries, keys and weights of an indexer."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"iq": (1, n, 2, 8), "ik": (1, n, 8), "w": (1, n, 2)}
    return {name: torch.randn(size, generator=draw) for name, size in sizes.items()}


def _map(blocks: int) -> dict[str, Tensor]:
    """Draw a map of blocks."""
    return {"map": torch.rand((1, 1, blocks, blocks), generator=torch.Generator().manual_seed(0)) > 0.6}


def _gates(blocks: int) -> dict[str, Tensor]:
    """Draw pooled queries and keys of a gate, by block."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn((1, 1, blocks, 8), generator=draw) for name in ("gq", "gk")}


def _clusters(**counts: int) -> dict[str, Tensor]:
    """Draw a cluster for each token, from this number of clusters."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randint(0, count, (1, 1, LENGTH), generator=draw) for name, count in counts.items()}


def _pieces(size: int) -> dict[str, Tensor]:
    """Return the first token and the end of each token's piece."""
    begin = torch.arange(LENGTH) // size * size
    return {"begin": begin[None], "stop": (begin + size).clamp(max=LENGTH)[None]}


def _centroids(count: int) -> dict[str, Tensor]:
    """Draw centroids, with a key and a value for each."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"mu": (1, count, 16), "memory_k": (1, count, 1, 16), "memory_v": (1, count, 1, 16)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def _pictures() -> dict[str, Tensor]:
    """Return which tokens belong to one of two pictures among words, and the count of these tokens up to each."""
    tokens = torch.arange(LENGTH)
    vision = ((tokens >= 8) & (tokens < 28) | (tokens >= 36) & (tokens < 56))[None]
    return {"vision": vision, "visuals": vision.cumsum(1)}


def _predicted(n: int) -> dict[str, Tensor]:
    """Draw shares of a basis for each query, and the basis by key."""
    draw = torch.Generator().manual_seed(0)
    shares = torch.randn((1, 1, n, 4), generator=draw, dtype=torch.float64).softmax(-1)
    return {"coef": shares, "basis": torch.randn((n, 4), generator=draw, dtype=torch.float64)}


def _noisy(n: int) -> Tensor:
    """Draw positions of tokens, with noise."""
    return (torch.arange(n) + 6 * torch.randn(n, generator=torch.Generator().manual_seed(0)))[None]


DRAWN: dict[str, Picture] = {
    "bigbird": Picture({"block": 4}, inputs={"random": _random_blocks(1, 16, 2)}),
    "block_diffusion": Picture({"block": 4}),
    "blocked": Picture({"block": 16}, queries=60),
    "combiner": Picture({"segment": 8}),
    "combiner_axial": Picture({"width": 8}),
    "combiner_log_sparse": Picture({"levels": 6}),
    "combiner_mixture": Picture({"width": 8}),
    "davit_window": Picture({"height": 8, "width": 8, "window": 4}),
    "dilated_window": Picture({"window": 8, "dilation": 3}),
    "freeswim": Picture({"frames": 2, "height": 5, "width": 8, "reach": [1, 2]}, queries=80),
    "halo": Picture({"height": 8, "width": 8, "block": 4, "halo": 1}),
    "hierarchical": Picture({"group": 8}),
    "landmark": Picture({"block": 7}),
    "lingen_temporal": Picture({"frames": 4, "height": 4, "width": 4, "window": [2, 2, 4], "layer": 1}),
    "log_sparse": Picture({"segment": 32, "window": 64}),
    "long_lora": Picture(head=1),
    "longformer": Picture({"window": 4, "dilation": [2]}, inputs={"is_global": torch.arange(LENGTH)[None] % 20 == 5}),
    "moa": Picture({"alpha": [4, 8], "beta": [0, 0.25], "block": 4}, head=1),
    "modality_mutual": Picture(
        inputs={name: torch.tensor([at]) for name, at in (("image_start", 8), ("text_start", 32), ("text_end", 48))}
    ),
    "monarch": Picture({"rows": 8, "cols": 8}),
    "monarch_rt": Picture({"frames": 2, "height": 4, "width": 8}),
    "neighborhood_1d": Picture({"window": 9, "stride": 3}),
    "neighborhood_2d": Picture({"height": 8, "width": 8, "window": 3}),
    "neighborhood_3d": Picture(
        {"frames": 4, "height": 4, "width": 5, "window": [2, 3, 3], "causal": [True, False, False]}, queries=80
    ),
    "power": Picture({"window": 2, "block": 4}),
    "radial": Picture({"frames": 5, "per_frame": 160, "decay": 0.5, "block": 16}, queries=800),
    "s2_attention": Picture({"block": 4, "local_blocks": 2, "vertical_stride": 4}, head=1),
    "sliding_tile": Picture({"frames": 4, "height": 4, "width": 4, "tile": 2, "kernel": [2, 2, 4]}, queries=70),
    "sliding_window": Picture({"window": 16, "sinks": 2}),
    "sparse_fixed": Picture({"segment": 16, "summary": 4}),
    "sparse_transformer": Picture({"stride": 8}, head=1),
    "streaming": Picture({"sinks": 4, "window": 12, "last": 6}),
    "strided": Picture({"stride": 8, "local": 8}),
    "svg": Picture(
        {"frames": 4, "per_frame": 15, "window": 1, "block": 5}, inputs={"temporal": torch.tensor([[True]])}
    ),
    "tree_verify": Picture(queries=15, keys=39, inputs={"prefix": torch.tensor([24]), "ancestor": _tree(15)}),
    "videofactory": Picture({"frames": 4, "height": 4, "width": 4, "window": [2, 2, 2], "layer": 1}),
    # Selected by content.
    "anchor": Picture({"block": 8, "group": 2, "theta": 1}),
    "biformer": Picture({"height": 8, "width": 8, "regions": 4, "topk": 3}),
    "deepseek_sparse": Picture({"topk": 12}, inputs=_indexer(LENGTH)),
    "dhsa": Picture({"rows": 8, "topk": 20, "near": 6, "first": 4}, inputs=_pieces(11)),
    "dynamic_mask": Picture({"keys_kept": 12}),
    "flash_moba": Picture({"block": 4, "topk": 3}, inputs={"filter": torch.full((1, 3, 16), 0.3)}),
    "flux": Picture({"sinks": 4, "window": 12, "block": 4}, inputs={"full": torch.tensor([False])}),
    "hip": Picture(
        {"stages": [8, 4], "kept": [16, 8], "strides": [2, 1], "rows": 8, "sinks": 4, "window": 8}, queries=96
    ),
    "hyper_attention": Picture(
        {"block": 8}, inputs={**_clusters(hq=9, hk=9), "sample": torch.arange(0, 64, 8).reshape(1, 1, 8)}
    ),
    "minference_blocks": Picture({"block": 8, "topk": 3}),
    "minference_vertical_slash": Picture({"columns": 6, "slashes": 50, "block": 4, "probe": 8}, queries=160),
    "mminference_boundary": Picture({"window": [6, 8, 1, 12], "sinks": [1, 4, 0, 0]}, inputs=_pictures()),
    "mminference_grid": Picture({"strides": [6, 8], "probe": 6}),
    "moba": Picture({"block": 8, "topk": 3}),
    "rectified": Picture({"block": 8, "drop": 0.7}, inputs={"neighbour": torch.eye(8, dtype=torch.bool)}),
    "recycled": Picture(inputs={"cached": torch.tensor([[[1, 4, 7, 20, 21, 30]]]), "since": torch.tensor([40])}),
    "routing_transformer": Picture({"size": 20}, inputs=_centroids(4)),
    "seer": Picture({"block": 8, "threshold": 0.3, "dense_rows": 1}, inputs=_gates(8)),
    "seer_decode": Picture({"block": 8, "budget": 16}),
    "sparsifiner": Picture(inputs=_predicted(LENGTH)),
    "ssa_random": Picture({"window": 16}, inputs={"place": _noisy(LENGTH)}),
    "superlinear": Picture({"near": 1, "topk": 2, "back": 0.5}),
    "sparse_d": Picture({"block": 8}, inputs=_map(8)),
    "svg2": Picture({"p": 0.5, "query_clusters": 6, "key_clusters": 8}, inputs=_clusters(qc=6, kc=8)),
    "temp_cache": Picture(
        inputs={**_clusters(qbucket=4, kbucket=4), "merged": torch.ones(1, 1, LENGTH, dtype=torch.long)}
    ),
    "token_sparse": Picture({"window": 8, "pool": 3, "tau": 0.4}),
    "vmoba": Picture({"frames": 4, "height": 4, "width": 4, "chunk": [1, 2, 2], "topk": 2, "layer": 2}),
    "xattention": Picture({"block": 8, "stride": 4, "p": 0.5}),
    "vmoba_threshold": Picture({"frames": 4, "height": 4, "width": 4, "chunk": [1, 2, 2], "layer": 0}),
}
"""Pictures of patterns that lack defaults, or whose defaults would show little."""

NO_TOKENS = {"attention_residual", "autoformer_lags", "davit_channel", "hybrid_forcing", "native_sparse", "vsa"}
"""Patterns without a picture: keys that are layers, lags or channels, or branches that together see every key."""


def pictures() -> dict[str, str]:
    """Return each SVG by its path below docs/."""
    return {f"pictures/{name}.svg": DRAWN.get(name, Picture()).svg(name) for name in drawn_names()}


def drawn_names() -> list[str]:
    """Return the names of the patterns that have a picture."""
    return [name for name in (*pattern_names(), *routing_names()) if name not in NO_TOKENS]


# --- the reference ---------------------------------------------------------------------------------------------------

REFERENCE = """# Reference

<!-- Written by `python docs/generate.py` from the code; do not edit. -->

## Errors

Each error is an `attnc.AttncError` and also the matching builtin exception. Bad input is refused before anything runs.

{errors}

## Fallbacks

A call that runs on a slower path than its caller would expect is counted: `attnc.fallbacks()` returns a record with
pattern, kind, reason and count for each such way, and `attnc.reset_fallbacks()` resets the counts. The first occurrence
of a slow way is logged as a warning, of another way as an info, later ones for debugging, under
`attnc.runtime.fallbacks`; without a handler Python writes warnings to stderr. Before a call, `attend.plan(…)` says
which executor runs, and its `fallback` why the executor is not the expected one.

{fallbacks}

The algorithm's normal work is not a fallback: gathering tiles, bricks and selected keys; sums and states in fp32 for
16-bit operands; padding inside a tile; small vectors per row (the LSE and its gradient); rows of a recurrence that are
computed before its passes; decoding batch entries of several lengths one length after another; and whatever the caller
requested (`backend="reference"`, Triton's interpreter, the checks of `strict`). Autocast's casts inside a compiled
graph belong to the graph and are not counted.

## Environment variables

attnc reads no other variables; variables that another program reads are listed where they affect attnc.

{variables}
"""


def reference_page() -> str:
    """Return `reference.md`: errors, fallbacks and environment variables."""
    errors = [["error", "builtin", "when", "raised in"], *_errors()]
    kinds = [["kind", "what it is", "executors", "logged as", "`strict=True`"]]
    for kind in KINDS:
        executors = ", ".join(f"`{entry.name}`" for entry in TABLE if kind in entry.executor.fallbacks) or "all"
        level, strict = "warning" if kind.slow else "info", "refused" if kind.strict else "–"
        kinds.append([f"`{kind.name}`", kind.when, executors, level, strict])
    variables = [["variable", "default", "meaning", "read by"]]
    variables += [[f"`{x.name}`", x.default or "not set", x.meaning, x.by] for x in VARIABLES]
    return REFERENCE.format(errors=_table(errors), fallbacks=_table(kinds), variables=_table(variables))


def _table(rows: list[list[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


def _errors() -> Iterator[list[str]]:
    """Yield a row for every public error, the base first."""
    raised = _raised()
    for error in sorted(public_errors(), key=lambda error: (error is not AttncError, error.__name__)):
        builtin = next(base for base in error.__mro__ if base.__module__ == "builtins")
        first = (error.__doc__ or "").split("\n\n")[0].replace("\n    ", " ").replace("|", "\\|")
        where = ", ".join(f"`{folder}`" for folder in sorted(raised.get(error.__name__, ()))) or "as a subclass"
        yield [f"`{error.__name__}`", f"`{builtin.__name__}`", first, where]


def public_errors() -> set[type[AttncError]]:
    """Return `AttncError` and its descendants."""
    for module in pkgutil.walk_packages(attnc.__path__, "attnc."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    descendants: set[type[AttncError]] = set()
    todo: list[type[AttncError]] = [AttncError]
    while todo:
        error = todo.pop()
        descendants |= {error}
        todo += [x for x in error.__subclasses__() if x.__module__.startswith("attnc.")]
    return descendants


def _raised() -> dict[str, set[str]]:
    """Return the folders in which each error is raised, by its name."""
    folders: dict[str, set[str]] = {}
    for folder in ("spec", "compiler", "runtime"):
        for path in sorted((DOCS.parent / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    folder_parts = path.parent.relative_to(DOCS.parent).parts[:2]
                    folders.setdefault(node.func.id, set()).add("/".join(folder_parts))
    return folders


# --- coverage ---------------------------------------------------------------------------------------------------------

COVERAGE = """# Coverage

<!-- Written by `python docs/generate.py` from docs/systems.py and tests/stdlib_patterns/without.py; do not edit. -->

The library's files for each system, and the checks of each file.

## Systems

{systems}

## Checks

Each cell is one test, `pytest tests/stdlib_patterns/test_every_file.py -k NAME-CHECK`:

{checks}

Masks and outputs are compared in at least three shapes, including odd sizes and sizes that are not multiples of blocks.
The references, a small function in NumPy or torch for each system, are in `tests/stdlib_patterns/reference` and are
written from the papers. A number refers to a reason why a check does not apply; a test checks that the reason is true.

{table}

{reasons}
"""


def coverage_page() -> str:
    """Return `coverage.md`: systems and their files, files and their checks."""
    without = importlib.import_module("without")
    reasons: dict[str, int] = {}
    rows = [["pattern", "folder", *without.CHECKS]]
    for name in library_names():
        cells = [_cell(without, name, check, reasons) for check in without.CHECKS]
        rows.append([f"`{name}`", library_files()[name].parent.name, *cells])
    checks = "\n".join(f"- **{check}**: {what}." for check, what in without.CHECKS.items())
    numbered = "\n".join(f"{number}. {why}." for why, number in reasons.items())
    return COVERAGE.format(systems=_systems(), checks=checks, table=_table(rows), reasons=numbered)


def _cell(without: Any, name: str, check: str, reasons: dict[str, int]) -> str:
    """Return `yes`, or the number of a reason; a new reason gets the next number."""
    reason = without.reason(check, name)
    told = [] if reason is None else [reason.why]
    if check == "warnings":
        told = [f"{code}, expected: {why}" for code, why in without.WARNED.get(name, {}).items()]
    numbers = [str(reasons.setdefault(why, len(reasons) + 1)) for why in told]
    return ", ".join(numbers) or "yes"


def _systems() -> str:
    """Return a table for each part of the survey."""
    systems = importlib.import_module("systems")
    parts = []
    for title, part_systems in systems.TABLES.items():
        rows = [["system", "files", "not a file"]]
        for system in part_systems:
            files = ", ".join(f"`{name}`" for name in system.files)
            rows.append([system.name, files or "–", system.why or "–"])
        parts.append(f"### {title}\n\n{_table(rows)}")
    return "\n\n".join(parts)


def generated() -> dict[Path, str]:
    """Return every generated file with its text."""
    catalogue = Catalogue(frozenset(drawn_names()))
    pages = {**catalogue.pages(), "reference.md": reference_page(), "coverage.md": coverage_page()}
    return {DOCS / path: text for path, text in {**pictures(), **catalogue.tile_maps, **pages}.items()}


def stale() -> list[Path]:
    """Return generated files that are missing or out of date, and pictures and pages that belong to no pattern."""
    wanted = generated()
    wrong = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    kept = [*sorted((DOCS / "pictures").rglob("*.svg")), *sorted((DOCS / "catalogue").glob("*.md"))]
    return wrong + [path for path in kept if path not in wanted]


def main(arguments: list[str]) -> int:
    """Write the files, or check them."""
    if arguments == ["--check"]:
        for path in (wrong := stale()):
            print(f"not current: {path}; run python docs/generate.py", file=sys.stderr)
        return int(bool(wrong))
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
