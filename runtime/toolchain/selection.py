"""The patterns, with parameters, whose kernels the gate compiles, and their kernels for a head dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnc.compiler.ir import Pattern
from attnc.compiler.kernels.attention_kernels import HeadShape, find_kernels
from attnc.compiler.kernels.decode_kernels import ROW_TILES, find_decode
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.parts import in_parts
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.lowering.lower import lower
from attnc.compiler.passes.attentions import alone
from attnc.compiler.passes.last_rows import OtherRowsError, last_rows
from attnc.runtime.texts.library import find, load, pattern_names
from attnc.runtime.toolchain.kernel_gate import GateCase
from attnc.spec.meaning.bind import bind

PARAMETERS: Mapping[str, Mapping[str, object]] = {
    "combiner": {"segment": 64},
    "combiner_axial": {"width": 32},
    "combiner_mixture": {"width": 32},
    "davit_window": {"height": 24, "width": 32},
    "freeswim": {"frames": 4, "height": 12, "width": 16, "reach": [2, 3]},
    "halo": {"height": 24, "width": 32},
    "hierarchical": {"group": 16},
    "lingen_temporal": {"frames": 8, "height": 8, "width": 12},
    "log_sparse": {"segment": 256, "window": 16},
    "longformer": {"dilation": [1, 2]},
    "mminference_grid": {"strides": [64, 96]},
    "moa": {"alpha": [64, 128], "beta": [0.25, 0.125]},
    "monarch": {"rows": 32, "cols": 32},
    "monarch_rt": {"frames": 4, "height": 8, "width": 8},
    "neighborhood_2d": {"height": 32, "width": 40},
    "neighborhood_3d": {"frames": 8, "height": 12, "width": 16},
    "radial": {"frames": 6, "per_frame": 256},
    "sliding_tile": {"frames": 6, "height": 16, "width": 16, "kernel": [4, 8, 8], "tile": [2, 4, 4]},
    "svg": {"frames": 6, "per_frame": 64},
    "videofactory": {"frames": 8, "height": 8, "width": 12},
}
"""Parameters for library patterns without defaults."""


@dataclass(frozen=True)
class PatternRequest:
    """A library pattern and values of its parameters."""

    name: str
    values: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.values.items())
        return f"{self.name}({arguments})" if arguments else self.name

    def pattern(self) -> Pattern:
        """Load and lower the pattern. Raises PatternNotFoundError, SpecError."""
        program, _ = load(self.name)
        return lower(bind(program, self.values))


SELECTION = (
    PatternRequest("causal"),
    PatternRequest("sliding_window", {"window": 512}),
    PatternRequest("sliding_window", {"window": 512, "sinks": 4}),
    PatternRequest("prefix_lm"),
    PatternRequest("document"),
    PatternRequest("moa", PARAMETERS["moa"]),
    PatternRequest("blocked"),
    PatternRequest("power"),
    PatternRequest("strided"),
    PatternRequest("alibi"),
    PatternRequest("softcap"),
    PatternRequest("gpt_oss"),
    PatternRequest("fox"),
    PatternRequest("t5"),
    PatternRequest("graphormer"),
    PatternRequest("softplus_lssa"),
    PatternRequest("affine_scaled"),
    PatternRequest("neighborhood_2d", PARAMETERS["neighborhood_2d"]),
    PatternRequest("sliding_tile", PARAMETERS["sliding_tile"]),
)
"""One pattern of every kind that kernels are written for.

Ranges with all sorts of bounds, documents, lists, bricks, custom scores with terms of queries, keys and distances, and
with tables, custom weights.
"""


def named(names: Sequence[str]) -> list[PatternRequest]:
    """Return requests for library patterns by name. Raises PatternNotFoundError."""
    for name in names:
        find(name)
    return [PatternRequest(name, PARAMETERS.get(name, {})) for name in names]


def whole_library() -> list[PatternRequest]:
    """Return requests for every pattern of the library."""
    return named(pattern_names())


@dataclass(frozen=True, slots=True)
class NoKernels:
    """A pattern that runs without kernels, or a gradient without a kernel; `reason` comes from the compiler."""

    pattern: str
    target: str
    head_dim: int
    dtype: str
    reason: str


def cases(
    wanted: Sequence[PatternRequest], targets: Sequence[str], head_dims: Sequence[int], dtypes: Sequence[str]
) -> Iterator[GateCase | NoKernels]:
    """Yield the kernels of each pattern on each target; kernels that two patterns share once."""
    seen: set[tuple[str, str]] = set()
    for request in wanted:
        pattern = request.pattern()
        for target in targets:
            for dtype in dtypes:
                for width in head_dims:
                    yield from _fresh(
                        _cases(str(request), pattern, target, HeadShape(width, width, dtype, grouped=False)), seen
                    )


def same_text(case: GateCase) -> tuple[str, str]:
    """Return the key by which kernels are equal: the target, and the text without name and comments."""
    text = "\n".join(line for line in case.source.text.splitlines() if not line.startswith("#"))
    return case.target, text.replace(case.source.function, "")


def _fresh(all_cases: Iterator[GateCase | NoKernels], seen: set[tuple[str, str]]) -> Iterator[GateCase | NoKernels]:
    for case in all_cases:
        if isinstance(case, GateCase):
            key = same_text(case)
            if key in seen:
                continue
            seen.add(key)
        yield case


def _cases(name: str, pattern: Pattern, target: str, heads: HeadShape) -> Iterator[GateCase | NoKernels]:
    parts = in_parts(pattern)
    if len(parts.nodes) > 1:
        for node in parts.nodes:
            part_pattern = alone(parts, node, None if node.family is None else 0)
            yield from _cases(f"{name}: {node.name}", part_pattern, target, heads)
        return
    try:
        kernels = find_kernels(pattern, heads, TARGETS[target])
        sources = kernels.of_rows
    except NotInKernelsError as error:
        yield NoKernels(name, target, heads.dk, heads.dtype, str(error))
        return
    for source in sources:
        yield GateCase(name, source, target, heads.dk, heads.dtype)
    groups = find_kernels(pattern, replace(heads, grouped=True), TARGETS[target])
    yield GateCase(name, groups.dkdv, target, heads.dk, heads.dtype, grouped=True)
    try:
        for source in kernels.of_pairs:
            yield GateCase(name, source, target, heads.dk, heads.dtype)
    except NotInKernelsError as error:
        yield NoKernels(name, target, heads.dk, heads.dtype, f"gradients pair by pair: {error}")
    try:
        served = find_decode(last_rows(pattern), heads, TARGETS[target], "pages")
        yield GateCase(name, served.decode(ROW_TILES[0]), target, heads.dk, heads.dtype)
        yield GateCase(name, served.merge, target, heads.dk, heads.dtype)
    except (NotInKernelsError, OtherRowsError) as error:
        yield NoKernels(name, target, heads.dk, heads.dtype, f"decode: {error}")
