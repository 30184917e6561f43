"""The gate of kernels for selected blocks: a set of kernels in the sizes of the library's patterns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from attnc.compiler.ir import fold
from attnc.compiler.kernels.selected.selected_kernels import STAGES, emit_chosen, emit_delta_of
from attnc.compiler.kernels.selected.selected_problem import SelectedProblem, rest_text
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.toolchain import kernel_gate
from attnc.runtime.toolchain.compiling import CompiledBinary, Outcome
from attnc.runtime.toolchain.kernel_gate import GateCase


@dataclass(frozen=True)
class Like:
    """The properties that kernels are specialised for, as a pattern of the literature has them."""

    causal: bool = True
    grouped: bool = False
    stacked: bool = False
    ordered: bool = False
    columns: int = 64


FEWEST_ROWS = 64
"""Minimum number of keys for a required tensor-core instruction; tiles of fewer keys may use any."""

SELECTION: Mapping[str, Like] = {
    "moba": Like(),
    "moba of groups": Like(stacked=True),
    "native sparse": Like(grouped=True),
    "whole places": Like(causal=False, grouped=True),
    "clusters": Like(ordered=True, grouped=True),
    "tokens": Like(columns=16, grouped=True),
}
"""The kernels that the gate compiles, by name.

Blocks of keys that each head selects, with its own or shared keys; blocks that a group selects; blocks whose keys are
all visible; keys that are gathered first; blocks of few keys.
"""


def cases(
    targets: Sequence[str],
    head_dims: Sequence[int] = (64, 128),
    dtype: str = "bfloat16",
    likes: Mapping[str, Like] = SELECTION,
) -> Iterator[GateCase]:
    """Yield the kernels of a selection; kernels with equal text once."""
    causal = rest_text(fold.less_equal(fold.place("k"), fold.place("q")))[0]
    seen = set()
    for target in targets:
        for width in head_dims:
            for name, like in likes.items():
                problem = SelectedProblem(
                    dk=width,
                    dv=width,
                    dtype=dtype,
                    target=TARGETS[target],
                    rest=causal if like.causal else None,
                    ordered=like.ordered,
                    stacked=like.stacked,
                    grouped=like.grouped,
                    columns=like.columns,
                )
                sources = [emit_chosen(problem, stage) for stage in STAGES]
                for source in (*sources, emit_delta_of(problem, True)):
                    key = (source.digest, target)
                    if key not in seen:
                        seen.add(key)
                        yield GateCase(name, source, target, width, dtype, like.grouped)


def judge(case: GateCase, outcome: Outcome) -> list[str]:
    """Return the reasons to reject a kernel; empty if it is accepted."""
    reasons = kernel_gate.judge(case, outcome)
    if case.stage == "dkdv" and case.source.tiles.k_tile < FEWEST_ROWS:
        wanted = kernel_gate.PRODUCTS[case.target]
        reasons = [reason for reason in reasons if wanted not in reason]
    if isinstance(outcome, CompiledBinary) and case.dtype != "float32":
        for loop in outcome.code.loops:
            if loop.local_loads:
                reasons.append(f"{loop.local_loads} local loads in the loop of {loop.instructions} instructions")
    return list(dict.fromkeys(reasons))
